"""What all plots share: colours, sizes, and files with the same bytes for the same numbers.

The colours are Okabe and Ito's (*Color Universal Design*, 2008): readers with the common kinds of colour blindness can
tell them apart. Every series also has its own marker, so colour alone never carries a meaning.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quantstudy.files import atomic

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, INK = "#8A8A8A", "#333333"

FAMILIES: dict[str, tuple[str, str]] = {
    "fp32": ("*", BLACK),
    "16-bit float": ("o", SKY),
    "INT8": ("s", BLUE),
    "INT8 clipped": ("P", GREEN),
    "uniform INT4": ("D", VERMILLION),
    "INT4 clipped": ("X", PURPLE),
    "mixed": ("^", ORANGE),
    "other": ("h", GREY),
}
"""Marker and colour of each family of variants."""

OUTLINED = [withStroke(linewidth=2.5, foreground="white")]
"""The effects that keep a text readable over lines."""

_RC: Any = {
    "figure.dpi": 120,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "path.simplify": True,
    "figure.constrained_layout.h_pad": 0.1,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in the style of the report, whatever matplotlibrc says; restore matplotlib's settings afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write `figure` as a PNG, atomically and without the software's name: equal plots give equal files."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def log_axis(axes: Axes, subs: Sequence[float]) -> None:
    """Make the x-axis logarithmic, with ticks at `subs` times the powers of ten, written in full."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
