"""Linear layers that read 4-bit weights and multiply in bfloat16. They help when reading the weights takes the time.

On CUDA, PyTorch's tinygemm (`_weight_int4pack_mm`) widens the codes in registers. The input is rounded to bfloat16,
sums are float32, and the output is rounded to bfloat16 again. Group scales are already bfloat16 in the file. Elsewhere
such layers are simulated.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.network.graph import put
from quantstudy.quantization.layers import QuantLinear, quantized_layers

INT4_GROUPS = (32, 64, 128, 256)
_TILES = (8, 4, 2)
"""How many tiles of 16 codes tinygemm can read from a row at a time."""


def has_kernel(layer: Any, device: torch.device) -> bool:
    """Whether a frozen layer can become a `WeightOnlyLinear` on `device`: a linear layer with 4-bit groups, on CUDA."""
    if not isinstance(layer, QuantLinear) or layer.scheme.activation.mode != "none" or device.type != "cuda":
        return False
    scheme, (outputs, inputs) = layer.scheme.weight, layer.shape
    fits = scheme.bits == 4 and scheme.group_size in INT4_GROUPS and outputs % 8 == inputs % scheme.group_size == 0
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


class WeightOnlyLinear(nn.Module):
    """A frozen `QuantLinear` whose input is not quantized: [..., in_features] to [..., out_features], any float."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.group_size = layer.scheme.weight.group_size
        self._bias: Any = None if layer.bias is None else layer.bias.detach().float()
        unsigned = (layer.weight_codes() + 8).to(torch.uint8)
        pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()  # the first code in the upper half
        tiles = next(tiles for tiles in _TILES if layer.shape[1] % (16 * tiles) == 0)
        self._weight = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        scale = layer.weight_scale.t().to(torch.bfloat16)  # [groups, out_features]
        self._scale = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()

    def forward(self, input: Tensor) -> Tensor:  # torch's name of it, which a network may use
        """Multiply with the packed weight."""
        x = input
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        y = torch.ops.aten._weight_int4pack_mm(rows, self._weight, self.group_size, self._scale).float()
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def use_weight_only_kernels(network: nn.Module, device: torch.device) -> None:
    """Replace each layer of `network` that can become a `WeightOnlyLinear` by one."""
    layers = quantized_layers(network).items()
    put(network, {name: WeightOnlyLinear(layer) for name, layer in layers if has_kernel(layer, device)})
