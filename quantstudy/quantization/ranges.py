"""The range of an activation quantizer, chosen from the statistics that `observers.collect` records.

- `minmax`: the whole range that calibration saw; `clip_percentile` cuts both ends.
- `moving_average`: the exponential average of each batch's minimum and maximum (Jacob et al. 2018, *Quantization and
  Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, section 3.1).
- `mse`: the range whose grid gives the values the least squared error, clipping included.
- `entropy`: the range whose quantized histogram is nearest to the histogram by Kullback-Leibler divergence (Migacz,
  *8-bit Inference with TensorRT*, GTC 2017). Here grids are affine, and the bins of one code share its mass evenly. The
  bin that holds zero is left out: ReLU fills it, and every grid has an exact zero.

`mse` and `entropy` search one end after the other, twice. Each end goes from 1 to 1/100 of what calibration saw.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from quantstudy.quantization.observers import histogram_percentile
from quantstudy.quantization.schemes import ActivationScheme

ActivationRange = Literal["minmax", "moving_average", "mse", "entropy"]
_SHARES = [share / 100 for share in range(100, 0, -1)]


def activation_range(
    statistics: dict[str, Any],
    scheme: ActivationScheme,
    how: ActivationRange = "minmax",
    percentile: float | None = None,
) -> tuple[float, float]:
    """Return the (low, high) of a layer's input; `percentile` is for `minmax` alone."""
    if how == "moving_average":
        low, high = statistics["moving"]
        return low, high
    if how == "minmax":
        if percentile is None or percentile == 100:
            return statistics["min"], statistics["max"]
        return histogram_percentile(statistics["edges"], statistics["counts"], percentile)
    edges, counts = statistics["edges"].double(), statistics["counts"]
    centers = (edges[1:] + edges[:-1]) / 2
    low, high = statistics["min"], statistics["max"]

    def cost(bounds: tuple[float, float]) -> float:
        return (squared_error if how == "mse" else divergence)(centers, counts, bounds, scheme)

    best = (low, high)
    for _ in range(2):
        best = min(((best[0], share * high) for share in _SHARES), key=cost)
        if low < 0:
            best = min(((share * low, best[1]) for share in _SHARES), key=cost)
    return best


def squared_error(centers: Tensor, counts: Tensor, bounds: tuple[float, float], scheme: ActivationScheme) -> float:
    """Return the mean squared error of values at `centers` [bins], `counts` of them each, on the grid of `bounds`."""
    scale, zero_point = scheme.choose_qparams(*bounds)
    rounded = (_codes(centers, bounds, scheme) - zero_point) * scale
    return float((counts * (rounded - centers).square()).sum() / counts.sum())


def divergence(centers: Tensor, counts: Tensor, bounds: tuple[float, float], scheme: ActivationScheme) -> float:
    """Return KL(P || Q) of a histogram: P has clipped values in its outermost bins, Q is quantized without them."""
    inside = (centers >= min(bounds[0], 0.0)) & (centers <= max(bounds[1], 0.0))
    counts = torch.where(centers.abs() == centers.abs().min(), 0.0, counts)  # zero, which every grid has
    if not counts[inside].any():
        return float("inf")
    codes, kept = _codes(centers, bounds, scheme)[inside].long(), counts[inside]
    p = kept.clone()
    p[0] += counts[centers < min(bounds[0], 0.0)].sum()
    p[-1] += counts[centers > max(bounds[1], 0.0)].sum()
    mass = torch.zeros(scheme.highest + 1, dtype=torch.float64).index_add_(0, codes, kept)
    bins = torch.zeros_like(mass).index_add_(0, codes, (kept > 0).double())
    q = torch.where(kept > 0, (mass / bins.clamp_min(1))[codes], 0.0)
    p, q = p / p.sum(), (q / q.sum()).clamp_min(1e-12)
    return float((p * (p.clamp_min(1e-12) / q).log()).sum())


def _codes(centers: Tensor, bounds: tuple[float, float], scheme: ActivationScheme) -> Tensor:
    scale, zero_point = scheme.choose_qparams(*bounds)
    return (centers / scale).round_().add_(zero_point).clamp_(0, scheme.highest)
