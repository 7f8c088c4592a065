"""The sequential test accepts a drop at the limit no more often than it may, and stops early where it can."""

import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from quantstudy.measure.sequential import LOOKS, PairedTest, boundaries, score

SEARCHES = 2000


def ended(test: PairedTest, fp32_right: NDArray[np.bool_], right: NDArray[np.bool_]) -> PairedTest:
    for start, end in zip([0, *test.ends], test.ends, strict=False):
        test.look(fp32_right[start:end], right[start:end])
        if test.verdict:
            break
    return test


def drawn(only_fp32: float, only_variant: float, images: int, random: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Draw whether fp32 and a variant are right, of which each alone is right in these shares of images."""
    where = random.random(images)
    either = (where >= only_fp32 + only_variant) & (random.random(images) < 0.6)
    return [(where < only_fp32) | either, ((where >= only_fp32) & (where < only_fp32 + only_variant)) | either]


@pytest.mark.parametrize(
    ("max_drop", "noise", "images"), [(0.5, 0.0, 1000), (0.5, 0.005, 2000), (1.0, 0.05, 2000), (2.0, 0.03, 125)]
)
def test_of_searches_at_the_limit_at_most_a_twentieth_accepts(max_drop: float, noise: float, images: int) -> None:
    """One test each; tests/search/test_search.py simulates whole searches."""
    random = np.random.default_rng(0)
    shares = (max_drop / 100 + noise, noise)
    found = Counter(
        ended(PairedTest(max_drop, images, 0.05), *drawn(*shares, images, random)).verdict for _ in range(SEARCHES)
    )
    assert found["accepted"] <= 0.05 * SEARCHES and found["rejected"] <= 0.06 * SEARCHES


@pytest.mark.parametrize("error", [0.05, 0.05 * 2 / 3, 0.05 * 2 / 9])
@pytest.mark.parametrize("drop", [0.0, 6.0])
def test_far_from_the_limit_it_needs_a_third_of_the_images_of_a_fixed_test(drop: float, error: float) -> None:
    """The fixed one-sided test accepts half the limit with a power of nine tenths, and is wrong as rarely."""
    limit, noise, random = 0.02, 0.01, np.random.default_rng(1)
    images = math.ceil((NormalDist().inv_cdf(1 - error) + 1.282) ** 2 * (limit / 2 + 2 * noise) / (limit / 2) ** 2)
    tests = [
        ended(PairedTest(100 * limit, images, error), *drawn(noise + drop / 100, noise, images, random))
        for _ in range(300)
    ]
    assert sum(test.verdict == ("rejected" if drop else "accepted") for test in tests) > 0.97 * len(tests)
    assert np.mean([test.seen for test in tests]) < images / 3


def test_boundaries_spend_a_quarter_of_the_error_in_the_first_half() -> None:
    random = np.random.default_rng(0)
    sums = random.standard_normal((100_000, LOOKS)).cumsum(1) / np.sqrt(np.arange(1, LOOKS + 1))
    stopped = (sums >= boundaries(0.05)).any(1)
    assert stopped.mean() == pytest.approx(0.05, abs=0.003)
    early = (sums >= boundaries(0.05))[:, : LOOKS // 2].any(1)
    assert early.mean() == pytest.approx(0.0125, abs=0.002)
    assert boundaries(0.05, 1)[0] == pytest.approx(1.645, abs=0.01)


@pytest.mark.parametrize("counts", [(5, 3, 200), (0, 0, 64), (0, 4, 100), (9, 0, 300), (30, 20, 500)])
def test_the_variance_is_that_of_the_likeliest_shares_at_the_limit(counts: tuple[int, int, int]) -> None:
    a, b, n = counts
    limit = 0.02
    shares = np.linspace(1e-9, (1 - limit) / 2 - 1e-9, 1_000_001)
    likelihood = a * np.log(shares + limit) + b * np.log(shares) + (n - a - b) * np.log(1 - 2 * shares - limit)
    share = shares[likelihood.argmax()]
    wanted = (a - b - n * limit) / math.sqrt(n * (2 * share + limit * (1 - limit)))
    assert score(*counts, limit) == pytest.approx(wanted, abs=1e-3)


def test_it_ends_once_and_takes_what_it_asks_for() -> None:
    test = PairedTest(1.0, 40, 0.05)
    assert len(test.ends) == 20 and test.ends[-1] == 40
    with pytest.raises(ValueError, match="next look needs"):
        test.look([True] * 3, [True] * 3)
    right = np.ones(40, dtype=bool)
    assert ended(test, right, ~right).verdict == "rejected"
    with pytest.raises(ValueError):
        test.look([True] * 2, [True] * 2)
    same = ended(PairedTest(1.0, 40, 0.05), right, right)
    assert same.verdict == "undecided" and same.seen == 40 and same.drop == 0
