"""How much arithmetic a model does: multiply-accumulates per image, and those weighted by their bits.

The counts come from PyTorch's FlopCounterMode, which sees each operator that multiplies, whoever calls it. A
bit-operation is a multiply-accumulate times the bits of both its operands, the usual cost of low-bit
arithmetic where no hardware runs it yet (e.g. Wang et al., *Differentiable Joint Pruning and Quantization for
Hardware Efficiency*, ECCV 2020, section 3.3).
"""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quantstudy.network.architectures import Shape, image_shape
from quantstudy.network.graph import LAYERS
from quantstudy.quantization.layers import quantized_layers
from quantstudy.runtimes.executables import network_of


@torch.no_grad()
def count_macs(model: nn.Module, image_size: int | Shape) -> tuple[int, dict[str, int]]:
    """Return the multiply-accumulates per image of all matrix products, and of every Conv2d and Linear by its name.

    The total holds those outside the layers too, such as attention's; sums, pooling and normalization count nothing.

    Args:
        model: an fp32 model in eval mode that takes float32 [N, channels, height, width].
        image_size: channels, height and width of an image, or pixels a side of a square of RGB.
    """
    device = next(model.parameters()).device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused operator is not counted
        model(torch.zeros(1, *image_shape(image_size), device=device))
    found = {name.partition(".")[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    return counter.get_total_flops() // 2, {name: found.get(name, 0) for name in layers}


def layer_bits(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the bits of the weights and of the input of every Conv2d and Linear by name, as their schemes state them.

    What is not quantized has those of the network's float type, 16 or 32. They say what a method does, whatever the
    runtime, its kernels and the CPU.
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
        bits: those of its weights and its input, from `layer_bits`.

    Raises:
        KeyError: a layer of `macs` has no bits.
    """
    return sum(count * math.prod(bits[name]) for name, count in macs.items()) / 1e12
