"""The outlier report: statistics and histograms of every layer's input, from the calibration file.

The clipped methods take their ranges from the same histograms. So a threshold drawn here is the threshold in use.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from quantstudy import layout
from quantstudy.network.checkpoint import load_tensors
from quantstudy.quantization.observers import check_calibration, histogram_percentile
from quantstudy.report.style import BLUE, GREEN, ORANGE, PURPLE, VERMILLION, plot_style, save

DRAWN_BINS = 128
_CLIP_STYLES = ((VERMILLION, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def load_histograms(study: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the statistics of every layer's input, and the number of images; raise `UserError` if they are missing."""
    path = layout.calibration(study)
    calibration = load_tensors(path)
    return check_calibration(calibration, path, study), calibration["images"]


def layer_statistics(layer: Mapping[str, Any], percentiles: Sequence[float]) -> dict[str, Any]:
    """Return the numbers of one layer's input, as plain JSON values.

    `layer` has min, max, mean and std as numbers, `edges` float32 [bins + 1], `counts` [bins]. The result has the four
    numbers, `kurtosis` (of the histogram, 3 for a normal distribution, null for a constant input), and `percentiles`:
    per percentile p the two-sided range `low`, `high` that leaves (100 - p) % of the values out at each end,
    `outlier_fraction` (the share of values outside this range) and `range_ratio` (the whole range divided by this
    range: how much finer the quantization step becomes by clipping there).
    """
    edges, counts = as_array(layer["edges"]), as_array(layer["counts"])
    centers = (edges[:-1] + edges[1:]) / 2
    facts: dict[str, Any] = {key: float(layer[key]) for key in ("min", "max", "mean", "std")}
    facts["kurtosis"] = _kurtosis(centers, counts)
    facts["percentiles"] = {}
    for percentile in percentiles:
        low, high = histogram_percentile(layer["edges"], layer["counts"], percentile)
        facts["percentiles"][f"{percentile:g}"] = {
            "low": low,
            "high": high,
            "outlier_fraction": float(counts[(centers < low) | (centers > high)].sum() / max(counts.sum(), 1.0)),
            "range_ratio": (facts["max"] - facts["min"]) / (high - low) if high > low else None,
        }
    return facts


def histogram_name(layer: str) -> str:
    """Return the file name of a layer's histogram, e.g. `hist_features.18.conv.0.0.png`."""
    return f"hist_{re.sub(r'[^A-Za-z0-9._-]', '_', layer)}.png"


def plot_histograms(folder: Path, layers: Mapping[str, Mapping[str, Any]], percentiles: Sequence[float]) -> None:
    """Draw one PNG per layer into `folder`: the input's histogram and the ranges of `percentiles`."""
    with plot_style():
        figure = Figure(figsize=(7.6, 3.4), dpi=90)
        axes = figure.add_axes((0.12, 0.16, 0.59, 0.72))
        for name, layer in layers.items():
            axes.clear()
            _draw(axes, name, layer, percentiles)
            save(figure, folder / histogram_name(name), dpi=90)


def _draw(axes: Axes, name: str, layer: Mapping[str, Any], percentiles: Sequence[float]) -> None:
    edges, counts = rebin(as_array(layer["edges"]), as_array(layer["counts"]), DRAWN_BINS)
    axes.stairs(counts / max(counts.sum(), 1.0), edges, fill=True, color=BLUE, alpha=0.65, label="values")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    for index, percentile in enumerate(percentiles):
        low, high = histogram_percentile(layer["edges"], layer["counts"], percentile)
        color, line = _CLIP_STYLES[index % len(_CLIP_STYLES)]
        style: Any = {"color": color, "linestyle": line, "linewidth": 1.5}
        axes.axvline(high, label=f"{percentile:g} %: {low:.3g} to {high:.3g}", **style)
        if low > edges[0]:
            axes.axvline(low, **style)
    axes.set_title(f"input of {name}", fontsize=10)
    axes.set_xlabel("activation", fontsize=9)
    axes.set_ylabel("share of the values", fontsize=9)
    axes.tick_params(labelsize=8)
    low, high = float(layer["min"]), float(layer["max"])
    title = f"{low:.3g} to {high:.3g}" + ("\nclipped at" if percentiles else "")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, title=title, title_fontsize=8)
    legend.set_alignment("left")


def rebin(
    edges: NDArray[np.float64], counts: NDArray[np.float64], bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Merge neighbouring bins to about `bins`: more bins than pixels only cost time."""
    step = max(1, len(counts) // bins)
    starts = np.arange(0, len(counts), step)
    return np.append(edges[starts], edges[-1]), np.add.reduceat(counts, starts)


def as_array(tensor: Tensor) -> NDArray[np.float64]:
    """Return a tensor as a float64 array on the CPU."""
    return tensor.detach().cpu().numpy().astype(np.float64)


def _kurtosis(values: NDArray[np.float64], counts: NDArray[np.float64]) -> float | None:
    if np.count_nonzero(counts) < 2:
        return None
    weights = counts / counts.sum()
    deviations = values - (weights * values).sum()
    variance = float((weights * deviations**2).sum())
    return float((weights * deviations**4).sum()) / variance**2
