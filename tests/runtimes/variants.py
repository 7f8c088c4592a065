"""Variants of small networks, made of schemes alone, with the ranges that a batch of images has."""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantstudy.quantization.layers import LayerScheme, quantize_layers
from quantstudy.quantization.observers import quantizable_layers, run_watched
from quantstudy.quantization.saturation import limit_of
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.quantization.variant import Variant, cast

STATIC, DYNAMIC, FLOAT = ActivationScheme("static", 8), ActivationScheme("dynamic", 8), ActivationScheme()


def quantized(
    network: nn.Module,
    images: Tensor,
    weight: WeightScheme,
    activation: ActivationScheme = FLOAT,
    saturation_free: bool = False,
    only: type[nn.Module] = nn.Module,
    in_8_bits: Collection[str] = (),
) -> Variant:
    """Return a copy of `network` in which every layer of type `only` that can be quantized is, frozen."""
    network = copy.deepcopy(network).eval()
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str, x: Tensor) -> None:
        ranges[name] = (float(x.min()), float(x.max()))

    layers = {name: layer for name, layer in quantizable_layers(network).items() if isinstance(layer, only)}
    with torch.no_grad():
        run_watched(network, layers, [images], watch)
    schemes = {}
    for name, layer in layers.items():
        limit = limit_of(layer) if saturation_free else weight.limit  # type: ignore[arg-type]
        bits = 8 if name in in_8_bits else weight.bits
        schemes[name] = LayerScheme(replace(weight, bits=bits, limit=limit), activation)
    for name, layer in quantize_layers(network, schemes).items():
        if activation.mode == "static":
            layer.activation.scale, layer.activation.zero_point = activation.choose_qparams(*ranges[name])
        layer.freeze()
    return Variant(network).eval()


def mixed(network: nn.Module, images: Tensor) -> Variant:
    """Return a copy with linear layers in 4 bits and the rest in float16."""
    return cast(quantized(network, images, WeightScheme(4, 32), only=nn.Linear).network, torch.float16).eval()


METHODS: dict[str, Callable[[nn.Module, Tensor], Variant]] = {
    "int8-static": lambda network, x: quantized(network, x, WeightScheme(8), STATIC),
    "saturation-free": lambda network, x: quantized(network, x, WeightScheme(8), STATIC, saturation_free=True),
    "7-bit-static": lambda network, x: quantized(network, x, WeightScheme(7), STATIC),
    "int4-static": lambda network, x: quantized(network, x, WeightScheme(4), STATIC),
    "4-bit-activations": lambda network, x: quantized(network, x, WeightScheme(4), ActivationScheme("static", 4)),
    "int8-dynamic": lambda network, x: quantized(network, x, WeightScheme(8), DYNAMIC),
    "7-bit-dynamic": lambda network, x: quantized(network, x, WeightScheme(7), DYNAMIC),
    "saturation-free-dynamic": lambda network, x: quantized(network, x, WeightScheme(8), DYNAMIC, saturation_free=True),
    "int8-weight-only": lambda network, x: quantized(network, x, WeightScheme(8)),
    "int4-weight-only": lambda network, x: quantized(network, x, WeightScheme(4, 32)),
    "3-bit-weights": lambda network, x: quantized(network, x, WeightScheme(3, 32)),
    "mixed": mixed,
    "bf16": lambda network, x: cast(network, torch.bfloat16).eval(),
}
