"""Figures of what post-training methods do beyond rounding to nearest."""

import copy
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from docs.drawing.tiny import Example, figure
from quantstudy import params as P
from quantstudy.methods.equalization import equalize, find_pairs
from quantstudy.methods.gain_correction import output_gain
from quantstudy.methods.moments import input_moments
from quantstudy.methods.recipes import quantize
from quantstudy.methods.reconstruction import SoftRounding
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.report import style

BITS = 3
MEANS_OF = "4"
"""The layer whose channels' mean errors are shown: the strided convolution behind the residual."""


def weights_of(bits: int, **keys: Any) -> P.WeightOnly:
    """Return the row of a weight-only method with one scale per channel."""
    return P.WeightOnly(kind="weight_only", weight_bits=bits, fragile_bits=None, **keys)


def gptq(example: Example) -> Figure:
    """Draw the error of each layer's output on calibration inputs, rounded to nearest and by GPTQ."""
    drawn, axes = figure(1, 1)
    errors = {how: layer_errors(example, weights_of(BITS, rounding=how)) for how in ("nearest", "gptq")}
    _dumbbells(axes, errors["nearest"], errors["gptq"], ("rounded to nearest", "GPTQ"))
    axes.set(xlabel="squared error of the layer's output, relative", title=f"Each layer alone, {BITS} bits")
    return drawn


def adaround(example: Example) -> Figure:
    """Draw the penalty that pulls the rounding to 0 or 1, and the error of each layer with learned rounding."""
    drawn, (left, right) = figure(1, 2, width_ratios=(2, 3))
    soft = SoftRounding(torch.zeros(1, 201), WeightScheme(4))
    soft.v.data = torch.linspace(-4, 4, 201).view(1, 1, -1)
    h = soft.up().detach().flatten()
    for beta, colour in ((20, style.SKY), (6, style.BLUE), (2, style.VERMILLION)):
        left.plot(h, 1 - (2 * h - 1).abs() ** beta, color=colour, label=f"β = {beta}")
    left.set(xlabel="h, how far it is rounded up", ylabel="penalty", title="Pulled to 0 or 1")
    left.legend(loc="lower center")
    errors = {how: layer_errors(example, weights_of(BITS, rounding=how)) for how in ("nearest", "adaround")}
    _dumbbells(right, errors["nearest"], errors["adaround"], ("rounded to nearest", "AdaRound"))
    right.set(xlabel="squared error of the layer's output, relative", title=f"Each layer alone, {BITS} bits")
    return drawn


def equalization(example: Example) -> Figure:
    """Draw the weight range of each channel in both layers of a pair, before and after equalization."""
    pair = next(pair for pair in find_pairs(example.calibration.graph) if pair.first.endswith("body.0"))
    drawn, (left, right) = figure(1, 2)
    networks = (("before", example.model, style.SKY, "o"), ("after", equalize(example.model), style.VERMILLION, "s"))
    order = _range_of(example.model.get_submodule(pair.first)).argsort()
    for name, network, colour, marker in networks:
        for axes, layer in ((left, pair.first), (right, pair.second)):
            axes.plot(_range_of(network.get_submodule(layer))[order], marker, color=colour, ms=4, label=name)
    left.set(ylabel="largest weight of a channel", xlabel="channel, by its range before", title="Expansion")
    right.set(xlabel="the same channel", title="Depthwise convolution behind it")
    left.legend()
    return drawn


def bias_correction(example: Example) -> Figure:
    """Draw the mean error of a layer's channels where the ReLU behind it lets them through, with correction or not."""
    drawn, axes = figure(1, 1)
    looks: tuple[tuple[Any, str, str, str], ...] = (
        (False, style.SKY, "o", "rounded to nearest"),
        (True, style.VERMILLION, "s", "corrected from images"),
    )
    for corrected, colour, marker, label in looks:
        variant = quantize(example.model, example.calibration, weights_of(BITS, bias_correction=corrected))
        found, wanted = (_output(net, MEANS_OF, example) for net in (variant.network, example.model))
        seen = wanted > 0
        error = ((found - wanted) * seen).sum((0, 2, 3)) / seen.sum((0, 2, 3))
        axes.plot(error, marker, color=colour, label=label)
    axes.set(
        xlabel="output channel",
        ylabel="mean error",
        title=f"Where the ReLU behind a layer lets it through, {BITS} bits",
    )
    drawn.legend(loc="outside lower center", ncols=3)
    return drawn


