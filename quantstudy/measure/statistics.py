"""How sure an accuracy is: it is a proportion on a finite test split.

Wilson's interval says how far you can trust it. McNemar's exact test says whether two variants differ on the same
images.
"""

import math

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: two-sided 95 %."""


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `correct` out of `images`, both ends in percent.

    Wilson, *Probable inference, the law of succession, and statistical inference*, JASA 22 (1927). Unlike the
    normal interval it stays inside 0 to 100 and keeps a width at 0 % and 100 %.

    Raises:
        ValueError: `images` is not positive, or `correct` is not between 0 and `images`.
    """
    if images <= 0 or not 0 <= correct <= images:
        raise ValueError(f"{correct} correct of {images} images is no proportion")
    share, squared = correct / images, Z_95**2 / images
    center = (share + squared / 2) / (1 + squared)
    half = Z_95 * math.sqrt(share * (1 - share) / images + squared / (4 * images)) / (1 + squared)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def wilson_half_width(correct: int, images: int) -> float:
    """Return half the width of `wilson_interval`, in percentage points."""
    low, high = wilson_interval(correct, images)
    return (high - low) / 2


def mcnemar_exact_p(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value that two models are equally accurate on the same images.

    Only images that exactly one of the two gets right count: under the null hypothesis each of these n is as
    likely to favour either model, so the smaller count k follows Binomial(n, 1/2) and p = 2·P(X ≤ k), at most
    1 (McNemar, Psychometrika 12 (1947); the exact form). Summed in integers, so it neither rounds nor overflows.

    Args:
        correct_a: bool [images], whether model a is right.
        correct_b: bool [images], whether model b is right, on the same images in the same order.

    Raises:
        ValueError: the two arrays differ in shape.
    """
    only_a, only_b = _disagreements(correct_a, correct_b)
    n, k = only_a + only_b, min(only_a, only_b)
    ways = term = 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        ways += term
    return min(1.0, 2 * ways / 2**n)


def paired_drop_half_width(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> float:
    """Return half the width of the 95 % interval of the difference of two accuracies on the same images, in points.

    Only the images that exactly one of the two gets right vary, so this interval is much narrower than either model's
    own. It is the adjusted Wald interval of Bonett and Price, *Journal of Educational and Behavioral Statistics* 37
    (2012): one image is added to both kinds of disagreement, so the interval has a width even without disagreement.

    Args:
        correct_a: bool [images], whether model a is right.
        correct_b: bool [images], whether model b is right, on the same images in the same order.

    Raises:
        ValueError: the two arrays differ in shape.
    """
    only_a, only_b = _disagreements(correct_a, correct_b)
    images = np.size(correct_a) + 2
    a, b = (only_a + 1) / images, (only_b + 1) / images
    return 100 * Z_95 * math.sqrt((a + b - (a - b) ** 2) / images)


def _disagreements(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> tuple[int, int]:
    """Count the images that only a gets right, and those that only b gets right."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"correct_a has shape {a.shape}, correct_b {b.shape}; they must be the same images")
    return int(np.sum(a & ~b)), int(np.sum(b & ~a))
