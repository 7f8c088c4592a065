"""The plots of accuracy against cost: every variant has its name, where it can be read."""

import itertools
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from quantstudy import layout
from quantstudy.files import read_json, write_json
from quantstudy.params import load_params
from quantstudy.report import tradeoffs
from quantstudy.report.pareto import split_level
from quantstudy.report.results import load_results
from tests.report.fabricate import fabricate


@pytest.fixture
def figures(project, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    saved: list[Figure] = []
    monkeypatch.setattr(tradeoffs, "save", lambda figure, path: saved.append(figure))
    fabricate(load_params(), "tiny")
    return saved


def test_every_name_is_there_covers_no_other_and_leaves_no_axes(figures: list[Figure]) -> None:
    results = load_results(load_params(), "tiny")
    tradeoffs.plot_accuracy_vs_size(Path("a.png"), "tiny", results)
    tradeoffs.plot_accuracy_vs_latency(Path("b.png"), "tiny", results)
    assert [len(figure.axes) for figure in figures] == [1, 2]
    level = split_level([result.value("top1") for result in results])
    collapsed = [result.variant for result in results if level is not None and result.value("top1") < level]
    for axes in (axes for figure in figures for axes in figure.axes):
        *names, note = axes.texts
        key = "size_mb" if axes is figures[0].axes[0] else f"latency_ms_b{(16, 1)[figures[1].axes.index(axes)]}"
        wanted = {result.variant for result in results if result.comparable(key)}
        assert sorted(text.get_text() for text in names) == sorted(wanted - set(collapsed))
        assert collapsed and all(f"{variant} " in note.get_text() for variant in collapsed)
        boxes = [text.get_window_extent() for text in names]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
        assert all(axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 for box in boxes)


@pytest.mark.parametrize("timed", [[], ["int4_static"], ["fp32"]], ids=["nothing", "simulated", "fp32"])
def test_what_was_not_timed_is_left_out(figures: list[Figure], timed: list[str]) -> None:
    for variant in set(load_params().variants) - set(timed):
        path = layout.metrics("tiny", variant)
        write_json(path, read_json(path) | {"latency_ms_b1": None, "latency_ms_b16": None})
    tradeoffs.plot_accuracy_vs_latency(Path("a.png"), "tiny", load_results(load_params(), "tiny"))
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert texts[:-1] == [name for name in timed if name != "int4_static"]  # whose kernel is simulated
