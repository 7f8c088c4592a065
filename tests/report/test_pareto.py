import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from quantstudy.report.labels import label_points
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


def test_labels_of_points_on_top_of_each_other_do_not_overlap() -> None:
    figure = Figure(figsize=(8, 5), dpi=120)
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = [(5.0, 5.0)] * 7 + [(8.0, 5.1), (8.0, 5.0), (2.0, 9.9)]
    label_points(axes, points, [f"a_long_name_{index}" for index in range(len(points))])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    for index, box in enumerate(boxes):
        assert not any(box.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8)) for other in boxes[index + 1 :])
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
