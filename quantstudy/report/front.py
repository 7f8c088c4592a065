"""Accuracy against size for budgets of bits, compared with uniform widths and the two rules."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantstudy.report.style import BLUE, GREY, ORANGE, PURPLE, VERMILLION, log_axis, plot_style, save

SERIES = {
    "mixed_budget": ("o", VERMILLION, "mixed_budget: least loss within the size"),
    "uniform": ("s", BLUE, "uniform: every layer at the same bits"),
    "mixed_variance": ("^", ORANGE, "mixed_variance: int4 by lowest variance, the rest 16-bit"),
    "mixed_linear": ("D", PURPLE, "mixed_linear: linear layers in integers, the rest 16-bit"),
}


def plot_budget_front(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw top-1 with its 95 % interval, and the SQNR of the logits, over the bytes of the model file, as a PNG.

    The rows have `series`, `label`, `size_mb`, `top1`, `top1_low`, `top1_high`, `sqnr_db`. The series fp32 becomes a
    band.
    """
    with plot_style():
        figure = Figure(figsize=(14, 6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row in (row for row in rows if row["series"] == "fp32"):
            left.axhspan(row["top1_low"], row["top1_high"], color="#F2F2F2", zorder=0)
            left.axhline(row["top1"], color=GREY, linewidth=1, linestyle=":", label="fp32 and its 95 % interval")
        for series in SERIES:
            _draw(left, right, series, sorted((r for r in rows if r["series"] == series), key=lambda r: r["size_mb"]))
        for axes, label in ((left, "top-1 accuracy on test images, %"), (right, "SQNR of the logits, dB")):
            log_axis(axes, (1, 1.5, 2, 3, 5, 7))
            axes.set(xlabel="size of the model file, MB", ylabel=label)
        left.set_title(f"{title}: bits of each layer within a budget")
        left.legend(loc="lower right")
        save(figure, path)


def _draw(left: Axes, right: Axes, series: str, rows: Sequence[Mapping[str, Any]]) -> None:
    marker, color, label = SERIES[series]
    size, top1 = [row["size_mb"] for row in rows], [row["top1"] for row in rows]
    below = [max(0.0, row["top1"] - row["top1_low"]) for row in rows]  # at 0 and 100 % the ends may be rounded
    above = [max(0.0, row["top1_high"] - row["top1"]) for row in rows]
    style: Any = {"marker": marker, "color": color, "markersize": 6, "linewidth": 1.3}
    left.errorbar(size, top1, yerr=[below, above], label=label, elinewidth=0.8, capsize=2, **style)
    right.plot(size, [row["sqnr_db"] for row in rows], **style)
    if series == "uniform":
        for row, (axes, value) in itertools.product(rows, ((left, "top1"), (right, "sqnr_db"))):
            place = (row["size_mb"], row[value])
            axes.annotate(row["label"], place, (6, -11), textcoords="offset points", fontsize=8, color=color)
