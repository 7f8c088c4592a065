"""Int8 weights whose products with uint8 inputs never saturate, not even on x86 CPUs without VNNI.

A CPU without VNNI multiplies by `vpmaddubsw`, which adds the products of two neighbours in int16 and saturates
silently. Inputs go up to 255. Two codes of one sign are exact for all inputs if their sizes add up to at most 128:
255 * 128 < 2**15. Weights of 7 bits (`reduce_range`) achieve this too, but cost every weight one bit, or 6 dB. Few
neighbours, however, are large together and of one sign. So all 8 bits are kept here, and only these pairs are cut, at
the scale of the least squared error. The idea is from accumulator-aware quantization (Colbert, Pappalardo and
Petri-Koenig, *A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance*, ICCV 2023), which bounds the sum
of a whole row. An accumulator of two products leaves far more room.

Neighbours are the input channels 2k and 2k + 1 at the same place of the kernel. oneDNN, which PyTorch and OpenVINO use,
and ONNX Runtime lay out the weights in this way. At least one of them lays out a convolution with an odd number of
input channels differently; codes of layers with an odd number of inputs stay within 7 bits. Depthwise convolutions add
no products in 16 bits.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantstudy.network.graph import out_channels_first

Limit = Literal["none", "pairs", "codes"]
"""What limits the codes: nothing, the sum of two neighbours, or 7 bits each."""
LARGEST_PAIR = 128
"""The largest sum of the sizes of two neighbours of one sign."""
_INT16 = 2**15 - 1
_AT_ONCE = 2**18
"""Codes to check at once, few enough for the cache."""


def limit_of(layer: Any) -> Limit:
    """Return the limit that keeps the 8-bit codes of a layer's weight from saturating."""
    rows, inputs = out_channels_first(layer, layer.weight).shape[:2]
    if getattr(layer, "groups", 1) == rows and inputs == 1:
        return "none"
    return "codes" if inputs % 2 else "pairs"


@dataclass(frozen=True)
class Pairs:
    """The neighbouring weights of rows [R, K], each [R, I / 2, ...]: their sizes, and 1 where both have one sign."""

    first: Tensor
    second: Tensor
    together: Tensor
    largest: tuple[Tensor, Tensor]
    """The largest sizes of both codes: 127 for a positive weight, else 128."""

    @classmethod
    def of(cls, rows: Tensor, shape: torch.Size) -> "Pairs":
        """Split float32 rows [R, K] of a weight of `shape`, [O, I, ...] with I even."""
        first, second = rows.view(len(rows), shape[1] // 2, 2, -1).unbind(2)
        largest = tuple(LARGEST_PAIR - (weight > 0).float() for weight in (first, second))
        return cls(first.abs(), second.abs(), (first * second > 0).float(), largest)  # type: ignore[arg-type]

    def rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sizes of both codes of each pair, at one scale for each row, float32 [R].

        If a pair's sum is too large, each code gives way by half of the excess.
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
    """Round weights to codes of which no two neighbours saturate.

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
    """Return the least and the largest code that a weight may take, given the code of its neighbour."""
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
