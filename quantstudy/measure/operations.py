"""How much arithmetic a model does: multiply-accumulates per image, and those weighted by their bits.

The counts come from thop, run on a deep copy because it leaves its counters in the model it profiles. A
bit-operation is a multiply-accumulate times the bits of both its operands, the usual cost of low-bit
arithmetic where no hardware runs it yet (e.g. Wang et al., *Differentiable Joint Pruning and Quantization for
Hardware Efficiency*, ECCV 2020, section 3.3).
"""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import nn


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


def tera_bit_operations(
    macs: Mapping[str, int], weight_bits: Mapping[str, float], activation_bits: Mapping[str, float]
) -> float:
    """Return Σ MACs · weight bits · activation bits over the layers / 1e12.

    Args:
        macs: multiply-accumulates per layer, from `count_macs`.
        weight_bits: bits of the layer's weights in its arithmetic, 32 for float32.
        activation_bits: bits of the layer's input in its arithmetic, 32 for float32.

    Raises:
        KeyError: a layer of `macs` has no bits.
    """
    return sum(count * weight_bits[name] * activation_bits[name] for name, count in macs.items()) / 1e12


def _flatten(tree: Mapping[str, tuple[float, float, Mapping[str, object]]], prefix: str) -> dict[str, int]:
    flat: dict[str, int] = {}
    for name, (operations, _, children) in tree.items():
        flat[prefix + name] = int(operations)
        flat |= _flatten(children, f"{prefix}{name}.")  # type: ignore[arg-type]
    return flat
