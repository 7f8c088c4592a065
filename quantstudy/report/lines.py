"""Accuracy over bits, and loss and accuracy over epochs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from quantstudy.errors import UserError
from quantstudy.report.style import BLACK, BLUE, GREEN, INK, ORANGE, OUTLINED, PURPLE, SKY, VERMILLION, plot_style, save

SERIES = {"PTQ": ("o", VERMILLION, "post-training (PTQ)"), "QAT": ("s", BLUE, "with training (QAT)")}
ASIDE = {"PTQ": 2**-0.07, "QAT": 2**0.07}
"""The factor that moves a series away from its bits: neither series hides the other."""
RUN_STYLES = (("o", BLUE), ("s", VERMILLION), ("^", GREEN), ("D", ORANGE), ("v", PURPLE), ("P", SKY))

Curve = list[dict[str, float]]


def plot_scaling_law(path: Path, title: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw `points`, rows of `tables.scaling_law`, as a PNG: top-1 over bits, with bars of the 95 % intervals."""
    with plot_style():
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for training, (marker, color, label) in SERIES.items():
            rows = [row for row in points if row["training"] == training]
            bits, top1, low, high = ([row[key] for row in rows] for key in ("bits", "top1", "top1_low", "top1_high"))
            x = [width * ASIDE[training] for width in bits]
            ends = [np.subtract(top1, low), np.subtract(high, top1)]
            style: Any = {"marker": marker, "color": color, "markersize": 7, "elinewidth": 1.2, "capsize": 3}
            axes.errorbar(x, top1, yerr=ends, label=label, **style)
        if points:
            axes.set_xscale("log", base=2)
        else:
            axes.text(0.5, 0.5, "scaling_law lists no variants", transform=axes.transAxes, ha="center")
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["bits"] for row in points})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08, y=0.12)
        _name_points(axes, points)
        axes.set(title=f"{title}: scaling law", xlabel="bits of a weight", ylabel="top-1 accuracy, %")
        axes.legend(loc="lower left", title="bars: 95 % intervals", alignment="left", title_fontsize=9)
        save(figure, path)


def _name_points(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Write each value next to its point, but only once where both series have the same variant."""
    for bits in {row["bits"]: None for row in points}:
        rows = sorted((row for row in points if row["bits"] == bits), key=lambda row: -row["top1"])
        shown = rows[:1] if len({row["variant"] for row in rows}) == 1 else rows
        for row in shown:
            color = INK if len(shown) == 1 else SERIES[row["training"]][1]
            trained = row["training"] == "QAT"  # drawn on the left: the axis runs from many bits to few
            point, offset = (bits * ASIDE[row["training"]], row["top1"]), (-6, -7) if trained else (6, 7)
            place: Any = {"ha": "right", "va": "top"} if trained else {"ha": "left", "va": "bottom"}
            text: Any = {"textcoords": "offset points", "color": color, "fontsize": 9} | place
            axes.annotate(f"{row['top1']:.2f}", point, offset, path_effects=OUTLINED, **text)


def read_curve(path: Path) -> Curve:
    """Read a training curve, one row per epoch; empty cells are left out (epoch 0 was not trained).

    Raises:
        UserError: the file is missing or a cell is no number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a training curve ({error})") from None


def plot_training_curves(path: Path, title: str, finetune: Curve, qat: Mapping[str, Curve]) -> None:
    """Draw loss and top-1 over epochs: fine-tuning on the left, every QAT method on the right.

    Solid lines are validation, dashed ones training.
    """
    styles = {method: RUN_STYLES[index % len(RUN_STYLES)] for index, method in enumerate(qat)}
    with plot_style():
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, sharex="col")
        for (loss, top1), name in zip(grid.T, ("fine-tuning", "QAT"), strict=True):
            loss.set(title=f"{title}: {name}", ylabel="cross-entropy loss")
            top1.set(xlabel="epoch", ylabel="top-1 accuracy, %")
            top1.xaxis.set_major_locator(MaxNLocator(integer=True))
        for row, metric in enumerate(("loss", "top1")):
            _draw_curve(grid[row][0], finetune, metric, "o", BLACK)
            for method, curve in qat.items():
                _draw_curve(grid[row][1], curve, metric, *styles[method])
        parts = (("validation", BLACK, "-"), ("training", "white", "--"))
        black: Any = {"color": BLACK, "marker": "o", "markersize": 5}
        handles = [Line2D([], [], label=name, markerfacecolor=face, ls=line, **black) for name, face, line in parts]
        grid[0][0].legend(handles=handles)
        runs = [(method, *style) for method, style in styles.items()]
        handles = [Line2D([], [], label=name, marker=mark, color=color, markersize=5) for name, mark, color in runs]
        if qat:
            grid[0][1].legend(handles=handles)
        save(figure, path)


def _draw_curve(axes: Axes, curve: Curve, metric: str, marker: str, color: str) -> None:
    for part, line, alpha, face in (("train", "--", 0.55, "white"), ("validation", "-", 1.0, color)):
        rows = [row for row in curve if f"{part}_{metric}" in row]
        x, y = [row["epoch"] for row in rows], [row[f"{part}_{metric}"] for row in rows]
        style: Any = {"marker": marker, "markersize": 5, "markerfacecolor": face}
        axes.plot(x, y, color=color, linestyle=line, alpha=alpha, **style)
