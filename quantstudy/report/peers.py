"""The table and the plot of `benchmarks/peers.py`: models of this project and of other tools."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from quantstudy.report.markdown import markdown_table, number
from quantstudy.report.style import BLUE, GREY, ORANGE, plot_style, save

_WHAT = ("tool", "method", "runtime")
RECORD_KEYS = (*_WHAT, "top1", "images", "size_mb", "quantize_s", "latency_ms_b1", "latency_ms_b16")
OWN = "quantstudy"
_HEADER = ("tool", "method", "runtime", "top-1 %", "size MB", "quantized in s", "ms, batch 1", "ms, batch 16")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows, dictionaries with `RECORD_KEYS`, as a Markdown table.

    The fastest at batch 16 come first. Rows that were not timed (None, as for a simulation) follow, the most accurate
    first.
    """
    cells = []
    for row in _sorted(rows):
        numbers = (f"{row['top1']:.1f}", number(row["size_mb"], 2), f"{row['quantize_s']:.1f}")
        latency = (number(row["latency_ms_b1"], 2), number(row["latency_ms_b16"], 1))
        cells.append((*(row[key] for key in _WHAT), *numbers, *latency))
    return markdown_table([_HEADER, *cells], words=3)


def plot_peers(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the latency of every timed row at batch 1 and 16 as bars, each with its accuracy."""
    rows = [row for row in _sorted(rows) if row["latency_ms_b16"] is not None][::-1]
    names = [f"{row['tool']} {row['method']}, {row['runtime']}" for row in rows]
    with plot_style():
        figure = Figure(figsize=(12, 1.6 + 0.34 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, batch in ((left, 1), (right, 16)):
            times = [row[f"latency_ms_b{batch}"] for row in rows]
            colours = [GREY if row["method"] == "fp32" else BLUE if row["tool"] == OWN else ORANGE for row in rows]
            axes.barh(names, times, color=colours)
            for place, (row, value) in enumerate(zip(rows, times, strict=True)):
                text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
                text += f" ms, {row['top1']:.1f} %"
                axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center")
            axes.set(xlim=(0, 1.6 * max(times)), ylim=(-0.7, len(rows) - 0.3))
            axes.set_xlabel(f"latency of a batch of {batch}, ms, and top-1")
            axes.grid(axis="y", visible=False)
        figure.suptitle(f"{title}: this project blue, other tools orange, fp32 grey", x=0.01, ha="left", weight="bold")
        save(figure, path)


def _sorted(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["latency_ms_b16"] or math.inf, -row["top1"]))
