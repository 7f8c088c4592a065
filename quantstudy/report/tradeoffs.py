"""Accuracy against what it costs: file size, and latency at two batch sizes.

Where a few variants collapse, the accuracy axis is broken so that the others can still be told apart. The grey
band is fp32's 95 % interval: a variant inside it has not measurably lost accuracy.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from quantstudy.report.labels import label_points
from quantstudy.report.pareto import pareto_front, split_level
from quantstudy.report.results import Result
from quantstudy.report.style import FAMILIES, GREY, INK, message, plot_style, save


def plot_accuracy_vs_size(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its file size (MB, logarithmic) and the Pareto front of the two."""
    with plot_style():
        figure = Figure(figsize=(11, 7))
        panel = _Panel(figure, results, "size_mb", left=0.07, width=0.91)
        panel.draw(f"{title}: accuracy against size", "size of the model file, MB", hollow=False)
        handles = [*_family_handles(results), *_mark_handles(results, hollow=False)]
        _legend(figure, handles)
        save(figure, path)


def plot_accuracy_vs_latency(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draw every variant's top-1 over its latency (ms a batch, logarithmic), batch 16 and batch 1 side by side.

    Variants whose kernel is simulated are hollow and no part of the Pareto front.
    """
    with plot_style():
        figure = Figure(figsize=(15, 7.4))
        for key, batch, left in (("latency_ms_b16", 16, 0.05), ("latency_ms_b1", 1, 0.545)):
            panel = _Panel(figure, results, key, left=left, width=0.445)
            panel.draw(f"{title}: batch {batch}", f"latency of a batch of {batch}, ms", hollow=True)
        _legend(figure, [*_family_handles(results), *_mark_handles(results, hollow=True)])
        save(figure, path)


class _Panel:
    """One accuracy-against-cost plot: one axes, or two over each other where the accuracy axis is broken."""

    def __init__(self, figure: Figure, results: Sequence[Result], key: str, left: float, width: float) -> None:
        self.key = key
        self.baseline = results[0]
        self.drawn = [result for result in results if result[key] is not None]
        self.undrawn = [result.variant for result in results if result[key] is None]
        self.level = split_level([result.value("top1") for result in self.drawn])
        bottom, height, gap = 0.19, 0.75, 0.02
        if self.level is None:
            self.parts = [figure.add_axes((left, bottom, width, height))]
        else:
            low = height * 0.28
            upper = figure.add_axes((left, bottom + low + gap, width, height - low - gap))
            lower = figure.add_axes((left, bottom, width, low), sharex=upper)
            self.parts = [upper, lower]

    def draw(self, title: str, x_label: str, hollow: bool) -> None:
        """Draw everything; `hollow` marks the simulated kernels and keeps them off the Pareto front."""
        top, bottom = self.parts[0], self.parts[-1]
        top.set_title(title)
        top.set_ylabel("top-1 accuracy, %")
        bottom.set_xlabel(x_label)
        if not self.drawn:
            message(top, "nothing was timed on this machine")
            return
        self._limits()
        for axes in self.parts:
            self._draw_part(axes, hollow)
        if self.level is not None:
            _break_marks(top, bottom)
        for axes in self.parts:
            points = [result for result in self.drawn if self._part(result) is axes]
            label_points(
                axes,
                [(float(result[self.key] or 0), result.value("top1")) for result in points],
                [result.variant for result in points],
            )
        if self.undrawn:
            text = textwrap.fill("not timed here: " + ", ".join(self.undrawn), width=105)
            bottom.annotate(text, (0, 0), (0, -34), "axes fraction", "offset points", fontsize=8, color=GREY, va="top")

    def _part(self, result: Result) -> Axes:
        return self.parts[0 if self.level is None or result.value("top1") > self.level else -1]

    def _limits(self) -> None:
        costs = [float(result[self.key] or 0) for result in self.drawn]
        ratio = max(max(costs) / min(costs), 1.5)
        self.parts[0].set_xscale("log")
        self.parts[0].set_xlim(min(costs) / ratio**0.16, max(costs) * ratio**0.16)
        axis = self.parts[-1].xaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        for axes in self.parts:
            inside = [result.value("top1") for result in self.drawn if self._part(result) is axes]
            pad = max(0.12 * (max(inside) - min(inside)), 0.5)
            axes.set_ylim(min(inside) - pad, max(inside) + pad)
            axes.yaxis.set_major_locator(MaxNLocator(8 if axes is self.parts[0] else 4))

    def _draw_part(self, axes: Axes, hollow: bool) -> None:
        top1, half = self.baseline.value("top1"), self.baseline.value("top1_ci95")
        axes.axhspan(top1 - half, top1 + half, color="#F2F2F2", zorder=0)
        real = [result for result in self.drawn if not (hollow and result.simulated)]
        front = pareto_front([(float(result[self.key] or 0), result.value("top1")) for result in real])
        front += [(axes.get_xlim()[1], front[-1][1])] if front else []
        x, y = [cost for cost, _ in front], [accuracy for _, accuracy in front]
        axes.plot(x, y, color=GREY, linewidth=1, linestyle="--", drawstyle="steps-post", zorder=1)
        for result in self.drawn:
            marker, color = FAMILIES[result.family]
            point = ([float(result[self.key] or 0)], [result.value("top1")])
            face = "white" if hollow and result.simulated else color
            size = 130 if marker == "*" else 48
            axes.scatter(*point, s=size, marker=marker, c=face, edgecolors=color, linewidths=1.3, zorder=3)
            if result.group == "qat":
                axes.scatter(*point, s=150, marker="o", c="none", edgecolors=INK, linewidths=0.9, zorder=3)


def _break_marks(upper: Axes, lower: Axes) -> None:
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(bottom=False, labelbottom=False, which="both")
    marks: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": GREY,
        "clip_on": False,
    }
    upper.plot([0], [0], transform=upper.transAxes, **marks)
    lower.plot([0], [1], transform=lower.transAxes, **marks)


def _family_handles(results: Sequence[Result]) -> list[Line2D]:
    used = [family for family in FAMILIES if any(result.family == family for result in results)]
    return [_handle(FAMILIES[name][0], FAMILIES[name][1], FAMILIES[name][1], name) for name in used]


def _mark_handles(results: Sequence[Result], hollow: bool) -> list[Artist]:
    handles: list[Artist] = []
    if any(result.group == "qat" for result in results):
        handles.append(_handle("o", "none", INK, "ringed: with training (QAT)", size=11))
    if hollow and any(result.simulated for result in results):
        handles.append(_handle("s", "white", GREY, "hollow: simulated kernel, the time is the simulation's"))
    handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle="--", label="Pareto front"))
    handles.append(Patch(color="#E4E4E4", label="fp32's 95 % interval"))
    return handles


def _handle(marker: str, face: str, edge: str, label: str, size: float = 7) -> Line2D:
    handle = Line2D([], [], linestyle="none", marker=marker, markersize=11 if marker == "*" else size, label=label)
    handle.set_markerfacecolor(face)
    handle.set_markeredgecolor(edge)
    return handle


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    figure.legend(handles=list(handles), loc="lower center", ncols=6, columnspacing=1.4, handletextpad=0.5)
