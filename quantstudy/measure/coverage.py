"""How much of a model is stored in low bits: the quantized layers, and everything else.

The methods quantize the weights of convolutions and linear layers. Normalization, embeddings and scales have few
parameters and keep their float type. A layer also keeps it if another module reads its weight, as
`nn.MultiheadAttention` does.
"""

from collections import Counter
from typing import Any

from torch import nn

from quantstudy.measure.per_layer import weight_storage
from quantstudy.network.attention import OpenAttention
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.variant import Variant


def stored(model: nn.Module) -> dict[str, float]:
    """Count the layers of an fp32 network or a frozen `Variant`, and return the mean stored bits of a weight."""
    storage = weight_storage(model)
    bits = 8 * sum(size for size, _ in storage.values())
    rest_is_16_bit = isinstance(model, Variant) and model.dtype.itemsize < 4
    return {
        "weight_bits": bits / sum(weights for _, weights in storage.values()),
        "layers_quantized": len(storage) if rest_is_16_bit else len(quantized_layers(model)),
        "layers_quantizable": len(storage),
    }


def not_quantized(model: nn.Module) -> dict[str, Any]:
    """Return what an integer variant left in float; nothing for fp32 and 16-bit networks.

    `layers`: the convolutions and linear layers by name, unless the variant stores these in 16 bits; `parameters`: how
    many parameters lie outside such layers, by the type of their module; `attention`: the number of attention modules
    whose products are not quantized.
    """
    if not isinstance(model, Variant) or not quantized_layers(model):
        return {}
    rest = quantizable_layers(model.network)
    inside = {id(p) for layer in (*quantized_layers(model).values(), *rest.values()) for p in layer.parameters()}
    counts: Counter[str] = Counter()
    for module in model.network.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in inside:
                counts[type(module).__name__] += parameter.numel()
    return {
        "layers": [] if model.dtype.itemsize < 4 else list(rest),
        "parameters": dict(counts),
        "attention": sum(isinstance(m, OpenAttention) and m.scores.is_plain for m in model.network.modules()),
    }


def remark(left: dict[str, Any]) -> list[str]:
    """Return in words what `not_quantized` found outside layers: one line, or none if it found nothing."""
    parts = []
    if left.get("parameters"):
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in left["parameters"].items())
        parts.append(f"parameters outside layers ({kinds})")
    if left.get("attention"):
        parts.append(f"the products of queries, keys and values in {left['attention']} attention modules")
    return [f"Not in low bits with integer methods: {'; '.join(parts)}."] if parts else []
