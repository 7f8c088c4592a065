"""Convolution geometry for oneDNN's int8 operator, and the cases it gets wrong (oneDNN 3.12, torch 2.14).

The wrong cases were found by comparing random geometries with float64 sums. A convolution with such a geometry is
simulated instead.
"""

from collections.abc import Sequence
from typing import Any

import torch


def as_pair(value: int | Sequence[int]) -> list[int]:
    """Return (height, width) of a geometry number, given once for both or as a pair."""
    return [value, value] if isinstance(value, int) else list(value)


def padding_of(padding: int | Sequence[int] | str, reach: Sequence[int]) -> list[int]:
    """Return the padding (height, width) of a convolution; `padding` may also be `same` or `valid`.

    `reach` is dilation * (kernel size - 1). The operator pads both sides alike.
    """
    if isinstance(padding, str):
        return [side // 2 if padding == "same" else 0 for side in reach]
    return as_pair(padding)


def is_right(shape: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether the operator is right for a convolution with a weight of `shape` [O, I / groups, kH, kW].

    It is wrong in three cases. The padding differs by side, as `same` does for an even kernel. A window lies entirely
    in the padding (wrong sums, or a crash). One input channel feeds several output channels at a stride that differs by
    direction: with (1, 2), sums are wrong if the output is one column wide.
    """
    reach = [step * (size - 1) for step, size in zip(as_pair(dilation), shape[2:], strict=True)]
    if padding == "same" and any(side % 2 for side in reach):
        return False
    if any(pad > side for pad, side in zip(padding_of(padding, reach), reach, strict=True)):
        return False
    high, wide = as_pair(stride)
    return high == wide or shape[1] > 1 or shape[0] == groups
