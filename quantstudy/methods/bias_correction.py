"""Bias correction: rounding shifts the mean of a layer's outputs, and the layer's bias takes the shift back.

Nagel, van Baalen, Blankevoort and Welling, *Data-Free Quantization Through Weight Equalization and Bias Correction*,
ICCV 2019, appendix D. The fp32 and the quantized network are compared on calibration images. If an activation follows a
layer, only the positions that it lets through count. A channel before a ReLU may be below zero nearly everywhere:
rounding errors there have no effect, and a mean over all positions would shift the few positions that count.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from quantstudy.methods.moments import Moments
from quantstudy.quantization.layers import ChannelReLU, QuantLinear, quantized_layers

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, ChannelReLU)
FEW = 50
"""The sum of errors is divided by at least this many positions: the mean of fewer is mostly chance."""
_IMAGES = 8
"""Images that are compared at once, to save memory."""
_STEP = 1e-2
_PIXELS = 64 * 224 * 224
"""The most pixels of all images that are used, to save memory."""


@torch.no_grad()
def correct_biases(model: nn.Module, network: nn.Module, images: Tensor) -> dict[str, str]:
    """Add to the bias of each quantized layer what its mean output lacks, in place; `images` is [N, 3, S, S].

    One pass is enough: each layer is corrected before the next one sees its output. A layer that is called several
    times is corrected in its last call, by the mean of what its calls lack. A linear layer without a bias gets none,
    because its ONNX graph has no place for it. An activation counts if it is a module of `ACTIVATIONS` that reads a
    layer's output itself, or a sum that was added to that output in place. Returns the layers that are not corrected,
    each with the reason.
    """
    images = images[: max(_PIXELS // images.shape[-1] ** 2, 1)]
    layers = _correctable(network)
    wanted = _wanted_sums(model, list(layers), images)
    lacking: dict[str, list[Tensor]] = {name: [] for name in layers}

    def correct(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> Tensor:
            lacking[name].append(wanted[name].pop(0).missing(y))
            if wanted[name]:
                return y
            missing = torch.stack(lacking[name]).mean(0)
            _add_to_bias(layer, missing)
            return y + (missing if isinstance(layer, QuantLinear) else missing.view(-1, *[1] * (y.ndim - 2)))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(correct(name)))
        network(images.clone())
    return {name: "has no bias to correct" for name in quantized_layers(network) if name not in layers}


class _WantedSum:
    """The sum of a layer's output per channel, over all positions, or over those where `activation` of `x` is on."""

    def __init__(self, y: Tensor, channels: int, activation: nn.Module | None = None, x: Tensor | None = None) -> None:
        self.channels, self.positions = channels, y.numel() // y.shape[channels]
        self.on: list[np.ndarray] | None = None
        if activation is None or x is None:
            self.sum = _sum(y, channels)
            return
        self.on, self.sum = [], torch.zeros(y.shape[channels])
        for part, read in zip(y.split(_IMAGES), x.split(_IMAGES), strict=True):
            on = is_on(activation, read)
            self.on.append(np.packbits(on.numpy()))  # one byte per position would take gigabytes
            self.sum += _sum(part * on, channels)

    def missing(self, y: Tensor) -> Tensor:
        """Return what must be added to the mean of `y`, [C]."""
        if self.on is None:
            return (self.sum - _sum(y, self.channels)) / self.positions
        missing, positions = self.sum.clone(), torch.zeros_like(self.sum)
        for part, packed in zip(y.split(_IMAGES), self.on, strict=True):
            on = torch.from_numpy(np.unpackbits(packed, count=part.numel())).view(part.shape)
            missing -= _sum(part * on, self.channels)
            positions += _sum(on, self.channels)
        return missing / positions.clamp_min(min(FEW, self.positions))


def _wanted_sums(model: nn.Module, names: list[str], images: Tensor) -> dict[str, list[_WantedSum]]:
    """Run `model` and return the sums that each layer should give, one for each of its calls."""
    found: dict[str, list[_WantedSum]] = {name: [] for name in names}
    waiting: Any = WeakIdKeyDictionary()  # outputs that an activation may still read

    def remember(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> None:
            channels = -1 if isinstance(layer, nn.Linear) else 1
            waiting[y] = (name, len(found[name]), y.clone(), channels)  # later modules may write to y
            found[name].append(_WantedSum(y, channels))

        return hook

    def activate(module: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs and (read := waiting.pop(inputs[0], None)):
            name, call, y, channels = read
            found[name][call] = _WantedSum(y, channels, module, inputs[0])

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(remember(name)))
        for module in model.modules():
            if isinstance(module, ACTIVATIONS):
                hooks.enter_context(module.register_forward_pre_hook(activate))
        model(images.clone())
    return found


def is_on(activation: nn.Module, x: Tensor) -> Tensor:
    """Return where the slope of an activation at `x` is more than a half."""
    step = _STEP * x.abs().clamp_min(1)
    after, before = activation.forward(x + step / 2), activation.forward(x - step / 2)  # it may write to its input
    return after.sub_(before) > step / 2


@torch.no_grad()
def correct_own_biases(model: nn.Module, network: nn.Module, moments: Mapping[str, Moments]) -> None:
    """Add to the bias of each quantized layer what the errors of its own weights take from its mean output, in place.

    `moments` are the moments of the layers' inputs in `model`. If one layer alone is quantized, this corrects the whole
    mean error.
    """
    for name, layer in _correctable(network).items():
        if name not in moments:
            continue
        weight, mean = model.get_submodule(name).weight, moments[name].mean
        missing = (weight - layer.dequantized()).flatten(1).unflatten(0, (len(mean), -1))  # type: ignore[operator]
        _add_to_bias(layer, (missing @ mean.unsqueeze(2)).flatten())


def _correctable(network: nn.Module) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in quantized_layers(network).items()
        if layer.bias is not None or not isinstance(layer, QuantLinear)
    }


def _add_to_bias(layer: Any, missing: Tensor) -> None:
    layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias) + missing, requires_grad=False)


def _sum(y: Tensor, channels: int) -> Tensor:
    """Return the sum of a layer's output over all dimensions except the channels, float32 [C]."""
    return y.float().sum([dimension for dimension in range(y.ndim) if dimension != channels % y.ndim])
