"""Unsigned 8-bit codes of activations, made fast in eager mode: quantize, find a range, pool.

- `torch.quantize_per_tensor` is the only eager operator that quantizes in a single pass. Its bytes are viewed as
  uint8; `int_repr()` would copy them.
- `torch.aminmax` is slow on a channels_last tensor, and fast on the same memory seen as one row.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy.quantization.schemes import SMALLEST_SCALE
from quantstudy.runtimes.onednn_geometry import as_pair

_SMALLEST_SCALE = np.float32(SMALLEST_SCALE)


def quantize_to_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return uint8 codes clamp(round(x * (1 / scale)) + zero_point, 0, 255), in the shape of `x`.

    The codes have the strides of `x`, unless `x` is a single image whose strides fit no batch. `x` is float32; rounding
    is half to even. Values beyond 2^31 steps (infinity) give a wrong code.
    """
    quantized = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    storage: Any = quantized.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, quantized.shape, quantized.stride())


def choose_dynamic_qparams(x: Tensor, highest: int = 255) -> tuple[float, int]:
    """Return the scale and the zero point for float32 `x`, whose range is widened to contain zero.

    The arithmetic is float32: scale = max((high - low) / highest, eps), zero_point = round(-low / scale). Values
    that are not finite give a scale of NaN, and so sums of NaN.
    """
    row = x.permute(0, 2, 3, 1).reshape(-1) if x.ndim == 4 else x.reshape(-1)
    least, most = (value.item() for value in torch.aminmax(row))
    if not math.isfinite(most - least):
        return math.nan, 0
    low, high = np.float32(min(least, 0.0)), np.float32(max(most, 0.0))
    scale = max((high - low) / np.float32(highest), _SMALLEST_SCALE)
    return float(scale), int(min(max(np.rint(-low / scale), 0), highest))


class CodeMaxPool2d(nn.Module):
    """`pool` for float32 or for uint8 codes, channels_last. Torch's own operator refuses most sizes of uint8 images.

    Codes keep the order of values, so the maximum of the codes is the code of the maximum.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool
        self._geometry = [as_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]

    def forward(self, x: Tensor) -> Tensor:
        """Pool [N, C, H, W]."""
        if x.dtype != torch.uint8:
            return self.pool(x)
        return torch.ops.quantized.max_pool2d(x, *self._geometry, self.pool.ceil_mode)
