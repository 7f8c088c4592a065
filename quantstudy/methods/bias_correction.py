"""Bias correction: what rounding adds to the mean of a layer's outputs is taken out of its bias again.

Nagel, van Baalen, Blankevoort and Welling, *Data-Free Quantization Through Weight Equalization and Bias Correction*,
ICCV 2019. The empirical kind (appendix D) compares the two networks on calibration images: where an activation follows
a layer, only at the positions that it lets through. A channel behind a ReLU may be below zero nearly everywhere; what
rounding does there nobody sees, and a mean over all positions would move the few that count.

The analytic kind (section 4.2) needs no images: an error E of the weights moves the mean output by E times the mean
input, and the BatchNorm before a layer knows that, for it gives a channel the mean beta and the standard deviation
|gamma|. Behind a ReLU it is the mean of a normal distribution that is clipped (appendix C). Means add where branches
do; pooling over an average and dropout keep them. The layers whose input no BatchNorm tells (an image, what comes after
a ReLU of a sum) are left as they are.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from quantstudy.errors import UserError
from quantstudy.methods.equalization import mean_response, traced
from quantstudy.methods.moments import Moments
from quantstudy.quantization.layers import ChannelReLU, QuantConv2d, quantized_layers
from quantstudy.quantization.observers import QUANTIZABLE, run_watched

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, ChannelReLU)
FEW = 50
"""The sum of errors is divided by at least so many positions: the mean of fewer is mostly chance."""
_IMAGES = 8
"""So many are looked at together, for the sake of memory."""
_STEP = 1e-2
_PIXELS = 64 * 224 * 224
"""Of images that the empirical kind looks at together, for the sake of memory."""
_KEEP_MEANS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
_KEEP_MEANS_CALLS = (torch.flatten, nn.functional.adaptive_avg_pool2d)


@torch.no_grad()
def correct_biases(model: nn.Module, network: nn.Module, images: Tensor) -> dict[str, str]:
    """Add to the bias of each quantized layer what its mean output lacks, in place; `images` is [N, 3, S, S].

    One pass does it: each layer is corrected before the next one sees its output. A linear layer without a bias keeps
    none: in an ONNX graph there is no place for it. The activations that are seen are modules of `ACTIVATIONS` which
    read a layer's output itself, or a sum that was added to it in place. Returns the layers that are left, with why.
    """
    images = images[: max(_PIXELS // images.shape[-1] ** 2, 1)]
    layers = _correctable(network)
    wanted = _wanted_sums(model, list(layers), images)

    def correct(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> Tensor:
            missing = wanted[name].pop(0).missing(y)
            _add_to_bias(layer, missing)
            return y + (missing.view(-1, 1, 1) if isinstance(layer, QuantConv2d) else missing)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(correct(name)))
        network(images)
    return {name: "has no bias to correct" for name in quantized_layers(network) if name not in layers}


class _WantedSum:
    """The sum of a layer's output for each channel, over all positions or those where the `activation` of `x` is on."""

    def __init__(self, y: Tensor, channels: int, activation: nn.Module | None = None, x: Tensor | None = None) -> None:
        self.channels, self.positions = channels, y.numel() // y.shape[channels]
        self.on: list[np.ndarray] | None = None
        if activation is None or x is None:
            self.sum = _sum(y, channels)
            return
        self.on, self.sum = [], torch.zeros(y.shape[channels])
        for part, read in zip(y.split(_IMAGES), x.split(_IMAGES), strict=True):
            on = is_on(activation, read)
            self.on.append(np.packbits(on.numpy()))  # a byte a position would be gigabytes
            self.sum += _sum(part * on, channels)

    def missing(self, y: Tensor) -> Tensor:
        """Return what the mean of `y` lacks, [C]."""
        if self.on is None:
            return (self.sum - _sum(y, self.channels)) / self.positions
        missing, positions = self.sum.clone(), torch.zeros_like(self.sum)
        for part, packed in zip(y.split(_IMAGES), self.on, strict=True):
            on = torch.from_numpy(np.unpackbits(packed, count=part.numel())).view(part.shape)
            missing -= _sum(part * on, self.channels)
            positions += _sum(on, self.channels)
        return missing / positions.clamp_min(min(FEW, self.positions))


