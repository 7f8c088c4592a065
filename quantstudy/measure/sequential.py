"""Whether a variant loses no more than a limit, decided on as few images as that takes.

Variant and fp32 predict the same images, in an order that a seed drew. After each of `LOOKS` equal parts of them the
test asks how far the drop is below the limit (accepted), or above it (rejected), and stops when that is sure. Looking
often makes it easier to be wrong once, so each look may use up only a part of the error that is allowed in all: after a
share t of the images a share t of it (Lan and DeMets, *Discrete Sequential Boundaries for Clinical Trials*, Biometrika
70 (1983), with the spending function alpha·t of Kim and DeMets, Biometrika 74 (1987)). Where no look is sure, it ends
undecided, which is no acceptance.

At a look the statistic is the score of Tango, *Equivalence Test and Confidence Interval for the Difference in
Proportions for the Paired-Sample Design*, Statistics in Medicine 17 (1998): its variance is that of the likeliest pair
of proportions whose difference is the limit, so that it holds for few images that only one of both gets right, and for
none. Scores at several looks have, for many images, the correlations of sums of independent steps, from which
`boundaries` are computed.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LOOKS = 20
SPENT = 0.8
"""The share of the allowed error that is spent: the scores of few images are not quite normal."""
Verdict = Literal["accepted", "rejected", "undecided"]
_GRID = 2001
"""Points at which the density of the sum is held, from -8 to 8 standard deviations of the whole."""


def score(only_fp32: int, only_variant: int, images: int, limit: float) -> float:
    """Return Tango's score, in standard deviations, of a drop against `limit`; negative where it is smaller.

    Args:
        only_fp32: images that fp32 alone gets right.
        only_variant: images that the variant alone gets right.
        images: all of them, at least one.
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
    """Return how many standard deviations a look needs, so that all looks together are wrong at most `error` often.

    The density of the sum of the steps that no look has stopped is carried from look to look (Armitage, McPherson and
    Rowe, *Repeated Significance Tests on Accumulating Data*, JRSS A 132 (1969)).
    """
    points = np.linspace(-8, 8, _GRID)  # of the sum, whose standard deviation after all looks is 1
    width, step = points[1] - points[0], 1 / looks
    kernel = np.exp(-(points**2) / (2 * step)) * width / math.sqrt(2 * math.pi * step)
    density, found = np.zeros(_GRID), []
    density[_GRID // 2] = 1.0  # probabilities of the points
    for look in range(1, looks + 1):
        density = np.convolve(density, kernel, mode="same")
        beyond = np.cumsum(density[::-1])[::-1]
        place = int(np.argmax(beyond <= error * step))
        above, below = beyond[place], beyond[place - 1]
        share = (below - error * step) / max(below - above, 1e-300)  # between two points
        found.append((points[place - 1] + share * width - width / 2) / math.sqrt(look * step))
        density[place:] = 0.0
    return tuple(found)


def images_needed(max_drop: float, error: float) -> int:
    """Return on how many images a variant can be accepted at all: one that is right where fp32 is."""
    limit, boundary = max_drop / 100, boundaries(SPENT * error)[-1]
    return math.ceil(boundary**2 * (1 - limit) / limit)


class PairedTest:
    """The test of one variant.

    Args:
        max_drop: the limit, in percentage points of top-1.
        images: how many there are at most.
        error: how often a drop at the limit may be accepted, a share; 1 less the confidence.
    """

    def __init__(self, max_drop: float, images: int, error: float) -> None:
        self.limit, self.boundaries = max_drop / 100, boundaries(SPENT * error, min(LOOKS, images))
        self.ends = [math.ceil(images * look / len(self.boundaries)) for look in range(1, len(self.boundaries) + 1)]
        """After how many images it looks."""
        self.seen = self.only_fp32 = self.only_variant = 0
        self.verdict: Verdict | None = None

    @property
    def drop(self) -> float:
        """The drop so far, percentage points."""
        return 100 * (self.only_fp32 - self.only_variant) / max(self.seen, 1)

    def look(self, fp32_right: Sequence[bool] | NDArray[np.bool_], right: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Take the images up to the next of `ends`, whether fp32 and the variant get them right; set `verdict`.

        Raises:
            ValueError: it has ended, or they are not so many images.
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
