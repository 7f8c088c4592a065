"""The arithmetic of quantization, and the conventions of this project.

Weights are symmetric integers of b bits, `w ~ code * scale`, with codes in [-2^(b-1), 2^(b-1) - 1]. A scale
belongs to one output channel (`PerAxis(0)` in torchao's words), or to one group of consecutive weights of an
output channel, its row flattened (`PerGroup`). A row shorter than the group is one group; if the group does not divide
the row, the last group is shorter. Activations are affine, per tensor, unsigned: `x ~ (code - zero_point) * scale`
with codes in [0, 2^b - 1].

The formulas are torchao's `choose_qparams_affine` (SYMMETRIC_NO_CLIPPING_ERR and ASYMMETRIC) and `quantize_affine`; the
tests compare the two. They are written out here because importing torchao takes longer than a stage's own work.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quantstudy.quantization.saturation import Limit, Pairs, round_pairs

Mode = Literal["none", "static", "dynamic"]
SMALLEST_SCALE = torch.finfo(torch.float32).eps
_CACHED = 2**18
"""This many weights, 1 MiB, stay in a core's caches while a computation goes over them ten times."""


@dataclass(frozen=True)
class Layout:
    """How a weight [O, I, ...] lies in groups: each of its `rows` outputs has `groups` groups of `length` codes.

    If the last group is shorter, `rest` is its length, else 0.
    """

    rows: int
    columns: int
    length: int
    code_bits: int
    scale_bytes: int

    @property
    def groups(self) -> int:
        """The groups of a row; each has a scale."""
        return -(-self.columns // self.length)

    @property
    def rest(self) -> int:
        """Codes in a last group that is not whole, else 0."""
        return self.columns % self.length

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes."""
        return -(-self.rows * self.columns * self.code_bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales."""
        return self.packed_bytes + self.rows * self.groups * self.scale_bytes


@dataclass(frozen=True)
class WeightScheme:
    """Symmetric integer weights of `bits`, one scale per output channel or per `group_size` weights of it.

    `weight_range` minmax takes the smallest scales that clip nothing, mse the scales of the least squared error.
    `limit` keeps 8-bit codes per channel from saturating (`quantization.saturation`). If it limits pairs, the scale of
    the least squared error is chosen among those that clip nothing (minmax) or among all (mse).
    """

    bits: int
    group_size: int | None = None
    weight_range: Literal["minmax", "mse"] = "minmax"
    limit: Limit = "none"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self._code_bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self._code_bits - 1) - 1

    @property
    def _code_bits(self) -> int:
        return min(self.bits, 7) if self.limit == "codes" else self.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32 per channel, bfloat16 per group (16 bits, and no underflow after a BatchNorm fold)."""
        return torch.float32 if self.group_size is None else torch.bfloat16

    def layout(self, shape: torch.Size) -> Layout:
        """Return how a weight of `shape` lies in groups."""
        columns = shape[1:].numel()
        length = min(self.group_size or columns, columns)
        return Layout(shape[0], columns, length, self.bits, self.scale_dtype.itemsize)

    def grouped(self, weight: Tensor) -> Tensor:
        """Reshape [O, ...] to [O, groups, group size], the last group padded with zeros."""
        layout = self.layout(weight.shape)
        rows = weight.flatten(1)
        if layout.rest:
            rows = F.pad(rows, (0, layout.length - layout.rest))
        return rows.view(layout.rows, layout.groups, layout.length)

    def spread(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """Return each weight's own scale, [O, columns], from scales [O, groups]."""
        layout = self.layout(shape)
        return scale.repeat_interleave(layout.length, dim=1)[:, : layout.columns]

    def ungrouped(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Undo `grouped`: [O, groups, group size] to `shape`."""
        rows = groups.flatten(1)
        return rows[:, : shape[1:].numel()].reshape(shape)

    def choose_scale(self, weight: Tensor) -> Tensor:
        """Return the scales: float32 [O, groups], already rounded to their dtype."""
        low, high = torch.aminmax(self.grouped(weight.detach()), dim=2)
        scale = torch.maximum(low / self.lowest, high / self.highest).float()
        if self.weight_range == "mse" or self.limit == "pairs":
            groups = self.grouped(weight.detach().float())
            rows = cached_rows(groups)
            parts = zip(groups.split(rows), scale.split(rows), strict=True)
            scale = torch.cat([self._search_scale(part, largest, weight.shape) for part, largest in parts])
        return self.rounded(scale)

    def rounded(self, scale: Tensor) -> Tensor:
        """Round scales to the type that stores them; none is zero or negative."""
        return scale.clamp_min(SMALLEST_SCALE).to(self.scale_dtype).float()

    def _search_scale(self, groups: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
        """Return each group's scale of the least error, among multiples of the scale that clips nothing.

        If pairs are limited, multiples go from 1 up to 2, the scale of 7 bits, until three in a row improve no group.
        If the range may clip, they also go down to 0.4.
        """
        error = self._error_of(groups, shape)
        best, least, in_vain = largest, error(self.rounded(largest)), 0
        up = torch.linspace(1.0, 2.0, 21).tolist()[1:] if self.limit == "pairs" else []
        down = torch.linspace(1.0, 0.4, 40).tolist()[1:] if self.weight_range == "mse" else []
        for share in [*up, *down]:
            if share > 1 and in_vain == 3:
                continue
            scale = self.rounded(share * largest)
            found = error(scale)
            better = found < least
            in_vain = 0 if bool(better.any()) else in_vain + 1
            best, least = torch.where(better, scale, best), torch.minimum(found, least)
        return best

    def _error_of(self, groups: Tensor, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """Return a function from scales [rows, groups] to each group's squared error, of the same shape."""
        if self.limit == "pairs":
            pairs = Pairs.of(groups.flatten(1), shape)
            return lambda scale: pairs.error(scale).view(scale.shape)

        def error(scale: Tensor) -> Tensor:
            step = scale.unsqueeze(2)
            codes = torch.div(groups, step).round_().clamp_(self.lowest, self.highest)
            return (codes.mul_(step) - groups).square_().sum(2)

        return error

    def quantize(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Round float weights [O, ...] to int8 codes of the same shape; `scale` is float32 [O, groups]."""
        groups = self.grouped(weight.detach().float())
        if self.limit == "pairs":
            rows = cached_rows(groups)
            parts = zip(groups.flatten(1).split(rows), scale.flatten().split(rows), strict=True)
            codes = torch.cat([round_pairs(part, step, weight.shape).to(torch.int8) for part, step in parts])
            return codes.view(weight.shape)
        codes = torch.div(groups, scale.unsqueeze(2))
        return self.ungrouped(codes.round_().clamp_(self.lowest, self.highest).to(torch.int8), weight.shape)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Turn int8 codes [O, ...] into float32 weights of the same shape; `scale` is float32 [O, groups]."""
        return self.ungrouped(self.grouped(codes.float()).mul_(scale.unsqueeze(2)), codes.shape)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize with the straight-through estimator: the gradient passes unchanged.

        The range is the weights' own, so nothing is clipped and the estimator needs no mask. Pairs are not limited:
        searching for scales in each step would take too long, and few codes would change.
        """
        scheme = replace(self, limit="none") if self.limit == "pairs" else self
        result: Tensor = _StraightThrough.apply(weight, scheme)
        return result


def cached_rows(rows: Tensor) -> int:
    """Return how many rows of [R, ...] to compute on at a time: as many as a CPU's cache holds, all elsewhere."""
    return max(1, _CACHED // rows[0].numel()) if rows.device.type == "cpu" else len(rows)


class _StraightThrough(torch.autograd.Function):
    """Round in the forward pass, identity in the backward pass (Bengio et al. 2013)."""

    @staticmethod
    def forward(context: Any, weight: Tensor, scheme: WeightScheme) -> Tensor:
        scale = scheme.choose_scale(weight).unsqueeze(2)
        values = torch.div(scheme.grouped(weight), scale).round_().clamp_(scheme.lowest, scheme.highest).mul_(scale)
        return scheme.ungrouped(values, weight.shape)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True)
class ActivationScheme:
    """Affine unsigned activations of `bits`: not quantized, with a calibrated range, or with the batch's own."""

    mode: Mode = "none"
    bits: int = 32

    @property
    def highest(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    def choose_qparams(self, low: float, high: float) -> tuple[float, int]:
        """Return the scale and the zero point for values in [low, high], extended to hold zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / self.highest, SMALLEST_SCALE)
        return scale, min(max(round(-low / scale), 0), self.highest)
