"""Accuracy against what it costs: file size, and latency at two batch sizes.

Where a few variants collapse, the accuracy axis is broken so that the others can still be told apart. The grey
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
from matplotlib.ticker import MaxNLocator

from quantstudy.report.pareto import on_front, split_level
from quantstudy.report.results import Result
from quantstudy.report.style import FAMILIES, GREY, INK, OUTLINED, log_axis, plot_style, save

BOTTOM, HEIGHT, GAP = 0.19, 0.75, 0.02
"""Of the axes, as shares of the figure; `GAP` is between the parts of a broken one."""
LOWER_PART = 0.28


def plot_accuracy_vs_size(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its file size (MB, logarithmic) and the Pareto front of the two."""
    with plot_style():
        figure = Figure(figsize=(11, 7))
        parts = _axes(figure, results, left=0.07, width=0.91)
        _panel(parts, results, "size_mb", hollow=False)
        parts[0].set_title(f"{title}: accuracy against size")
        parts[-1].set_xlabel("size of the model file, MB")
        _legend(figure, results, hollow=False)
        save(figure, path)


def plot_accuracy_vs_latency(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its latency (ms a batch, logarithmic), batch 16 and batch 1 side by side.

    Variants whose kernel is simulated are hollow and no part of the Pareto front.
    """
    with plot_style():
        figure = Figure(figsize=(15, 7.4))
        for batch, left in ((16, 0.05), (1, 0.545)):
            key = f"latency_ms_b{batch}"
            parts = _axes(figure, [result for result in results if result[key] is not None], left, width=0.445)
            _panel(parts, results, key, hollow=True)
            parts[0].set_title(f"{title}: batch {batch}")
            parts[-1].set_xlabel(f"latency of a batch of {batch}, ms")
        _legend(figure, results, hollow=True)
        save(figure, path)


def _axes(figure: Figure, drawn: Sequence[Result], left: float, width: float) -> list[Axes]:
    """Return the axes of a plot, its limits of accuracy set: one, or two over each other where it is broken."""
    top1 = [result.value("top1") for result in drawn]
    level = split_level(top1)
    if level is None:
        parts = [figure.add_axes((left, BOTTOM, width, HEIGHT))]
    else:
        low = HEIGHT * LOWER_PART
        upper = figure.add_axes((left, BOTTOM + low + GAP, width, HEIGHT - low - GAP))
        parts = [upper, figure.add_axes((left, BOTTOM, width, low), sharex=upper)]
        upper.spines["bottom"].set_visible(False)
        upper.tick_params(bottom=False, labelbottom=False, which="both")
        marks: Any = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 9, "color": GREY, "clip_on": False}
        for axes, y in zip(parts, (0, 1), strict=True):
            axes.plot([0], [y], transform=axes.transAxes, linestyle="none", **marks)
    for axes in parts:
        inside = [value for value in top1 if level is None or (value > level) == (axes is parts[0])]
        pad = max(0.12 * (max(inside) - min(inside)), 0.5) if inside else 0.5
        axes.set_ylim(min(inside, default=0) - pad, max(inside, default=0) + pad)
        axes.yaxis.set_major_locator(MaxNLocator(8 if axes is parts[0] else 4))
    parts[0].set_ylabel("top-1 accuracy, %")
    return parts


def _panel(parts: Sequence[Axes], results: Sequence[Result], key: str, hollow: bool) -> None:
    """Draw top-1 over the metric `key`; `hollow` marks the simulated kernels and keeps them off the Pareto front."""
    costs = {result.variant: value for result in results if (value := result[key]) is not None}
    drawn = [result for result in results if result.variant in costs]
    if not drawn:
        parts[0].text(0.5, 0.5, "nothing was timed on this machine", transform=parts[0].transAxes, ha="center")
        return
    least, most = min(costs.values()), max(costs.values())
    margin = max(most / least, 1.5) ** 0.16
    log_axis(parts[-1], (1, 2, 3, 5, 7))
    parts[0].set_xlim(least / margin, most * margin)
    best = on_front(results, key, real_only=hollow)
    x = np.repeat([*(costs[result.variant] for result in best), most * margin], 2)[1:-1]
    front = x, np.repeat([result.value("top1") for result in best], 2)
    for axes in parts:
        axes.axhspan(results[0].interval["top1_low"], results[0].interval["top1_high"], color="#F2F2F2", zorder=0)
        axes.plot(*front, color=GREY, linewidth=1, linestyle="--", zorder=1)
        low, high = axes.get_ylim()
        inside = [result for result in drawn if low < result.value("top1") < high]
        _points(axes, inside, costs, hollow)
        _names(axes, inside, costs, front)
    if undrawn := [result.variant for result in results if result.variant not in costs]:
        text = textwrap.fill("not timed here: " + ", ".join(undrawn), width=105)
        parts[-1].annotate(text, (0, 0), (0, -34), "axes fraction", "offset points", fontsize=8, color=GREY, va="top")


def _points(axes: Axes, results: Sequence[Result], costs: Mapping[str, float], hollow: bool) -> None:
    """Draw the results that lie within `axes`, but for their names."""
    for result in results:
        marker, color = FAMILIES[result.family]
        point, top = (costs[result.variant], result.value("top1")), marker == "*"
        face = "white" if hollow and result.simulated else color
        axes.scatter(*point, s=130 if top else 48, marker=marker, c=face, edgecolors=color, linewidths=1.3, zorder=3)
        if result.group == "qat":
            axes.scatter(*point, s=150, marker="o", c="none", edgecolors=INK, linewidths=0.9, zorder=3)


def _names(axes: Axes, results: Sequence[Result], costs: Mapping[str, float], front: tuple[Any, Any]) -> None:
    """Write the name of each result beside its point, from the top down, off the other points and the `front`."""
    ordered = sorted(results, key=lambda result: -result.value("top1"))
    x, y = [costs[result.variant] for result in ordered], [result.value("top1") for result in ordered]
    names = [result.variant for result in ordered]
    avoided: Any = {"x_scatter": x, "y_scatter": y, "scatter_sizes": [4] * len(x), "avoid_label_lines_overlap": True}
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
    if hollow and any(result.simulated for result in results):
        handles.append(_handle("s", "white", GREY, "hollow: simulated kernel, the time is the simulation's", 7))
    handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="Pareto front"))
    handles.append(Patch(color="#E4E4E4", label="fp32's 95 % interval"))
    figure.legend(handles=handles, loc="lower center", ncols=6, columnspacing=1.4, handletextpad=0.5)


def _handle(marker: str, face: str, edge: str, label: str, size: float) -> Line2D:
    style: Any = {"markersize": size, "markerfacecolor": face, "markeredgecolor": edge}
    return Line2D([], [], linestyle="none", marker=marker, label=label, **style)
