"""The points that no other beats, and where an axis breaks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantstudy.report.pareto import SAME_COST, pareto_front, split_level

POINTS = st.lists(st.tuples(st.floats(0.1, 1000), st.floats(0, 100)), min_size=1, max_size=25)


@given(POINTS)
def test_no_point_beats_the_pareto_front(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert front == sorted(front) and set(front) <= set(points)
    assert max(accuracy for _, accuracy in points) == front[-1][1]
    for cost, accuracy in points:
        reached = max((a for c, a in front if c <= cost * (1 + SAME_COST) ** len(points)), default=0.0)
        assert accuracy <= reached


def test_pareto_front_by_hand() -> None:
    assert pareto_front([(4, 90), (1, 50), (2, 80), (3, 70), (4, 85)]) == [(1, 50), (2, 80), (4, 90)]
    assert pareto_front([(1.0, 50), (1.001, 60)]) == [(1.001, 60)]


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([], None),
        ([90.0, 88, 80], None),
        ([90.0, 89, 88, 10], 49.0),
        ([90.0, 89, 88, 60, 30, 10], 74.0),
        ([90.0, 20, 19, 18, 17], None),
        ([90.0, 75, 60, 45, 30], None),
    ],
)
def test_the_axis_breaks_at_a_wide_gap_below_the_majority(values: list[float], level: float | None) -> None:
    assert split_level(values) == level
