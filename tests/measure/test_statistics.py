import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from quantstudy.measure.statistics import mcnemar_exact_p, paired_drop_half_width, wilson_half_width, wilson_interval


@st.composite
def proportions(draw: st.DrawFn) -> tuple[int, int]:
    images = draw(st.integers(1, 50_000))
    return draw(st.integers(0, images)), images


@given(proportions())
def test_wilson_interval_is_scipys_and_contains_the_proportion(proportion: tuple[int, int]) -> None:
    correct, images = proportion
    low, high = wilson_interval(correct, images)
    known = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((100 * known.low, 100 * known.high), abs=1e-9)
    assert 0 <= low <= 100 * correct / images + 1e-9 and 100 * correct / images - 1e-9 <= high <= 100
    assert wilson_half_width(correct, images) == pytest.approx((high - low) / 2)


@pytest.mark.parametrize(("correct", "images"), [(0, 0), (5, 4), (-1, 4)])
def test_no_proportion(correct: int, images: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, images)


def pair(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, only_a, only_b, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@settings(max_examples=50)
@given(*[st.integers(0, 400)] * 4)
def test_mcnemar_is_scipys_exact_binomial(both: int, only_a: int, only_b: int, neither: int) -> None:
    a, b = pair(both, only_a, only_b, neither)
    known = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact_p(a, b) == pytest.approx(known, rel=1e-9)
    assert mcnemar_exact_p(a, b) == mcnemar_exact_p(b, a)


def test_mcnemar_and_paired_drop_known_values() -> None:
    assert mcnemar_exact_p(*pair(30, 12, 5, 40)) == 2 * (1 + 17 + 136 + 680 + 2380 + 6188) / 2**17
    assert mcnemar_exact_p(*pair(10, 0, 0, 10)) == 1.0
    for counts in ((0, 10_000, 0, 0), (0, 5_000, 5_000, 0), (0, 12_000, 13_000, 0)):  # it stays finite
        assert 0.0 <= mcnemar_exact_p(*pair(*counts)) <= 1.0
    with pytest.raises(ValueError, match="same images"):
        mcnemar_exact_p(np.ones(3, bool), np.ones(4, bool))
    share, other = 13 / 89, 6 / 89  # one image more of each kind, of two images more
    expected = 100 * 1.959963984540054 * ((share + other - (share - other) ** 2) / 89) ** 0.5
    assert paired_drop_half_width(*pair(30, 12, 5, 40)) == pytest.approx(expected)
    assert paired_drop_half_width(*pair(98, 0, 0, 0)) == pytest.approx(100 * 1.959963984540054 * (0.02 / 100) ** 0.5)


def test_paired_drop_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, covered, rounds = 0.06 - 0.02, 0, 2000
    for _ in range(rounds):
        kind = rng.choice(4, size=300, p=[0.8, 0.06, 0.02, 0.12])
        a, b = (kind == 0) | (kind == 1), (kind == 0) | (kind == 2)
        covered += abs(100 * (a.mean() - b.mean() - truth)) <= paired_drop_half_width(a, b)
    assert 0.93 <= covered / rounds <= 0.98
