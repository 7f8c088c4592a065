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

from typing import Literal

import torch
from torch import Tensor, nn

Limit = Literal["none", "pairs", "codes"]
"""What codes are held to: nothing, the sum of two neighbours, or 7 bits each."""
LARGEST_PAIR = 128
"""What two neighbours of one sign may add up to."""
_INT16 = 2**15 - 1


def limit_of(layer: nn.Conv2d | nn.Linear) -> Limit:
    """Return what keeps 8-bit codes of a layer's weight from saturating."""
    rows, inputs = layer.weight.shape[:2]
    if getattr(layer, "groups", 1) == rows and inputs == 1:
        return "none"
    return "codes" if inputs % 2 else "pairs"


def round_pairs(values: Tensor, shape: torch.Size) -> Tensor:
    """Round weights over their scale to codes, of which two neighbours never saturate.

    Where both together are too large, each gives way by half of what is too much.

    Args:
        values: float32 [R, K], rows of weights over their scale, from -128 to 127.
        shape: of the whole weight, [O, I, ...], with I even; K = I * ...

    Returns:
        The codes, float32 [R, K].
    """
    pairs = values.view(len(values), shape[1] // 2, 2, -1)
    signs, sizes = pairs.sign(), pairs.abs()
    together = signs[:, :, :1] * signs[:, :, 1:] > 0
    excess = sizes.sum(2, keepdim=True).sub_(LARGEST_PAIR).clamp_min_(0.0).mul_(together)
    first = sizes[:, :, :1].sub(excess, alpha=0.5).round_()
    room = torch.where(together, LARGEST_PAIR - first, float(LARGEST_PAIR))
    second = torch.minimum(sizes[:, :, 1:].round_(), room)
    codes = torch.cat([first, second], dim=2).mul_(signs).clamp_max_(LARGEST_PAIR - 1)
    return codes.view(values.shape)


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
    pairs = codes.view(codes.shape[0], codes.shape[1] // 2, 2, -1)
    first, second = pairs[:, :, 0].to(torch.int16), pairs[:, :, 1].to(torch.int16)
    above = int((first.clamp_min(0) + second.clamp_min(0)).max())
    below = -int((first.clamp_max(0) + second.clamp_max(0)).min())
    return max(above, below) * highest > _INT16
