"""Linear layers that read low-bit weights and multiply in bfloat16: for when reading the weights is what takes time.

On a CPU PyTorch's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` widen the codes in registers, on CUDA
tinygemm (`_weight_int4pack_mm`) and the kernel of `triton_int8`. The input is rounded to bfloat16, sums are float32,
the output of PyTorch's kernels is rounded to bfloat16 again. At batch 1 VGG-11's first linear layer took a third of
bfloat16's time on a CPU with 8-bit weights, and less than two thirds with 4-bit ones; with a float32 input both kernels
are several times slower than a float32 product, so that the input is rounded. On a CPU without AVX512 kernels of this
project (`avx2`) multiply in float32 and round nothing. Scales of channels stay float32, outside PyTorch's kernels;
scales of groups are bfloat16 in the file already.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import cpu_flags
from quantstudy.quantization.layers import QuantLinear, put_layers, quantized_layers
from quantstudy.runtimes import avx2

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
    if not _has_kernels(device.type, scheme.bits):
        return False
    if scheme.bits == 8:
        return scheme.group_size is None
    if scheme.bits != 4 or scheme.group_size not in INT4_GROUPS or outputs % _INT4_OUTPUTS[device.type]:
        return False
    return inputs % scheme.group_size == 0


@functools.cache
def _has_kernels(device: str, bits: int) -> bool:
    if device == "cpu":
        return "avx512f" in cpu_flags() or avx2.compiled()
    if device != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    return bits != 8 or importlib.util.find_spec("triton") is not None


def input_bits(device: torch.device) -> int:
    """Return the bits of the float type that the kernels on `device` multiply in."""
    return 32 if device.type == "cpu" and "avx512f" not in cpu_flags() else 16


class WeightOnlyLinear(nn.Module):
    """A frozen `QuantLinear` whose input is not quantized: [..., in_features] to [..., out_features], any float."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.bits, self.group_size = layer.scheme.weight.bits, layer.scheme.weight.group_size
        self._bias: Any = None if layer.bias is None else layer.bias.detach().float()
        codes = layer.weight_codes()
        self._product: avx2.FloatProduct | None = None
        if input_bits(codes.device) == 32:
            scale = layer.weight_scale.float().view(len(codes), -1)
            self._product = avx2.FloatProduct(codes, scale, self.bits)
            self._bias = torch.zeros(len(codes)) if self._bias is None else self._bias.contiguous()
            return
        if self.bits == 8:
            self._weight, self._scale = codes, layer.weight_scale.flatten().float()
            self._ones = torch.ones(len(codes), dtype=torch.bfloat16, device=codes.device)
            return
        if codes.is_cuda:
            self._weight = _packed_for_tinygemm(codes)
        else:
            self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
        scale = layer.weight_scale.t().to(torch.bfloat16)  # [groups, out_features]
        self._scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the packed weight."""
        if self._product is not None:
            y = self._product(x.reshape(-1, x.shape[-1]).float().contiguous(), self._bias)
            return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
        y = self._multiply(x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous())
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.bits == 4:
            ops = torch.ops.aten
            multiply = ops._weight_int4pack_mm if rows.is_cuda else ops._weight_int4pack_mm_for_cpu
            return multiply(rows, self._weight, self.group_size, self._scale).float()  # type: ignore[no-any-return]
        if rows.is_cuda:
            from quantstudy.runtimes.triton_int8 import weight_int8_matmul

            return weight_int8_matmul(rows, self._weight, self._scale)
        return torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._ones).float().mul_(self._scale)

    def extra_repr(self) -> str:
        """Show the width in `print(model)`."""
        return f"bits={self.bits}, group_size={self.group_size}"


def _packed_for_tinygemm(codes: Tensor) -> Tensor:
    """Pack int8 codes [O, I] of 4 bits: two unsigned ones a byte, the first in the upper half, then in its tiles."""
    unsigned = (codes + 8).to(torch.uint8)
    pairs = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
    tiles = next(tiles for tiles in _CUDA_TILES if codes.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


def use_weight_only_kernels(network: nn.Module, device: torch.device) -> None:
    """Put a `WeightOnlyLinear` in the place of each layer of `network` that can become one."""
    layers = quantized_layers(network).items()
    put_layers(network, {name: WeightOnlyLinear(layer) for name, layer in layers if has_kernel(layer, device)})
