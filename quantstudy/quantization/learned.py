"""LSQ: step sizes that are learned like weights.

Esser, McKinstry, Bablani, Appuswamy and Modha, *Learned Step Size Quantization*, ICLR 2020. With v = x / s, the
gradient of round(clip(v)) s with respect to s is round(v) - v inside the grid, and the grid's end outside (equation 3).
It is multiplied by 1 / sqrt(values * highest code) (section 2.2). Here each output channel or group of weights has a
scale, and so has each tensor of activations, whose zero point stays as calibrated. Unlike the paper, scales start at
the least squared error, not at 2 mean|x| / sqrt(highest code), and a value that rounds to the grid's end counts as
inside.

For activations, PyTorch's own learnable fake quantization takes one pass over the data in each direction. For weights
with a scale per row, it takes several times as long on a CPU as `_LearnedStep`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.quantization.schemes import SMALLEST_SCALE, WeightScheme


class LearnedWeight(nn.Module):
    """A weight quantizer with learned scales, float32 [O * groups]."""

    def __init__(self, weight: Tensor, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.scale = nn.Parameter(scheme.choose_scale(weight).flatten())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, in the shape of `weight`."""
        per_channel = self.scheme.group_size is None
        rows = weight if per_channel else self.scheme.grouped(weight).flatten(0, 1)
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        rounded: Tensor = _LearnedStep.apply(rows, scale, self.scheme.lowest, self.scheme.highest)
        return rounded if per_channel else self.scheme.ungrouped(rounded.unflatten(0, (len(weight), -1)), weight.shape)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 codes and the scales [O, groups]."""
        scale = self.scheme.rounded(self.scale.detach().view(len(weight), -1))
        return self.scheme.quantize(weight, scale), scale


class _LearnedStep(torch.autograd.Function):
    """Round rows [R, ...] to codes of the grid, times their scales [R].

    The gradient with respect to a scale is the one above. With respect to a weight it passes unchanged inside the grid,
    and is 0 outside.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
        context.save_for_backward(rows, scale)
        context.grid = lowest, highest
        step = _steps(rows, scale)
        return torch.div(rows, step).round_().clamp_(lowest, highest).mul_(step)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        rows, scale = context.saved_tensors
        (lowest, highest), upstream = context.grid, gradients[0]
        v = rows / _steps(rows, scale)
        rounded = v.round()
        code = rounded.clamp(lowest, highest)
        inside = rounded.eq_(code)
        by_scale = code.sub_(v.mul_(inside)).mul_(upstream).sum(tuple(range(1, v.ndim)))
        return upstream * inside, by_scale / math.sqrt(rows[0].numel() * highest), None, None


def _steps(rows: Tensor, scale: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (rows.ndim - 1))


class LearnedActivation(nn.Module):
    """The scale of an activation quantizer, learned; its zero point is a fixed code.

    With `drop` above 0 each value stays as it is with that probability (Wei, Gong, Li, Liu and Yu, *QDrop: Randomly
    Dropping Quantization for Extremely Low-bit Post-Training Quantization*, ICLR 2022, section 4.3).
    """

    def __init__(self, scale: float, zero_point: int, highest: int, drop: float = 0.0) -> None:
        super().__init__()
        self.highest, self.drop = highest, drop
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.register_buffer("zero_point", torch.tensor([float(zero_point)]))
        self.zero_point: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the grid, in its dtype and memory format."""
        factor = 1 / math.sqrt(x[0].numel() * self.highest)
        scale = self.scale.clamp_min(SMALLEST_SCALE)
        rounded: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            x, scale, self.zero_point, 0, self.highest, factor
        )
        return torch.where(torch.rand_like(x) < self.drop, x, rounded) if self.drop else rounded
