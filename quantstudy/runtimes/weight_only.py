"""Linear layers that read low-bit weights and multiply in bfloat16, on a CPU: for when reading them is what takes time.

PyTorch's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` widen the codes in registers. The input is rounded to
bfloat16, sums are float32, the output is rounded to bfloat16 again. At batch 1 VGG-11's first linear layer took a third
of bfloat16's time with 8-bit weights, and less than two thirds with 4-bit ones; with a float32 input both kernels are
several times slower than a float32 product, so that the input is rounded. Scales of channels stay float32, outside the
kernel; scales of groups are bfloat16 in the file already.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import cpu_flags
from quantstudy.quantization.layers import QuantLinear, put_layers, quantized_layers

INT4_GROUPS = (32, 64, 128, 256)
_INT4_OUTPUTS = 16


def has_kernel(layer: Any, device: torch.device) -> bool:
    """Whether a frozen layer can become a `WeightOnlyLinear` on `device`: a linear one of 8 bits, or 4 in groups."""
    if device.type != "cpu" or "avx512f" not in cpu_flags() or not isinstance(layer, QuantLinear):
        return False
    scheme = layer.scheme.weight
    if layer.scheme.activation.mode != "none":
        return False
    if scheme.bits == 8:
        return scheme.group_size is None
    outputs, inputs = layer.shape
    groups = scheme.bits == 4 and scheme.group_size in INT4_GROUPS
    return groups and inputs % (scheme.group_size or 1) == 0 and outputs % _INT4_OUTPUTS == 0


class WeightOnlyLinear(nn.Module):
    """A frozen `QuantLinear` whose input is not quantized: [..., in_features] to [..., out_features], any float."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.bits, self.group_size = layer.scheme.weight.bits, layer.scheme.weight.group_size
        self._bias = None if layer.bias is None else layer.bias.detach().float()
        codes = layer.weight_codes()
        if self.bits == 8:
            self._weight, self._scale = codes, layer.weight_scale.flatten().float()
            self._ones = torch.ones(len(codes), dtype=torch.bfloat16)
            return
        unsigned = codes.to(torch.int32) + 8
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        scale = layer.weight_scale.t().to(torch.bfloat16)  # [groups, out_features]
        self._scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply with the packed weight."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if self.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(rows, self._weight, self._ones).float().mul_(self._scale)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._weight, self.group_size, self._scale).float()
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        """Show the width in `print(model)`."""
        return f"bits={self.bits}, group_size={self.group_size}"


def use_weight_only_kernels(network: nn.Module, device: torch.device) -> None:
    """Put a `WeightOnlyLinear` in the place of each layer of `network` that can become one."""
    layers = quantized_layers(network).items()
    put_layers(network, {name: WeightOnlyLinear(layer) for name, layer in layers if has_kernel(layer, device)})
