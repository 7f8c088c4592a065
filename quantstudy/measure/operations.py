"""How much arithmetic a model does: multiply-accumulates per image, weighted by their bits.

A bit-operation is a multiply-accumulate times the bits of both its operands, the usual cost of low-bit
arithmetic where no hardware runs it yet (e.g. Wang et al., *Differentiable Joint Pruning and Quantization for
Hardware Efficiency*, ECCV 2020, section 3.3).
"""

import math
from collections.abc import Mapping

from torch import nn

from quantstudy.network.graph import LAYERS
from quantstudy.network.macs import count_macs as count_macs
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.variant import network_of


def layer_bits(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the bits of the weights and of the input of every Conv2d and Linear by name, as their schemes state them.

    A layer that is not quantized has the bits of the network's float type, 16 or 32. The bits describe the method,
    whatever the runtime, its kernels and the CPU.
    """
    network, dtype = network_of(model)
    layers, width = quantized_layers(network), 8 * dtype.itemsize
    bits = {}
    for name, module in network.named_modules():
        if name in layers:
            scheme = layers[name].scheme
            bits[name] = (scheme.weight.bits, width if scheme.activation.mode == "none" else scheme.activation.bits)
        elif isinstance(module, LAYERS):
            bits[name] = (width, width)
    return bits


def tera_bit_operations(macs: Mapping[str, int], bits: Mapping[str, tuple[int, int]]) -> float:
    """Return Σ MACs · weight bits · activation bits over the layers / 1e12.

    Args:
        macs: multiply-accumulates per layer, from `count_macs`.
        bits: the bits of each layer's weights and input, from `layer_bits`.

    Raises:
        KeyError: a layer of `macs` has no bits.
    """
    return sum(count * math.prod(bits[name]) for name, count in macs.items()) / 1e12
