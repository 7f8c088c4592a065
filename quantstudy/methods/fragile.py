"""Which layers of a network few bits hurt most for what they save, and how many more they get.

A handful of small layers makes most of the loss at four bits: depthwise convolutions, whose channels have few weights
and no other channel to make up for an error, and the first layer (Nagel, Fournarakis, Amjad, Bondarenko, van Baalen and
Blankevoort, *A White Paper on Neural Network Quantization*, 2021, sections 3.1 and 4.2); others, often the head, could
do with less. Each layer is rounded alone, as the method rounds, and the squared error of the logits is its loss. One
bit more leaves a quarter of that error, as of any uniform quantizer's, so one width is measured and the others follow
from it. The integer program of `methods.allocation` then spends what the file may grow by.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.methods.allocation import Budget, allocate
from quantstudy.network.graph import as_stored, out_channels_first, relative_error
from quantstudy.quantization.layers import LayerScheme

LOW_BITS = 4
"""Weights of more bits than these all have the same."""
IMAGES = 32
"""So many calibration images are run for each layer."""


def with_fragile_layers(
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    losses: Mapping[str, float],
    highest: int,
    share: float,
    *,
    between: bool = True,
) -> dict[str, LayerScheme]:
    """Return `schemes` with the weights of each layer in `losses` at the bits that lose least in all.

    Args:
        layers: of the fp32 network, by name.
        schemes: of the layers that are quantized.
        losses: of those whose bits may change, at the bits of their scheme (`losses_alone`).
        highest: the most bits of a layer; the least are one below those of its scheme.
        share: how much the codes and scales of all layers together may grow.
        between: whether there are other widths than those of the scheme and the most.
    """
    costs: dict[str, dict[int, int]] = {}
    by_bits: dict[str, dict[int, float]] = {}
    for name, loss in losses.items():
        scheme, layer = schemes[name].weight, layers[name]
        shape = out_channels_first(layer, layer.weight).shape  # type: ignore[arg-type]
        widths: Iterable[int] = range(max(scheme.bits - 1, 2), max(highest, scheme.bits) + 1)
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
    """Return the squared error of the logits, as a share of their square, with one layer of `rounded` after another.

    Args:
        model: fp32, eval mode; it stays untouched.
        layers: of the model, by name.
        rounded: their frozen quantized selves.
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
    """Return `schemes` with the activations of each layer in `losses` at the bits that lose least in all.

    Args:
        macs: multiply-accumulates per image, by layer.
        schemes: of the layers that are quantized.
        losses: of the inputs whose bits may change, one at least, at the bits of their scheme (`input_losses_alone`).
        highest: the most bits; the least are those of the scheme.
        share: how much the bit-operations of all layers together may grow.
    """
    widths = range(min(schemes[name].activation.bits for name in losses), highest + 1)
    by_bits = {name: {b: loss * 4.0 ** (widths.start - b) for b in widths} for name, loss in losses.items()}
    per_bit = {name: macs[name] * scheme.weight.bits for name, scheme in schemes.items()}
    spare = share * sum(count * schemes[name].activation.bits for name, count in per_bit.items())
    costs = {name: {b: per_bit[name] * b for b in widths} for name in losses}
    least = sum(costs[name][widths.start] for name in losses)
    bits = allocate(by_bits, [Budget("fragile_operations", 1.0, int(least + spare), costs)])
    changed = {name: replace(schemes[name].activation, bits=width) for name, width in bits.items()}
    return {name: replace(s, activation=changed.get(name, s.activation)) for name, s in schemes.items()}


@torch.no_grad()
def input_losses_alone(
    model: nn.Module, quantizers: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor
) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, with one layer's input after another rounded.

    Args:
        model: fp32, eval mode; it stays untouched.
        quantizers: what rounds the input of each layer, by name.
        images: float32 [N, C, H, W]; the first `IMAGES` are run.
    """
    changes = {name: _input_rounded(model.get_submodule(name), quantizer) for name, quantizer in quantizers.items()}
    return _losses(model, images, changes)


def _losses(
    model: nn.Module, images: Tensor, changes: Mapping[str, contextlib.AbstractContextManager[None]]
) -> dict[str, float]:
    """Return the squared error of the logits, as a share of their square, under one change after another."""
    few = images[:IMAGES]
    wanted, found = model(few), {}
    for name, change in changes.items():
        with change:
            found[name] = relative_error(wanted, model(few)) ** 2
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
    """Give `layer` the weight and bias of its quantized self, or its own in float16 where that is None."""
    weight, bias = layer.weight, layer.bias
    if quantized is None:
        dense = weight.half().float()
    else:
        dense = as_stored(layer, quantized.dequantized())
        layer.bias = quantized.bias
    laid_out_alike = torch.empty_like(weight).copy_(dense)  # so that the same numbers give the same logits
    layer.weight = nn.Parameter(laid_out_alike, requires_grad=False)
    try:
        yield
    finally:
        layer.weight, layer.bias = weight, bias
