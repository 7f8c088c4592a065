"""The sensitivity of each layer at each number of bits, as a heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantstudy.report.style import INK, plot_style, save

PANELS = (
    ("sqnr_db", "SQNR of the logits, dB", "cividis", 0),
    ("loss_increase", "increase of the cross-entropy", "cividis_r", 3),
    ("top1_drop", "drop of top-1, points", "cividis_r", 1),
)
"""Column, title, colour map (dark is bad) and decimals of each panel."""
BRIGHTEST_DB = 60.0
"""From this SQNR on, errors are too small to tell apart."""


def plot_sensitivity(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one panel per measure as a PNG, with a line per layer in the order of `rows`, and a column per width.

    `rows` are those of sensitivity.json, with every layer at the same widths.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    widths = sorted({row["bits"] for row in rows})
    with plot_style():
        figure = Figure(figsize=(11, 1.6 + 0.24 * len(layers)), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (column, label, colors, decimals) in zip(panels, PANELS, strict=True):
            at = {(row["layer"], row["bits"]): row[column] for row in rows}
            values = np.array([[at[layer, bits] for bits in widths] for layer in layers])
            _draw(axes, values, colors, decimals, is_loss=column != "sqnr_db")
            axes.set_title(label, fontsize=9)
            axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
            axes.set_xlabel("bits of the one layer")
        panels[0].set_yticks(range(len(layers)), layers, fontsize=8)
        text = f"{title}: one layer quantized, {rows[0]['images']} calibration images"
        figure.suptitle(text, fontsize=11, color=INK)
        save(figure, path)


def _draw(axes: Axes, values: np.ndarray, colors: str, decimals: int, *, is_loss: bool) -> None:
    """Colour the cells and write their values, except losses that round to zero.

    A few layers at few bits lose most. The colours show the root of a loss, which keeps the other layers apart.
    """
    colored = np.sqrt(np.maximum(values, 0.0)) if is_loss else np.minimum(values, BRIGHTEST_DB)
    image = axes.imshow(colored, cmap=colors, aspect="auto", interpolation="nearest")
    axes.grid(False)
    for (row, column), value in np.ndenumerate(values):
        if is_loss and abs(value) < 0.5 * 10.0**-decimals:
            continue
        red, green, blue, _ = image.cmap(image.norm(colored[row, column]))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        shown = f"{round(value, decimals) + 0.0:.{decimals}f}"  # no negative zero
        axes.text(column, row, shown, ha="center", va="center", color=ink, fontsize=7.5)