def gain_correction(example: Example) -> Figure:
    """Draw the gains of each layer's channels for each rule of the weight range, and the effect of correcting them."""
    drawn, (left, right) = figure(1, 2)
    looks = (("minmax", style.BLUE, "o"), ("mse", style.VERMILLION, "s"))
    moments = input_moments(example.model, example.calibration.images)
    for (how, colour, marker), shift in zip(looks, (-0.15, 0.15), strict=True):
        layers = quantized_layers(
            quantize(example.model, example.calibration, weights_of(BITS, weight_range=how)).network
        )
        for place, (name, layer) in enumerate(layers.items()):
            weight: Any = example.model.get_submodule(name).weight
            gains = output_gain(weight.detach(), layer.dequantized(), moments[name])
            label = how if place == 0 else None
            left.plot(gains, np.full(len(gains), place + shift), marker, ms=4, alpha=0.6, color=colour, label=label)
    left.set_yticks(range(len(layers)), list(layers))
    left.invert_yaxis()
    left.axvline(1, color=style.GREY, lw=1)
    left.set(xlabel="gain of an output channel", title=f"Rounded to nearest, {BITS} bits")
    left.legend()
    widths = (2, 3, 4)
    for how, colour, marker in looks:
        for corrected, line in ((False, "--"), (True, "-")):
            rows = [weights_of(bits, weight_range=how, gain_correction=corrected) for bits in widths]
            variants = [quantize(example.model, example.calibration, row) for row in rows]
            found = [_divergence(example.model, variant, example.test[0]) for variant in variants]
            label = f"{how}, corrected" if corrected else how
            right.plot(widths, found, marker, ls=line, color=colour, label=label)
    right.set_xticks(widths)
    right.set(
        xlabel="bits of the weights", ylabel="KL divergence, nats", yscale="log", title="Predictions, test images"
    )
    right.legend()
    return drawn


def joint(example: Example) -> Figure:
    """Draw the divergence from the fp32 network's predictions before and after joint fine-tuning."""
    drawn, axes = figure(1, 1)
    images = {"calibration images": torch.cat(example.calibration.images), "test images": example.test[0]}
    widths = (2, 3, 4)
    for finetune, colour, shift in ((False, style.SKY, -0.2), (True, style.VERMILLION, 0.2)):
        alike = {"kind": "static", "rounding": "gptq", "fragile_bits": None, "finetune": finetune}
        rows = [P.Static.model_validate(alike | {"weight_bits": bits}) for bits in widths]
        variants = [quantize(example.model, example.calibration, row) for row in rows]
        for (name, shown), marker in zip(images.items(), ("o", "^"), strict=True):
            found = [_divergence(example.model, variant, shown) for variant in variants]
            label = f"{'fine-tuned' if finetune else 'GPTQ'}, {name}"
            axes.plot(np.array(widths) + shift / 4, found, marker, ms=7, color=colour, label=label)
    axes.set_xticks(widths)
    axes.set(xlabel="bits of the weights, activations at 8", ylabel="KL divergence, nats", yscale="log")
    axes.set_title("How far the predictions are from fp32's")
    axes.legend()
    return drawn


def layer_errors(example: Example, row: P.WeightOnly) -> dict[str, float]:
    """Return |y - y_q|² / |y|² of every layer's output on calibration images; each layer gets fp32's input."""
    variant = quantize(example.model, example.calibration, row)
    layers, found = dict(quantizable_layers(example.model)), {}
    for name, quantized in quantized_layers(variant.network).items():
        inputs = _input(example.model, name, example)
        wanted = layers[name](inputs)
        found[name] = float((quantized(inputs) - wanted).square().sum() / wanted.square().sum())
    return found


def _dumbbells(axes: Axes, before: dict[str, float], after: dict[str, float], labels: tuple[str, str]) -> None:
    places = range(len(before))[::-1]
    axes.hlines(places, list(before.values()), [after[name] for name in before], color=style.GREY, lw=1)
    axes.plot(list(before.values()), places, "o", color=style.SKY, label=labels[0])
    axes.plot([after[name] for name in before], places, "s", color=style.VERMILLION, label=labels[1])
    axes.set_yticks(places, list(before))
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="best")


def _range_of(layer: Any) -> Tensor:
    return layer.weight.detach().flatten(1).abs().amax(1)  # type: ignore[no-any-return]


@torch.no_grad()
def _divergence(model: nn.Module, variant: nn.Module, images: Tensor) -> float:
    wanted, found = (network(images).double().log_softmax(1) for network in (model, variant.eval()))
    return float(nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def _output(network: nn.Module, layer: str, example: Example) -> Tensor:
    return _watched(network, layer, example)[1]


def _input(network: nn.Module, layer: str, example: Example) -> Tensor:
    return _watched(network, layer, example)[0]


@torch.no_grad()
def _watched(network: nn.Module, layer: str, example: Example) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    network = copy.deepcopy(network).eval()
    network.get_submodule(layer).register_forward_hook(lambda _, inputs, y: seen.append((inputs[0].clone(), y.clone())))
    network(torch.cat(example.calibration.images))
    return seen[0]