def _wanted_sums(model: nn.Module, names: list[str], images: Tensor) -> dict[str, list[_WantedSum]]:
    """Run `model` and return what each layer is to give, once for each time that it was called."""
    found: dict[str, list[_WantedSum]] = {name: [] for name in names}
    waiting: Any = WeakIdKeyDictionary()  # outputs that an activation may read yet

    def remember(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> None:
            channels = 1 if isinstance(layer, nn.Conv2d) else -1
            waiting[y] = (name, len(found[name]), y.clone(), channels)  # others may write to y
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
        model(images)
    return found


def is_on(activation: nn.Module, x: Tensor) -> Tensor:
    """Return where the slope of an activation at `x` is more than a half."""
    step = _STEP * x.abs().clamp_min(1)
    after, before = activation.forward(x + step / 2), activation.forward(x - step / 2)  # it may write to what it reads
    return after.sub_(before) > step / 2


@torch.no_grad()
def correct_own_biases(model: nn.Module, network: nn.Module, moments: Mapping[str, Moments]) -> None:
    """Add to the bias of each quantized layer what its own weights' errors take from its mean output, in place.

    `moments` are those of the layers' inputs in `model`: with one layer quantized alone this is all of the mean error.
    """
    for name, layer in _correctable(network).items():
        weight, mean = model.get_submodule(name).weight, moments[name].mean
        missing = (weight - layer.dequantized()).flatten(1).unflatten(0, (len(mean), -1))  # type: ignore[operator]
        _add_to_bias(layer, (missing @ mean.unsqueeze(2)).flatten())


@torch.no_grad()
def correct_biases_analytically(model: nn.Module, network: nn.Module, image: Tensor) -> dict[str, str]:
    """Add to the bias of each quantized layer what its weights' errors take from its mean output, in place.

    Args:
        model: fp32; each BatchNorm was folded by `fold_batchnorm`, which keeps what it says of its convolution.
        network: a copy of it with frozen quantized layers.
        image: float32 [1, 3, H, W] of any values; its size tells how much of what a kernel reads is padding.

    Returns:
        The layers that are left, with why.

    Raises:
        UserError: no layer of the model reads what a BatchNorm tells the mean of.
    """
    means, layers = input_means(model), _correctable(network)
    known = {name: layer for name, layer in layers.items() if name in means}
    if not known:
        raise UserError("bias_correction: analytic needs BatchNorm before the layers, and there is none; choose true")
    inside = _shares_inside(model, set(known), image)
    for name, layer in known.items():
        weight: Any = model.get_submodule(name).weight
        missing = (weight - layer.dequantized()) * inside.get(name, 1.0)
        _add_to_bias(layer, mean_response(missing, means[name], getattr(layer, "groups", 1)))
    left = (name for name in quantized_layers(network) if name not in known)
    return {
        name: "no BatchNorm tells its input's mean" if name in layers else "has no bias to correct" for name in left
    }


def _shares_inside(model: nn.Module, names: set[str], image: Tensor) -> dict[str, Tensor]:
    """Return how often each weight of a convolution's kernel reads the image, not padding: [kH, kW], 0 to 1."""
    shares: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            taps = torch.eye(math.prod(layer.kernel_size)).view(-1, 1, *layer.kernel_size)
            geometry: Any = (layer.stride, layer.padding, layer.dilation)
            seen = nn.functional.conv2d(torch.ones_like(x[:1, :1]), taps, None, *geometry)
            shares[name] = seen.mean((0, 2, 3)).view(layer.kernel_size)

    run_watched(model, {name: model.get_submodule(name) for name in names}, [torch.zeros_like(image)], watch)
    return shares


@dataclass(frozen=True)
class _Expected:
    """The mean of each channel, [C], and the standard deviation where the distribution is normal."""

    mean: Tensor
    std: Tensor | None = None


def input_means(model: nn.Module) -> dict[str, Tensor]:
    """Return the mean of each channel of a layer's input, float32 [C], for the layers where BatchNorm tells it."""
    graph, modules = traced(model), dict(model.named_modules())
    known: dict[fx.Node, _Expected] = {}
    means: dict[str, Tensor] = {}
    for node in graph.nodes:
        sources = [known[source] for source in node.all_input_nodes if source in known]
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, QUANTIZABLE):
            if sources:
                means[str(node.target)] = sources[0].mean
            normal = getattr(module, "output_normal", None)
            found = None if normal is None else _Expected(normal[0], normal[1])
        elif len(sources) == len(node.all_input_nodes) > 0:
            found = _after(node, module, sources)
        else:
            found = None
        if found:
            known[node] = found
    return means


def _after(node: fx.Node, module: nn.Module | None, sources: list[_Expected]) -> _Expected | None:
    """Return what is known behind an operator other than a layer."""
    first = sources[0]
    if node.target in (operator.add, operator.iadd, torch.add):
        return _Expected(torch.stack([source.mean for source in sources]).sum(0)) if len(sources) == 2 else None
    if isinstance(module, nn.Identity | nn.Dropout):
        return first
    if isinstance(module, nn.AvgPool2d) and module.count_include_pad and module.padding not in (0, (0, 0)):
        return None
    if isinstance(module, _KEEP_MEANS) or node.target in _KEEP_MEANS_CALLS:
        return _Expected(first.mean)
    if isinstance(module, ChannelReLU):
        highest = module.bound
    elif isinstance(module, nn.ReLU6):
        highest = torch.tensor(6.0)
    elif isinstance(module, nn.ReLU) or node.target in (torch.relu, nn.functional.relu):
        highest = torch.tensor(math.inf)
    else:
        return None
    return None if first.std is None else _Expected(clipped_normal_mean(first.mean, first.std, highest))


def clipped_normal_mean(mean: Tensor, std: Tensor, highest: Tensor) -> Tensor:
    """Return the mean of min(max(x, 0), highest) for normal x (appendix C); all of one shape, `highest` may be inf."""
    normal = torch.distributions.Normal(0.0, 1.0)
    std = std.clamp_min(1e-12)
    low, high = -mean / std, (highest - mean) / std
    inside = normal.cdf(high) - normal.cdf(low)
    above = torch.where(highest.isinf(), 0.0, highest * (1 - normal.cdf(high)))
    return std * (normal.log_prob(low).exp() - normal.log_prob(high).exp()) + mean * inside + above


def _correctable(network: nn.Module) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in quantized_layers(network).items()
        if layer.bias is not None or isinstance(layer, QuantConv2d)
    }


def _add_to_bias(layer: Any, missing: Tensor) -> None:
    layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias) + missing, requires_grad=False)


def _sum(y: Tensor, channels: int) -> Tensor:
    """Return the sum of a layer's output over all dimensions but that of the channels, float32 [C]."""
    return y.float().sum([dimension for dimension in range(y.ndim) if dimension != channels % y.ndim])
