"""Int8 weights whose products with uint8 inputs never saturate, on x86 CPUs without VNNI either.

Such a CPU multiplies by `vpmaddubsw`, which adds the products of two neighbours in int16 and saturates in silence. With
inputs up to 255, two codes of one sign that add up to 128 at most are exact whatever the inputs: 255 * 128 < 2**15.
Weights of 7 bits (`reduce_range`) are a way to get that, at the price of a bit, 6 dB, in every weight. Yet few
neighbours are large together and of one sign. So here all 8 bits are kept, and only such pairs are cut, at the scale
of the least squared error. It is the idea of accumulator-aware quantization (Colbert, Pappalardo and Petri-Koenig,
*A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance*, ICCV 2023), which bounds what a whole row may
add up to; an accumulator of two products leaves far more room.

Neighbours are the input channels 2k and 2k + 1 at the same place of the kernel: oneDNN, which PyTorch and OpenVINO
multiply with, and ONNX Runtime lay out the weights so. A convolution with an odd number of input channels is laid out
otherwise, by one of them at least; its codes stay within 7 bits. Depthwise convolutions add no products in 16 bits.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantstudy.network.graph import out_channels_first

Limit = Literal["none", "pairs", "codes"]
"""What codes are held to: nothing, the sum of two neighbours, or 7 bits each."""
LARGEST_PAIR = 128
"""What two neighbours of one sign may add up to."""
_INT16 = 2**15 - 1
_AT_ONCE = 2**18
"""Codes that are looked at while they are in the cache."""


def limit_of(layer: Any) -> Limit:
    """Return what keeps 8-bit codes of a layer's weight from saturating."""
    rows, inputs = out_channels_first(layer, layer.weight).shape[:2]
    if getattr(layer, "groups", 1) == rows and inputs == 1:
        return "none"
    return "codes" if inputs % 2 else "pairs"


@dataclass(frozen=True)
class Pairs:
    """Neighbouring weights of some rows [R, K], each [R, I / 2, ...]: their sizes, and 1 where they have one sign."""

    first: Tensor
    second: Tensor
    together: Tensor
    largest: tuple[Tensor, Tensor]
    """The sizes that the codes of both may have: 127 of a positive one, 128 of a negative."""

    @classmethod
    def of(cls, rows: Tensor, shape: torch.Size) -> "Pairs":
        """Split float32 rows [R, K] of a weight of `shape`, [O, I, ...] with I even."""
        first, second = rows.view(len(rows), shape[1] // 2, 2, -1).unbind(2)
        largest = tuple(LARGEST_PAIR - (weight > 0).float() for weight in (first, second))
        return cls(first.abs(), second.abs(), (first * second > 0).float(), largest)  # type: ignore[arg-type]

    def rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sizes of the codes at a scale for each row, float32 [R].

        Where both together are too large, each gives way by half of what is too much.
        """
        inverse = (1 / scale).view(-1, 1, 1)
        sizes = zip((self.first, self.second), self.largest, strict=True)
        first, second = (torch.minimum(size * inverse, largest) for size, largest in sizes)
        excess = (first + second).sub_(LARGEST_PAIR).clamp_min_(0.0).mul_(self.together)
        first.sub_(excess, alpha=0.5).round_()
        room = (first * self.together).neg_().add_(LARGEST_PAIR)
        return first, second.round_().minimum(room)

    def error(self, scale: Tensor) -> Tensor:
        """Return the squared error of each row's weights at its scale, float32 [R]."""
        step = scale.view(-1, 1, 1)
        rounded = zip(self.rounded(scale), (self.first, self.second), strict=True)
        parts = [codes.mul_(step).sub_(sizes).square_().flatten(1).sum(1) for codes, sizes in rounded]
        return parts[0] + parts[1]


def round_pairs(rows: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """Round weights to codes of which two neighbours never saturate.

    Args:
        rows: float32 [R, K], of a weight of `shape`.
        scale: float32 [R].
        shape: [O, I, ...] with I even; K = I * ...

    Returns:
        The codes, float32 [R, K], from -128 to 127.
    """
    sizes = torch.stack(Pairs.of(rows, shape).rounded(scale), dim=2)
    return sizes.view(rows.shape).mul_(rows.sign())


def bounds_beside(neighbour: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest code that a weight may take beside the code of its neighbour."""
    low, high = neighbour.clamp_max(0).add(LARGEST_PAIR).neg_(), (LARGEST_PAIR - neighbour.clamp_min(0))
    return low, high.clamp_max_(LARGEST_PAIR - 1)


def may_saturate(codes: Tensor, groups: int = 1, highest: int = 255) -> bool:
    """Whether products of int8 codes [O, I, ...] with inputs from 0 to `highest` may saturate when two are added."""
    largest = max(int(codes.max()), -int(codes.min()))
    if 2 * largest * highest <= _INT16 or (groups == codes.shape[0] and codes.shape[1] == 1):
        return False
    if codes.shape[1] % 2:
        return True
    parts = codes.split(max(1, _AT_ONCE // codes[0].numel()))
    return any(_largest_pair(part) * highest > _INT16 for part in parts)


def _largest_pair(codes: Tensor) -> int:
    pairs = codes.view(codes.shape[0], codes.shape[1] // 2, 2, -1)
    first, second = pairs[:, :, 0].to(torch.int16), pairs[:, :, 1].to(torch.int16)
    above = (first.clamp_min(0) + second.clamp_min(0)).max()
    return max(int(above), -int((first.clamp_max(0) + second.clamp_max(0)).min()))
