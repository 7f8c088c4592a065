"""Which layers of a network few bits hurt most for what they save, and keep more.

A handful of small layers makes most of the loss at four bits: depthwise convolutions, whose channels have few weights
and no other channel to make up for an error, and the first layer (Nagel, Fournarakis, Amjad, Bondarenko, van Baalen and
Blankevoort, *A White Paper on Neural Network Quantization*, 2021, sections 3.1 and 4.2). They come first; then whatever
layer, rounded alone, moves the logits most for each byte that more bits take. All together a file grows by a share.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantstudy.methods.calibration import Calibration
from quantstudy.network.graph import as_stored, out_channels_first
from quantstudy.quantization.layers import LayerScheme
from quantstudy.quantization.schemes import WeightScheme

LOW_BITS = 4
"""Weights of more bits than these are not looked at."""
IMAGES = 32
"""So many calibration images are run for each layer."""


def with_fragile_layers(
    model: nn.Module, calibration: Calibration, schemes: Mapping[str, LayerScheme], bits: int | None, share: float
) -> dict[str, LayerScheme]:
    """Return `schemes` with the weights of fragile layers at `bits`.

    Args:
        model: fp32, BatchNorm folded, eval mode; it stays untouched.
        calibration: of `model`.
        schemes: of the layers that are quantized; those of up to `LOW_BITS` may be fragile.
        bits: of the fragile layers; None leaves all as they are.
        share: how much the codes and scales of all layers together may grow.
    """
    low = {name: scheme.weight for name, scheme in schemes.items() if scheme.weight.bits <= LOW_BITS}
    if bits is None or not low:
        return dict(schemes)
    higher = {name: replace(scheme, bits=max(bits, scheme.bits)) for name, scheme in low.items()}
    shapes = {name: out_channels_first(layer, layer.weight).shape for name, layer in calibration.replaceable.items()}
    costs = {name: higher[name].layout(shapes[name]).nbytes - low[name].layout(shapes[name]).nbytes for name in low}
    room = share * sum(scheme.weight.layout(shapes[name]).nbytes for name, scheme in schemes.items())
    losses = losses_alone(model, calibration, {name: low[name] for name in low if costs[name] <= room})
    known = {name for name in losses if name == calibration.graph.order[0] or _is_depthwise(calibration, name)}
    found = dict(schemes)
    for name in sorted(losses, key=lambda name: (name not in known, -losses[name] / max(costs[name], 1))):
        if costs[name] <= room:
            room -= costs[name]
            found[name] = replace(schemes[name], weight=higher[name])
    return found


@torch.no_grad()
def losses_alone(model: nn.Module, calibration: Calibration, schemes: Mapping[str, WeightScheme]) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, with each layer's weight rounded alone."""
    images = torch.cat(calibration.images)[:IMAGES]
    wanted = model(images)
    found = {}
    for name, scheme in schemes.items():
        layer = calibration.replaceable[name]
        weight = layer.weight
        rounded = scheme.fake_quantize(out_channels_first(layer, weight.detach()))
        layer.weight = nn.Parameter(_like(weight, as_stored(layer, rounded)), requires_grad=False)
        try:
            error = (model(images) - wanted).square().sum() / wanted.square().sum()
        finally:
            layer.weight = weight
        found[name] = float(error)
    return found


def _like(weight: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(weight).copy_(values)


def _is_depthwise(calibration: Calibration, name: str) -> bool:
    layer = calibration.replaceable[name]
    return getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1
