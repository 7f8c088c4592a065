"""Decide on as few images as possible whether a variant loses no more than a limit.

The variant and fp32 predict the same images, in an order drawn by seed. The test looks after each of `LOOKS` equal
parts of the images. It stops as soon as it is sure that the drop is below the limit (accepted) or above it (rejected).
Each look is another chance to be wrong, so each may spend only a part of the allowed error: after a share t of the
images, a share t² of the error (Lan and DeMets, *Discrete Sequential Boundaries for Clinical Trials*, Biometrika 70
(1983), with a spending function of Kim and DeMets, Biometrika 74 (1987)). With t in place of t², the test would stop
somewhat earlier far from the limit, but would need a fifth more images near it. If no look is sure, the test ends
undecided. That is not an acceptance.

The statistic of a look is the score of Tango, *Equivalence Test and Confidence Interval for the Difference in
Proportions for the Paired-Sample Design*, Statistics in Medicine 17 (1998). Its variance is computed from the likeliest
pair of proportions whose difference is the limit. So the score holds even if the two models differ on few images, or on
none. For many images, the scores of several looks correlate like sums of independent steps. `boundaries` are computed
from that.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LOOKS = 20
SPENT = 0.8
"""The share of the allowed error that the looks spend, with a margin: scores of few images are not quite normal."""
Verdict = Literal["accepted", "rejected", "undecided"]
_GRID = 2001
"""The number of points at which the density of the sum is kept, from -8 to 8 standard deviations of the whole."""


def score(only_fp32: int, only_variant: int, images: int, limit: float) -> float:
    """Return Tango's score, in standard deviations, of a drop against `limit`; negative if the drop is smaller.

    Args:
        only_fp32: images that fp32 alone gets right.
        only_variant: images that the variant alone gets right.
        images: the number of all images, at least one.
        limit: the drop as a share, between 0 and 1.
    """
    a = 2 * images
    b = -only_fp32 - only_variant + (2 * images - only_fp32 + only_variant) * limit
    c = -only_variant * limit * (1 - limit)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = images * (2 * share + limit * (1 - limit))
    return (only_fp32 - only_variant - images * limit) / math.sqrt(max(variance, 1e-300))


@functools.cache
def boundaries(error: float, looks: int = LOOKS) -> tuple[float, ...]:
    """Return how many standard deviations each look needs for an error of at most `error` over all looks.

    The density of the sum of steps is carried from look to look, without the part that a look has stopped (Armitage,
    McPherson and Rowe, *Repeated Significance Tests on Accumulating Data*, JRSS A 132 (1969)).
    """
    points = np.linspace(-8, 8, _GRID)  # of the sum, whose standard deviation after all looks is 1
    width, step = points[1] - points[0], 1 / looks
    kernel = np.exp(-(points**2) / (2 * step)) * width / math.sqrt(2 * math.pi * step)
    density, found = np.zeros(_GRID), []
    density[_GRID // 2] = 1.0  # probabilities of the points
    for look in range(1, looks + 1):
        density = np.convolve(density, kernel, mode="same")
        beyond = np.cumsum(density[::-1])[::-1]
        spent = error * (2 * look - 1) * step**2  # after all looks up to this one, error · (look · step)²
        place = int(np.argmax(beyond <= spent))
        above, below = beyond[place], beyond[place - 1]
        share = (below - spent) / max(below - above, 1e-300)  # interpolates between two points
        found.append((points[place - 1] + share * width - width / 2) / math.sqrt(look * step))
        density[place:] = 0.0
    return tuple(found)


def images_needed(max_drop: float, error: float) -> int:
    """Return how many images it takes to accept a variant that is right on exactly the images where fp32 is."""
    limit, boundary = max_drop / 100, boundaries(SPENT * error)[-1]
    return math.ceil(boundary**2 * (1 - limit) / limit)


class PairedTest:
    """The test of one variant.

    Args:
        max_drop: the limit, in percentage points of top-1.
        images: how many images there are at most.
        error: the allowed probability of accepting a drop at the limit: 1 minus the confidence.
    """

    def __init__(self, max_drop: float, images: int, error: float) -> None:
        self.limit, self.boundaries = max_drop / 100, boundaries(SPENT * error, min(LOOKS, images))
        self.ends = [math.ceil(images * look / len(self.boundaries)) for look in range(1, len(self.boundaries) + 1)]
        """The numbers of images after which the test looks."""
        self.seen = self.only_fp32 = self.only_variant = 0
        self.verdict: Verdict | None = None

    @property
    def drop(self) -> float:
        """The drop so far, in percentage points."""
        return 100 * (self.only_fp32 - self.only_variant) / max(self.seen, 1)

    def look(self, fp32_right: Sequence[bool] | NDArray[np.bool_], right: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Take whether fp32 and the variant get the images up to the next of `ends` right; set `verdict` if sure.

        Raises:
            ValueError: the test has ended, or the number of images is wrong.
        """
        before, after = np.asarray(fp32_right, dtype=bool), np.asarray(right, dtype=bool)
        number = self.ends.index(self.seen) + 1 if self.seen else 0
        if self.verdict or before.shape != after.shape or before.shape != (self.ends[number] - self.seen,):
            raise ValueError(f"{before.shape} and {after.shape} images: the next look needs {self.ends[number:][:1]}")
        self.seen = self.ends[number]
        self.only_fp32 += int(np.sum(before & ~after))
        self.only_variant += int(np.sum(after & ~before))
        found = score(self.only_fp32, self.only_variant, self.seen, self.limit)
        if abs(found) >= self.boundaries[number]:
            self.verdict = "accepted" if found < 0 else "rejected"
        elif self.seen == self.ends[-1]:
            self.verdict = "undecided"
