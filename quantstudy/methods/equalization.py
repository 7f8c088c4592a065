"""Cross-layer equalization and high-bias absorption, which prepare an fp32 network for quantization.

Nagel, van Baalen, Blankevoort and Welling, *Data-Free Quantization Through Weight Equalization and Bias Correction*,
ICCV 2019. Where layer B alone reads layer A through a positively homogeneous function, f(s x) = s f(x), channel i of A
is divided by s_i and the columns of B that read it are multiplied by it. s_i = sqrt(r_A,i r_B,i) / r_B,i (equation 11)
makes the ranges r of both equal; the pairs are gone through until no s moves (section 4.1).

ReLU6 is not homogeneous: min(x / s, 6) is not min(x, 6) / s. The paper puts ReLU in its place; here it becomes a
`ChannelReLU` whose bounds are 6 / s, so that the network's function stays as it was.

Absorption (section 4.1.3) moves c_i = max(0, mean_i - 3 std_i) of an output of A that is followed by ReLU into B's
bias, so that the activation between them has a smaller range. The paper has mean and std from BatchNorm; here they
are measured on calibration images. Only a B without padding is taken: what is moved is missing in the padding.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantstudy.quantization.layers import ChannelReLU
from quantstudy.quantization.observers import QUANTIZABLE, run_watched

ROUNDS = 20
TOLERANCE = 1e-3
_HOMOGENEOUS = (nn.Identity, nn.Dropout, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
_HOMOGENEOUS_CALLS = (torch.flatten, torch.relu, nn.functional.relu, nn.functional.adaptive_avg_pool2d)
_CLAMPED = (nn.ReLU6, ChannelReLU)


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads the first; `clamp` is a ReLU6 between them, `relu` any ReLU."""

    first: str
    second: str
    clamp: str | None
    relu: bool


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ChannelReLU) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.Graph:
    """Return the graph of a model's operators, an empty one if it cannot be traced."""
    try:
        return _Tracer().trace(model)
    except Exception:  # control flow on values: nothing is known about such a network
        return fx.Graph()


def find_pairs(model: nn.Module) -> list[Pair]:
    """Return the pairs of `model` that can be equalized, in the order of the graph; none if it cannot be traced."""
    graph, modules = traced(model), dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], QUANTIZABLE):
            pair = _follow(node, modules)
            if pair and all(calls.count(name) == 1 for name in (pair.first, pair.second, pair.clamp) if name):
                found.append(pair)
    return found


def _follow(start: fx.Node, modules: dict[str, nn.Module]) -> Pair | None:
    node, clamp, relu = start, None, False
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_function":
            if node.target not in _HOMOGENEOUS_CALLS:
                return None
            relu = relu or node.target in (torch.relu, nn.functional.relu)
            continue
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, QUANTIZABLE):
            return Pair(str(start.target), str(node.target), clamp, relu)
        if isinstance(module, _CLAMPED) and clamp is None:
            clamp, relu = str(node.target), True
        elif isinstance(module, _HOMOGENEOUS):
            relu = relu or isinstance(module, nn.ReLU)
        else:
            return None
    return None


@torch.no_grad()
def equalize(model: nn.Module) -> nn.Module:
    """Return a copy of `model` (BatchNorm folded) with equal weight ranges on both sides of each pair."""
    model = copy.deepcopy(model)
    pairs = find_pairs(model)
    for pair in pairs:
        if pair.clamp and not isinstance(model.get_submodule(pair.clamp), ChannelReLU):
            first: Any = model.get_submodule(pair.first)
            model.set_submodule(pair.clamp, ChannelReLU(torch.full((len(first.weight),), 6.0)))
    for _ in range(ROUNDS):
        if max((_equalize_pair(model, pair) for pair in pairs), default=0.0) < TOLERANCE:
            break
    return model


def _equalize_pair(model: nn.Module, pair: Pair) -> float:
    """Equalize one pair in place and return the largest |log s|."""
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    columns = _by_input_channel(second.weight, first.weight.shape[0], getattr(second, "groups", 1))
    range_first, range_second = first.weight.flatten(1).abs().amax(1), columns.abs().amax((0, 2))
    usable = (range_first > 0) & (range_second > 0)
    s = torch.where(usable, (range_first * range_second).sqrt() / range_second, 1.0)
    first.weight.div_(s.view(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    if pair.clamp:
        model.get_submodule(pair.clamp).bound.div_(s)  # type: ignore[union-attr,operator]
    second.weight.copy_(_from_input_channels(columns * s[:, None], second))
    return float(s.log().abs().max())


def _by_input_channel(weight: Tensor, channels: int, groups: int) -> Tensor:
    """Return a layer's weight as [outputs of a group, channels, the rest]: the columns that read each channel.

    A linear layer behind a flattened image has several columns a channel.
    """
    if weight.ndim == 2:
        return weight.unflatten(1, (channels, -1))
    grouped = weight.unflatten(0, (groups, -1))  # [groups, O / groups, I / groups, kH, kW]
    return grouped.permute(1, 0, 2, 3, 4).flatten(1, 2).flatten(2)


def _mean_response(weight: Tensor, means: Tensor, groups: int = 1) -> Tensor:
    """Return the mean of a layer's outputs, [O], where its input has `means`, [C], and the weight is all it has.

    Padding is not looked at: it counts like the rest of an image.
    """
    columns = _by_input_channel(weight, len(means), groups)
    reached = (columns.sum(2) * means).unflatten(1, (groups, -1)).sum(2)  # [O / groups, groups]
    return reached.T.flatten()


def _from_input_channels(columns: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return columns.flatten(1)
    grouped = columns.unflatten(1, (layer.groups, -1)).transpose(0, 1)
    return grouped.reshape(layer.weight.shape)


@torch.no_grad()
def absorb_high_biases(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Move what a ReLU never cuts from the bias of each first layer to that of the second, in place."""
    pairs = [pair for pair in find_pairs(model) if pair.relu and _can_absorb(model, pair)]
    modules = {pair.first: model.get_submodule(pair.first) for pair in pairs}
    sums: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        y = modules[name].forward(value)  # the call would come back here
        y = y.transpose(0, 1).flatten(1).double() if y.ndim == 4 else y.flatten(0, -2).T.double()
        found = torch.stack([torch.full_like(y[:, 0], y.shape[1]), y.sum(1), y.square().sum(1)])
        sums[name] = sums.get(name, torch.zeros_like(found)) + found

    run_watched(model, modules, images, watch)
    for pair in pairs:
        count, total, squares = sums[pair.first]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        _absorb(model, pair, (mean - 3 * std).clamp_min(0).float())


def _can_absorb(model: nn.Module, pair: Pair) -> bool:
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    padded = isinstance(second, nn.Conv2d) and second.padding not in ((0, 0), "valid")
    return first.bias is not None and second.bias is not None and not padded


def _absorb(model: nn.Module, pair: Pair, amount: Tensor) -> None:
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    first.bias.sub_(amount)
    second.bias.add_(_mean_response(second.weight, amount, getattr(second, "groups", 1)))
    if pair.clamp:
        model.get_submodule(pair.clamp).bound.sub_(amount)  # type: ignore[union-attr,operator]
