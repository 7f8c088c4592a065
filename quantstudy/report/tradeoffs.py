"""Accuracy against what it costs: file size, and latency at two batch sizes.

If a few variants collapse, they are named under the axis instead of drawn: the others can then be told apart. The grey
band is fp32's 95 % interval: a variant inside it has not measurably lost accuracy.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import textalloc
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from quantstudy.report.pareto import on_front, split_level
from quantstudy.report.results import Result
from quantstudy.report.style import FAMILIES, GREY, INK, OUTLINED, log_axis, plot_style, save

BOTTOM, HEIGHT = 0.19, 0.75
"""The axes' lower edge and height, as shares of the figure."""


def plot_accuracy_vs_size(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its file size (MB, logarithmic) and the Pareto front of the two."""
    with plot_style():
        figure = Figure(figsize=(11, 7))
        axes = figure.add_axes((0.07, BOTTOM, 0.91, HEIGHT))
        _panel(axes, results, "size_mb")
        axes.set(title=f"{title}: accuracy against size", xlabel="size of the model file, MB")
        _legend(figure, results, hollow=False)
        save(figure, path)


def plot_accuracy_vs_latency(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its latency (ms per batch, logarithmic), batch 16 and batch 1 side by side.

    The point of a simulated kernel or of a busy machine is hollow, has no name, and is not on the Pareto front.
    """
    with plot_style():
        figure = Figure(figsize=(15, 7.4))
        for batch, left in ((16, 0.05), (1, 0.545)):
            axes = figure.add_axes((left, BOTTOM, 0.445, HEIGHT))
            _panel(axes, results, f"latency_ms_b{batch}")
            axes.set(title=f"{title}: batch {batch}", xlabel=f"latency of a batch of {batch}, ms")
        _legend(figure, results, hollow=True)
        save(figure, path)


def _panel(axes: Axes, results: Sequence[Result], key: str) -> None:
    """Draw top-1 over the metric `key`; points that cannot be compared are hollow and off the Pareto front."""
    costs = {result.variant: value for result in results if (value := result[key]) is not None}
    timed = [result for result in results if result.variant in costs]
    axes.set_ylabel("top-1 accuracy, %")
    if not timed:
        axes.text(0.5, 0.5, "nothing was timed on this machine", transform=axes.transAxes, ha="center")
        return
    level = split_level([result.value("top1") for result in timed])
    drawn = [result for result in timed if level is None or result.value("top1") > level]
    least, most = min(costs.values()), max(costs.values())
    low, high = (bound(result.value("top1") for result in drawn) for bound in (min, max))
    margin, pad = max(most / least, 1.5) ** 0.16, max(0.12 * (high - low), 0.5)
    log_axis(axes, (1, 2, 3, 5, 7))
    axes.set(xlim=(least / margin, most * margin), ylim=(low - pad, high + pad))
    best = on_front(results, key)
    x = np.repeat([*(costs[result.variant] for result in best), most * margin], 2)[1:-1]
    front = x, np.repeat([result.value("top1") for result in best], 2)
    axes.axhspan(results[0].interval["top1_low"], results[0].interval["top1_high"], color="#F2F2F2", zorder=0)
    axes.plot(*front, color=GREY, linewidth=1, linestyle="--", zorder=1)
    _points(axes, drawn, costs, key)
    _names(axes, [result for result in drawn if result.comparable(key)], drawn, costs, front)
    below = [f"{result.variant} {result.value('top1'):.1f} %" for result in timed if result not in drawn]
    untimed = [result.variant for result in results if result.variant not in costs]
    lines = [("below this axis: ", below), ("not timed here: ", untimed)]
    text = "\n".join(textwrap.fill(what + ", ".join(names), width=105) for what, names in lines if names)
    axes.annotate(text, (0, 0), (0, -34), "axes fraction", "offset points", fontsize=8, color=GREY, va="top")


def _points(axes: Axes, results: Sequence[Result], costs: Mapping[str, float], key: str) -> None:
    """Draw the points of the results that lie within `axes`, without their names."""
    for result in results:
        marker, color = FAMILIES[result.family]
        point, top = (costs[result.variant], result.value("top1")), marker == "*"
        face = color if result.comparable(key) else "white"
        axes.scatter(*point, s=130 if top else 48, marker=marker, c=face, edgecolors=color, linewidths=1.3, zorder=3)
        if result.group == "qat":
            axes.scatter(*point, s=150, marker="o", c="none", edgecolors=INK, linewidths=0.9, zorder=3)


def _names(
    axes: Axes,
    results: Sequence[Result],
    drawn: Sequence[Result],
    costs: Mapping[str, float],
    front: tuple[Any, Any],
) -> None:
    """Write the name of each result next to its point, from the top down, clear of all points and of the `front`."""
    ordered = sorted(results, key=lambda result: -result.value("top1"))
    x, y = [costs[result.variant] for result in ordered], [result.value("top1") for result in ordered]
    names = [result.variant for result in ordered]
    others = [costs[result.variant] for result in drawn], [result.value("top1") for result in drawn]
    avoided: Any = {
        "x_scatter": others[0],
        "y_scatter": others[1],
        "scatter_sizes": [4] * len(drawn),
        "avoid_label_lines_overlap": True,
    }
    avoided |= {"x_lines": front[:1], "y_lines": front[1:]} if len(front[0]) else {}
    line: Any = {"linecolor": GREY, "linewidth": 0.6}
    textalloc.allocate(axes, x, y, names, textsize=8, textcolor=INK, path_effects=OUTLINED, **avoided, **line)


def _legend(figure: Figure, results: Sequence[Result], hollow: bool) -> None:
    handles: list[Artist] = [
        _handle(marker, color, color, family, 11 if marker == "*" else 7)
        for family, (marker, color) in FAMILIES.items()
        if any(result.family == family for result in results)
    ]
    if any(result.group == "qat" for result in results):
        handles.append(_handle("o", "none", INK, "ringed: with training (QAT)", 11))
    if hollow and any(result.simulated or result.busy for result in results):
        handles.append(_handle("s", "white", GREY, "hollow, not named: a simulated kernel or a busy machine", 7))
    handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="Pareto front"))
    handles.append(Patch(color="#E4E4E4", label="fp32's 95 % interval"))
    figure.legend(handles=handles, loc="lower center", ncols=6, columnspacing=1.4, handletextpad=0.5)


def _handle(marker: str, face: str, edge: str, label: str, size: float) -> Line2D:
    style: Any = {"markersize": size, "markerfacecolor": face, "markeredgecolor": edge}
    return Line2D([], [], linestyle="none", marker=marker, label=label, **style)
