"""How much arithmetic a model does: multiply-accumulates per image, and those weighted by their bits.

The counts come from thop, run on a deep copy because it leaves its counters in the model it profiles. A
bit-operation is a multiply-accumulate times the bits of both its operands, the usual cost of low-bit
arithmetic where no hardware runs it yet (e.g. Wang et al., *Differentiable Joint Pruning and Quantization for
Hardware Efficiency*, ECCV 2020, section 3.3).
"""

import copy
import math
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from quantstudy.quantization.layers import quantized_layers
from quantstudy.runtimes.executables import network_of


def count_macs(model: nn.Module, image_size: int) -> tuple[int, dict[str, int]]:
    """Return the multiply-accumulates per image of the whole model, and of every Conv2d and Linear by its name.

    The total also holds what thop has a rule for outside the layers: a BatchNorm that is not folded, and pooling.

    Args:
        model: an fp32 model that takes float32 [N, 3, image_size, image_size]; it stays untouched.
        image_size: side of the square images, in pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # thop compares versions through distutils
        import thop

    profiled = copy.deepcopy(model).eval().to("meta")  # shapes without arithmetic: thop's rules need no more
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    total, _, tree = thop.profile(profiled, inputs=(image,), verbose=False, ret_layer_info=True)
    by_name = _flatten(tree, "")
    layers = [name for name, module in profiled.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return int(total), {name: by_name[name] for name in layers}


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
        elif isinstance(module, nn.Conv2d | nn.Linear):
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


def _flatten(tree: Mapping[str, tuple[float, float, Mapping[str, object]]], prefix: str) -> dict[str, int]:
    flat: dict[str, int] = {}
    for name, (operations, _, children) in tree.items():
        flat[prefix + name] = int(operations)
        flat |= _flatten(children, f"{prefix}{name}.")  # type: ignore[arg-type]
    return flat
