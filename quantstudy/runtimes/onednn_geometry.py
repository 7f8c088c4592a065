"""Convolution geometry for oneDNN's int8 operator, and the cases it gets wrong (oneDNN 3.12, torch 2.14).

They were found by comparing random geometries with float64 sums, and are handled outside the operator:
a window that lies in the padding altogether (`split_padding`), and a stride that differs by direction where one
channel feeds several (`stride_to_thin`).
"""

from collections.abc import Sequence

from torch import Tensor


def as_pair(value: int | Sequence[int]) -> list[int]:
    """Return (height, width) of a geometry number, given once for both or as a pair."""
    return [value, value] if isinstance(value, int) else list(value)


def stride_to_thin(weight_codes: Tensor, stride: list[int], groups: int) -> list[int] | None:
    """Return the stride to take after a convolution of stride 1, where oneDNN 3.12 gets the stride wrong.

    Seen where one input channel feeds several output channels and the output is one column: with a stride of
    (1, 2) it returns wrong sums, with (2, 2) right ones.
    """
    several = weight_codes.shape[1] == 1 and weight_codes.shape[0] > groups
    return stride if several and stride[0] != stride[1] else None


def split_padding(
    padding: int | Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the padding (height, width) that the kernel adds, and (left, right, top, bottom) to add before it.

    oneDNN pads both sides alike, which "same" does not for an even kernel; and where a window lies in the padding
    altogether it returns wrong sums or crashes (oneDNN 3.12).
    """
    if padding == "valid":
        return [0, 0], [0, 0, 0, 0]
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if padding == "same":
        return [total // 2 for total in reach], [0, reach[1] % 2, 0, reach[0] % 2]
    assert not isinstance(padding, str), padding
    high, wide = as_pair(padding)
    if high > reach[0] or wide > reach[1]:
        return [0, 0], [wide, wide, high, high]
    return [high, wide], [0, 0, 0, 0]
