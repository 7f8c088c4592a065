"""The sensitivity figure writes each SQNR, the worst of 0 dB too, and of a loss only what there is."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from quantstudy.report import heatmap


def test_an_sqnr_of_nothing_is_written_and_a_loss_of_nothing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(heatmap, "save", lambda figure, path: saved.append(figure))
    losses = {"loss_increase": 0.0, "top1_drop": 0.0, "images": 8}
    rows = [{"layer": name, "bits": 2, "sqnr_db": db} | losses for name, db in (("a", 0.2), ("b", 30.0))]
    heatmap.plot_sensitivity(Path("a.png"), "tiny", rows)
    written = [[text.get_text() for text in axes.texts] for axes in saved[0].axes]
    assert written == [["0", "30"], [], []]
