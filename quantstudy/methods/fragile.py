"""Find the fragile layers of a network, which few bits hurt most for what they save, and give them more bits.

At four bits a handful of small layers causes most of the loss: depthwise convolutions, whose channels have few weights
and no other channel to make up for an error, and the first layer (Nagel, Fournarakis, Amjad, Bondarenko, van Baalen and
Blankevoort, *A White Paper on Neural Network Quantization*, 2021, sections 3.1 and 4.2). Others, often the head, could
do with fewer bits. Each layer is rounded alone, in the way of the method; its loss is the squared error of the logits.
One more bit leaves a quarter of that error, as with any uniform quantizer. So the loss is measured at one width and
computed for the others. The integer program of `methods.allocation` then spends the bytes by which the file may grow.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.methods.allocation import Budget, allocate
from quantstudy.network.graph import as_stored, out_channels_first, relative_error
from quantstudy.quantization.layers import LayerScheme

LOW_BITS, LOW_ACTIVATION_BITS = 4, 6
"""Only weights and activations of at most this many bits get different bits by layer."""
IMAGES = 32
"""The number of calibration images that are run for each layer."""


def with_fragile_layers(
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    losses: Mapping[str, float],
    highest: int,
    share: float,
    *,
    between: bool = True,
    edges: Collection[str] = (),
) -> dict[str, LayerScheme]:
    """Return `schemes` with the weights of each layer in `losses` at the bits of least total loss.

    Args:
        layers: the layers of the fp32 network, by name.
        schemes: the scheme of each quantized layer.
        losses: the loss of each layer whose bits may change, at the bits of its scheme (`losses_alone`).
        highest: the most bits of a layer; the least are one fewer than its scheme has, and at least 2.
        edges: layers that get no fewer bits than their schemes have.
        share: by which share the codes and scales of the layers in `losses` together may grow.
        between: whether a layer may have other widths than its scheme's and `highest`.
    """
    costs: dict[str, dict[int, int]] = {}
    by_bits: dict[str, dict[int, float]] = {}
    for name, loss in losses.items():
        scheme, layer = schemes[name].weight, layers[name]
        shape = out_channels_first(layer, layer.weight).shape  # type: ignore[arg-type]
        least = scheme.bits if name in edges else max(scheme.bits - 1, 2)
        widths: Iterable[int] = range(least, max(highest, scheme.bits) + 1)
        if not between:
            widths = sorted({scheme.bits, max(highest, scheme.bits)})
        costs[name] = {bits: replace(scheme, bits=bits).layout(shape).nbytes for bits in widths}
        by_bits[name] = {bits: loss * 4.0 ** (scheme.bits - bits) for bits in widths}
    if not costs:
        return dict(schemes)
    before = sum(costs[name][schemes[name].weight.bits] for name in costs)
    bits = allocate(by_bits, [Budget("fragile_share", 1 + share, before, costs)])
    changed = {name: replace(schemes[name].weight, bits=width) for name, width in bits.items()}
    return {name: replace(scheme, weight=changed.get(name, scheme.weight)) for name, scheme in schemes.items()}


@torch.no_grad()
def losses_alone(
    model: nn.Module, layers: Mapping[str, nn.Module], rounded: Mapping[str, Any], images: Tensor
) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, for each layer of `rounded` in turn.

    Args:
        model: fp32, eval mode; it stays untouched.
        layers: the layers of the model, by name.
        rounded: the same layers, quantized and frozen.
        images: float32 [N, C, H, W]; the first `IMAGES` are run.
    """
    return _losses(model, images, {name: exchanged(layers[name], quantized) for name, quantized in rounded.items()})


def with_fragile_inputs(
    macs: Mapping[str, int],
    schemes: Mapping[str, LayerScheme],
    losses: Mapping[str, float],
    highest: int,
    share: float,
) -> dict[str, LayerScheme]:
    """Return `schemes` with the activations of each layer in `losses` at the bits of least total loss.

    Args:
        macs: multiply-accumulates per image, by layer.
        schemes: the scheme of each quantized layer.
        losses: the loss of each input whose bits may change, one at least, at the bits of its scheme
            (`input_losses_alone`).
        highest: the most bits; the least are those of the layer's scheme.
        share: by which share the bit-operations of all layers together may grow.
    """
    own = {name: schemes[name].activation.bits for name in losses}
    widths = {name: range(least, max(highest, least) + 1) for name, least in own.items()}
    by_bits = {name: {b: loss * 4.0 ** (own[name] - b) for b in widths[name]} for name, loss in losses.items()}
    per_bit = {name: macs[name] * scheme.weight.bits for name, scheme in schemes.items()}
    spare = share * sum(count * schemes[name].activation.bits for name, count in per_bit.items())
    costs = {name: {b: per_bit[name] * b for b in widths[name]} for name in losses}
    before = sum(costs[name][own[name]] for name in losses)
    bits = allocate(by_bits, [Budget("fragile_operations", 1.0, int(before + spare), costs)])
    changed = {name: replace(schemes[name].activation, bits=width) for name, width in bits.items()}
    return {name: replace(s, activation=changed.get(name, s.activation)) for name, s in schemes.items()}


@torch.no_grad()
def input_losses_alone(
    model: nn.Module, quantizers: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor
) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, with each layer's input rounded in turn.

    Args:
        model: fp32, eval mode; it stays untouched.
        quantizers: the function that rounds the input of each layer, by name.
        images: float32 [N, C, H, W]; the first `IMAGES` are run.
    """
    changes = {name: _input_rounded(model.get_submodule(name), quantizer) for name, quantizer in quantizers.items()}
    return _losses(model, images, changes)


def _losses(
    model: nn.Module, images: Tensor, changes: Mapping[str, contextlib.AbstractContextManager[None]]
) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, under each change in turn."""
    few = images[:IMAGES]
    wanted, found = model(few.clone()), {}  # a network may write to its input
    for name, change in changes.items():
        with change:
            found[name] = relative_error(wanted, model(few.clone())) ** 2
    return found


@contextlib.contextmanager
def _input_rounded(layer: nn.Module, quantizer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def rounded(_: nn.Module, values: Any, keywords: Any) -> Any:
        if values:
            return (quantizer(values[0]), *values[1:]), keywords
        return values, keywords | {"input": quantizer(keywords["input"])}

    with layer.register_forward_pre_hook(rounded, with_kwargs=True):
        yield


@contextlib.contextmanager
def exchanged(layer: Any, quantized: Any) -> Iterator[None]:
    """Give `layer` the weight and bias of `quantized`; if that is None, give it its own weight in float16."""
    weight, bias = layer.weight, layer.bias
    if quantized is None:
        dense = weight.half().float()
    else:
        dense = as_stored(layer, quantized.dequantized())
        layer.bias = quantized.bias
    laid_out_alike = torch.empty_like(weight).copy_(dense)  # the same numbers then give the same logits
    layer.weight = nn.Parameter(laid_out_alike, requires_grad=False)
    try:
        yield
    finally:
        layer.weight, layer.bias = weight, bias
