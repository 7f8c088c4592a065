"""Linear layers that read low-bit weights and multiply in bfloat16: for when reading the weights is what takes time.

On a CPU with AVX512 PyTorch's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` widen the codes in registers, on
CUDA tinygemm (`_weight_int4pack_mm`) does so with 4 bits. The input is rounded to bfloat16, sums are float32, the
output is rounded to bfloat16 again. Scales of channels stay float32, outside the kernels; scales of groups are bfloat16
in the file already. Elsewhere, on a CPU without AVX512 for one, such layers are simulated.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import cpu_flags
from quantstudy.quantization.layers import QuantLinear, put_layers, quantized_layers

INT4_GROUPS = (32, 64, 128, 256)
_INT4_OUTPUTS = {"cpu": 16, "cuda": 8}
"""The kernels want a multiple of these."""
_CUDA_TILES = (8, 4, 2)
"""Tinygemm reads rows in tiles of 16 codes, so many at a time."""


def has_kernel(layer: Any, device: torch.device) -> bool:
    """Whether a frozen layer can become a `WeightOnlyLinear` on `device`: a linear one of 8 bits, or 4 in groups."""
    if not isinstance(layer, QuantLinear) or layer.scheme.activation.mode != "none":
        return False
    scheme, (outputs, inputs) = layer.scheme.weight, layer.shape
    if scheme.bits not in (4, 8) or not _has_kernels(device.type, scheme.bits):
        return False
    if scheme.bits == 8:
        return scheme.group_size is None
    fits = outputs % _INT4_OUTPUTS[device.type] == 0 and scheme.group_size in INT4_GROUPS
    return fits and inputs % scheme.group_size == 0


@functools.cache
def _has_kernels(device: str, bits: int) -> bool:
    if device == "cpu":
        return "avx512f" in cpu_flags()
    return device == "cuda" and bits == 4 and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class WeightOnlyLinear(nn.Module):
    """A frozen `QuantLinear` whose input is not quantized: [..., in_features] to [..., out_features], any float."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.bits, self.group_size = layer.scheme.weight.bits, layer.scheme.weight.group_size
        self._bias: Any = None if layer.bias is None else layer.bias.detach().float()
        codes = layer.weight_codes()
        if self.bits == 8:
            self._weight, self._scale = codes, layer.weight_scale.flatten().float()
            self._ones = torch.ones(len(codes), dtype=torch.bfloat16, device=codes.device)
            return
        if codes.is_cuda:  # two unsigned codes a byte, the first in the upper half, then in the kernel's tiles
            unsigned = (codes + 8).to(torch.uint8)
            pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()
            tiles = next(tiles for tiles in _CUDA_TILES if codes.shape[1] % (16 * tiles) == 0)
            self._weight = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        else:
            self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
        scale = layer.weight_scale.t().to(torch.bfloat16)  # [groups, out_features]
        self._scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the packed weight."""
        y = self._multiply(x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous())
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.bits == 4:
            ops = torch.ops.aten
            multiply = ops._weight_int4pack_mm if rows.is_cuda else ops._weight_int4pack_mm_for_cpu
            return multiply(rows, self._weight, self.group_size, self._scale).float()  # type: ignore[no-any-return]
        return torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._ones).float().mul_(self._scale)


def use_weight_only_kernels(network: nn.Module, device: torch.device) -> None:
    """Put a `WeightOnlyLinear` in the place of each layer of `network` that can become one."""
    layers = quantized_layers(network).items()
    put_layers(network, {name: WeightOnlyLinear(layer) for name, layer in layers if has_kernel(layer, device)})
