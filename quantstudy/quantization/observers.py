"""Calibration: the range and the histogram of every quantizable layer's input.

Two passes over the same few batches: the first finds each layer's minimum and maximum, the second fills a
histogram of fixed bins between them, so nothing is approximated by merging. Every way of choosing a range
(`quantization.ranges`) and the outlier report read the same histograms.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.network.graph import LAYERS

QUANTIZABLE = LAYERS
AVERAGING = 0.1
"""The weight of a new batch in the moving averages; it is large, because calibration has few batches."""


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every convolution and linear layer by name, in the order of the model's definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    bins: int,
    layers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Return the input statistics of every quantizable layer of `model`, or of `layers`, over `batches`.

    The result is `{"images": int, "layers": {name: statistics}}`, the layers in the order in which they run. A layer's
    statistics are the floats min, max, mean and std, `moving` (the exponential averages of the batches' minima and
    maxima), `edges` (float32 [bins + 1]) and `counts` (float64 [bins]).
    """
    images = [images for images, _ in batches]
    layers = quantizable_layers(model) if layers is None else layers
    extremes: dict[str, list[float]] = {}
    moving: dict[str, list[float]] = {}
    sums: dict[str, Tensor] = {}

    def watch_range(name: str, value: Tensor) -> None:
        low, high = (float(bound) for bound in torch.aminmax(value.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"calibration: the input of {name} is not finite (NaN or infinite): {low} to {high}")
        seen = extremes.setdefault(name, [low, high])
        extremes[name] = [min(seen[0], low), max(seen[1], high)]
        pairs = zip(moving.setdefault(name, [low, high]), (low, high), strict=True)
        moving[name] = [before + AVERAGING * (now - before) for before, now in pairs]
        squares = torch.stack([part.double().square().sum() for part in value.split(8)]).sum()  # without a whole copy
        moments = torch.stack([value.sum().double(), squares]).cpu()
        found = torch.cat([torch.tensor([value.numel()], dtype=torch.float64), moments])
        sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + found

    counts: dict[str, Tensor] = {}

    def watch_histogram(name: str, value: Tensor) -> None:
        low, high = _span(*extremes[name])
        found = torch.histc(value.detach().float(), bins, low, high).double().cpu()
        counts[name] = counts.get(name, torch.zeros(bins, dtype=torch.float64)) + found

    for watch in (watch_range, watch_histogram):
        run_watched(model, layers, images, watch)
    return {
        "images": sum(len(batch) for batch in images),
        "layers": {
            name: _statistics(extremes[name], sums[name], counts[name]) | {"moving": moving[name]} for name in counts
        },
    }


def check_calibration(calibration: Any, path: Path, study: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the layers of a calibration file; raise `UserError` if it is of another study, or not finite."""
    layers = calibration.get("layers") if isinstance(calibration, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise UserError(f"{path}: not a calibration file; run calibrate again")
    if (found := calibration.get("study", study)) != study:
        raise UserError(f"{path}: of the study {found!r}, not {study!r}; run calibrate again")
    for name, statistics in layers.items():
        for key, value in statistics.items():
            if not torch.as_tensor(value).isfinite().all():
                raise UserError(f"{path}: {key} of the input of {name} is not finite; run calibrate again")
    return layers


def run_watched(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Iterable[Tensor], watch: Callable[[str, Tensor], None]
) -> None:
    """Run `model` on batches of images; call `watch` with the name and the input of each of `layers` that runs."""
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            watching = functools.partial(_watched, name, watch)
            hooks.enter_context(layer.register_forward_pre_hook(watching, with_kwargs=True))
        for batch in images:
            model(batch.clone())  # a network may write to its input


def _watched(name: str, watch: Callable[[str, Tensor], None], layer: nn.Module, inputs: Any, keywords: Any) -> None:
    watch(name, inputs[0] if inputs else keywords["input"])


def _span(low: float, high: float) -> tuple[float, float]:
    """The histogram's first and last edge; a constant input still gets a span."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _statistics(extremes: list[float], sums: Tensor, counts: Tensor) -> dict[str, Any]:
    count, total, squares = (float(value) for value in sums)
    mean = total / count
    low, high = _span(*extremes)
    return {
        "min": extremes[0],
        "max": extremes[1],
        "mean": mean,
        "std": max(squares / count - mean * mean, 0.0) ** 0.5,
        "edges": torch.linspace(low, high, len(counts) + 1, dtype=torch.float32),
        "counts": counts,
    }


def histogram_percentile(edges: Tensor, counts: Tensor, percentile: float) -> tuple[float, float]:
    """Return the range (low, high) that keeps all but (100 - percentile) % of the values at each end.

    The bounds are bin edges: the smallest edge with at least `percentile` % of the values below it, and the
    largest with at least that share above it. `edges` is [bins + 1], `counts` [bins].
    """
    below = np.cumsum(counts.numpy())
    needed = percentile / 100 * below[-1] * (1 - 1e-12)
    upper = int(np.searchsorted(below, needed))
    above = np.cumsum(counts.numpy()[::-1])
    lower = len(counts) - 1 - int(np.searchsorted(above, needed))
    return float(edges[lower]), float(edges[upper + 1])
