"""Accuracy over bits, and loss and accuracy over epochs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from quantstudy.errors import UserError
from quantstudy.report.style import BLACK, BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, plot_style, save

SERIES = {"PTQ": ("o", VERMILLION, "post-training (PTQ)"), "QAT": ("s", BLUE, "with training (QAT)")}
RUN_STYLES = (("o", BLUE), ("s", VERMILLION), ("^", GREEN), ("D", ORANGE), ("v", PURPLE), ("P", SKY))

Curve = list[dict[str, float]]


def plot_scaling_law(path: Path, title: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw top-1 over bits, PTQ and QAT on the same schemes, with bands of the 95 % Wilson intervals.

    Args:
        path: the PNG to write.
        title: the study's name.
        points: rows of `tables.scaling_law`.
    """
    with plot_style():
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        axes = figure.add_subplot()
        for training, (marker, color, label) in SERIES.items():
            rows = [row for row in points if row["training"] == training]
            bits = [row["bits"] for row in rows]
            low, high = [row["top1_low"] for row in rows], [row["top1_high"] for row in rows]
            axes.fill_between(bits, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(bits, [row["top1"] for row in rows], marker=marker, color=color, label=label, markersize=7)
        axes.set_xscale("log", base=2)
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["bits"] for row in points})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08, y=0.12)
        _name_points(axes, points)
        axes.set_title(f"{title}: scaling law")
        axes.set_xlabel("bits of a weight")
        axes.set_ylabel("top-1 accuracy, %")
        axes.legend(loc="lower left", title="bands: 95 % intervals", alignment="left", title_fontsize=9)
        save(figure, path)


def _name_points(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Write each value beside its point, the better one of each number of bits above, the other below."""
    for bits in sorted({row["bits"] for row in points}):
        rows = sorted((row for row in points if row["bits"] == bits), key=lambda row: -row["top1"])
        shown = rows[:1] if len({row["variant"] for row in rows}) == 1 else rows
        for place, row in enumerate(shown):
            color = INK if len(shown) == 1 else SERIES[row["training"]][1]
            offset, align = ((0, 9), "bottom") if place == 0 else ((0, -9), "top")
            text = axes.annotate(
                f"{row['top1']:.2f}",
                (bits, row["top1"]),
                offset,
                textcoords="offset points",
                ha="center",
                va=align,
                color=color,
                fontsize=9,
            )
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def read_curve(path: Path) -> Curve:
    """Read a training curve, one row an epoch; an empty cell (epoch 0 was not trained) is left out.

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
    with plot_style():
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, sharex="col")
        columns: list[tuple[str, Mapping[str, Curve]]] = [("fine-tuning", {"fp32": finetune}), ("QAT", qat)]
        for column, (name, curves) in enumerate(columns):
            styles = (("o", BLACK),) if column == 0 else RUN_STYLES
            for row, (metric, unit) in enumerate((("loss", "cross-entropy loss"), ("top1", "top-1 accuracy, %"))):
                axes = grid[row][column]
                _draw_curves(axes, curves, metric, styles)
                axes.set_ylabel(unit)
            grid[0][column].set_title(f"{title}: {name}")
            grid[1][column].set_xlabel("epoch")
            grid[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
        _curve_legends(grid[0][0], grid[0][1], list(qat))
        save(figure, path)


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], metric: str, styles: Sequence[tuple[str, str]]) -> None:
    for index, curve in enumerate(curves.values()):
        marker, color = styles[index % len(styles)]
        for part, line, alpha in (("train", "--", 0.55), ("validation", "-", 1.0)):
            rows = [row for row in curve if f"{part}_{metric}" in row]
            axes.plot(
                [row["epoch"] for row in rows],
                [row[f"{part}_{metric}"] for row in rows],
                color=color,
                linestyle=line,
                alpha=alpha,
                marker=marker,
                markersize=5,
                markerfacecolor=color if part == "validation" else "white",
            )


def _curve_legends(left: Axes, right: Axes, methods: Sequence[str]) -> None:
    parts = [
        Line2D([], [], color=BLACK, marker="o", markersize=5, label="validation"),
        Line2D([], [], color=BLACK, marker="o", markersize=5, markerfacecolor="w", linestyle="--", label="training"),
    ]
    left.legend(handles=parts)
    styles = [RUN_STYLES[index % len(RUN_STYLES)] for index in range(len(methods))]
    runs = [
        Line2D([], [], color=color, marker=marker, markersize=5, label=method)
        for method, (marker, color) in zip(methods, styles, strict=True)
    ]
    right.legend(handles=runs)
