"""Cross-layer equalization and high-bias absorption, which prepare an fp32 network for quantization.

Nagel, van Baalen, Blankevoort and Welling, *Data-Free Quantization Through Weight Equalization and Bias Correction*,
ICCV 2019. Let layer B be the only reader of layer A, through a positively homogeneous function, f(s x) = s f(x). Then
channel i of A is divided by s_i, and the columns of B that read channel i are multiplied by s_i. With
s_i = sqrt(r_A,i r_B,i) / r_B,i (equation 11), the ranges r of both layers are equal. All pairs are equalized in turn,
until no s moves any more (section 4.1).

ReLU6 is not homogeneous: min(x / s, 6) is not min(x, 6) / s. The paper replaces it by ReLU. Here it becomes a
`ChannelReLU` with the bounds 6 / s, so the network's function stays the same.

Absorption (section 4.1.3) moves c_i = max(0, mean_i - 3 std_i) of an output of A that a ReLU follows into B's bias. The
activation between A and B then has a smaller range. The paper takes mean and std from BatchNorm. Here they are measured
on calibration images, and c_i is at most the smallest output on these images, so the function stays the same. B must
not pad its input: the padding lacks the c_i that B's bias adds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.network.folding import copy_of
from quantstudy.network.graph import (
    LAYERS,
    Call,
    Graph,
    as_stored,
    capture,
    example_images,
    is_transposed,
    out_channels_first,
    put,
)
from quantstudy.network.padding import zero_padding
from quantstudy.quantization.layers import ChannelReLU
from quantstudy.quantization.observers import run_watched

ROUNDS = 20
TOLERANCE = 1e-3
SMALLEST_RANGE = 1e-6
"""Channels whose range is a smaller share of their layer's largest are skipped: float32 has no digits for them."""
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_RELU = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_MAX = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CLAMPED = (nn.ReLU6, ChannelReLU)
_SAME_CALLS = ("contiguous", "clone", "detach", "dropout", "float")
_RELU_CALLS = ("relu", "relu_", "leaky_relu")
_RESHAPES = ("flatten", "view", "reshape", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class Pair:
    """Two layers, of which `second` alone reads `first`.

    `clamp` is the name of a ReLU6 between them; `relu` says whether any ReLU lies between them.
    """

    first: str
    second: str
    clamp: str | None
    clamp_axis: int
    """The axis of the channels at the clamp, counted from the end."""
    relu: bool
    shifts: bool
    """Whether a constant subtracted from the first's output reaches the second's input unchanged."""


@dataclass(frozen=True)
class _Channels:
    """Where the channels of a tensor lie: their axis, and how many neighbours on it belong to one channel."""

    axis: int
    block: int = 1


def find_pairs(graph: Graph) -> list[Pair]:
    """Return the pairs of a network that can be equalized, in the order in which they run."""
    if graph.problem is not None:
        return []
    calls = (graph.only_call(name) for name in graph.plain)
    return [pair for call in calls if call is not None and (pair := _follow(graph, call))]


def _follow(graph: Graph, start: Call) -> Pair | None:
    call, clamp, clamp_axis, relu, shifts = start, None, 0, False, True
    channels = _Channels(len(start.shape) - 1 if isinstance(start.module, nn.Linear) else 1)
    while len(call.readers) == 1:
        call = call.readers[0]
        module: Any = call.module
        if isinstance(module, LAYERS):
            at = len(call.source) - 1 if isinstance(module, nn.Linear) else 1
            fits = channels.axis == at and (channels.block == 1 or isinstance(module, nn.Linear))
            if not fits or call.name not in graph.plain or graph.only_call(call.name) is None:
                return None
            return Pair(start.name, call.name, clamp, clamp_axis, relu, shifts)
        if isinstance(module, _CLAMPED) and clamp is None and channels.block == 1 and graph.only_call(call.name):
            clamp, clamp_axis, relu = call.name, channels.axis - len(call.shape), True
            continue
        relu = relu or isinstance(module, nn.ReLU) or (module is None and call.name in ("relu", "relu_"))
        shifts = shifts and not (isinstance(module, _AVERAGE) and _mixes_in_zeros(module))
        shifts = shifts and not _is_zero_padding(call)
        shifts = shifts and not isinstance(module, nn.LeakyReLU | nn.PReLU) and call.name != "leaky_relu"
        found = _behind(call, channels)
        if found is None:
            return None
        channels = found
    return None


def _is_zero_padding(call: Call) -> bool:
    """Whether a call pads an image, not its channels, with zeros."""
    if call.module is not None:
        return isinstance(call.module, _ZERO_PADS)
    amounts = zero_padding(call.arguments, call.keywords) if call.name == "pad" else None
    return amounts is not None and len(amounts) <= 2 * (len(call.source) - 2)


def _mixes_in_zeros(pool: Any) -> bool:
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
    return any(padding) or pool.ceil_mode or getattr(pool, "divisor_override", None) is not None


def _behind(call: Call, channels: _Channels) -> _Channels | None:
    """Return where the channels are after a call f with f(s x) = s f(x) for each of them; None for any other call."""
    module, name = call.module, call.name
    is_function = module is None
    if isinstance(module, (*_SAME, *_RELU)) or (is_function and name in (*_SAME_CALLS, *_RELU_CALLS)):
        return channels if call.shape == call.source else None
    is_pool = isinstance(module, (*_MAX, *_ADAPTIVE, *_AVERAGE)) or (is_function and name == "adaptive_avg_pool2d")
    if is_pool or _is_zero_padding(call):
        return channels if channels.axis == 1 and len(call.source) > 2 else None
    if isinstance(module, nn.Flatten) or (is_function and name in _RESHAPES):
        return _reshaped(call.source, call.shape, channels)
    if not is_function or name not in ("mean", "permute", "transpose"):
        return None
    rank, rest = len(call.source), call.arguments[1:]
    if name != "mean" and (call.keywords or not rest):
        return None
    if name == "transpose":
        one, other = (axis % rank for axis in rest)
        return _Channels({one: other, other: one}.get(channels.axis, channels.axis), channels.block)
    given = rest[0] if rest and isinstance(rest[0], tuple | list) else call.keywords.get("dim", rest)
    if name == "permute":
        return _Channels([axis % rank for axis in given].index(channels.axis), channels.block)
    axes = [axis % rank for axis in (given if isinstance(given, tuple | list) else (given,)) if axis is not None]
    if not axes or channels.axis in axes or channels.block > 1:
        return None
    kept = len(call.shape) == rank
    return channels if kept else _Channels(channels.axis - sum(axis < channels.axis for axis in axes))


def _reshaped(source: torch.Size, shape: torch.Size, channels: _Channels) -> _Channels | None:
    """Return where the channels are after a reshape, which may merge the axes behind theirs into it."""
    before, count = math.prod(source[: channels.axis]), source[channels.axis]
    behind = {math.prod(source[channels.axis + 1 : end]) for end in range(channels.axis + 1, len(source) + 1)}
    for axis, size in enumerate(shape):
        if math.prod(shape[:axis]) == before and size % count == 0 and size // count in behind:
            return _Channels(axis, channels.block * (size // count))
    return None


@torch.no_grad()
def equalize(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Return a copy of `model` (BatchNorm folded) with equal weight ranges on both sides of each pair.

    The graph is captured on `images`, float32 [N, C, H, W]; None for random images of a usual size.
    """
    model = copy_of(model)
    pairs = find_pairs(capture(model, example_images(model) if images is None else images))
    for pair in pairs:
        if pair.clamp and not isinstance(model.get_submodule(pair.clamp), ChannelReLU):
            first: Any = model.get_submodule(pair.first)
            channels = len(out_channels_first(first, first.weight))
            bound = first.weight.new_full((channels,), 6.0)
            put(model, {pair.clamp: ChannelReLU(bound, pair.clamp_axis)})
    for _ in range(ROUNDS):
        if max((_equalize_pair(model, pair) for pair in pairs), default=0.0) < TOLERANCE:
            break
    return model


def _equalize_pair(model: nn.Module, pair: Pair) -> float:
    """Equalize one pair in place and return the largest |log s|."""
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    rows = out_channels_first(first, first.weight)
    columns = _by_input_channel(second, len(rows))
    range_first, range_second = rows.flatten(1).abs().amax(1), columns.abs().amax((0, 2))
    usable = (range_first > SMALLEST_RANGE * range_first.max()) & (range_second > SMALLEST_RANGE * range_second.max())
    s = torch.where(usable, (range_first / range_second).sqrt(), 1.0)
    first.weight.copy_(as_stored(first, rows / s.view(-1, *[1] * (rows.ndim - 1))))
    if first.bias is not None:
        first.bias.div_(s)
    if pair.clamp:
        model.get_submodule(pair.clamp).bound.div_(s)  # type: ignore[union-attr,operator]
    second.weight.copy_(_from_input_channels(columns * s[:, None], second))
    return float(s.log().abs().max())


def _by_input_channel(layer: Any, channels: int) -> Tensor:
    """Return a layer's weight as [outputs of a group, channels, the rest]: the columns that read each channel.

    A linear layer after a flattened image has several columns per channel.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight.unflatten(1, (channels, -1))
    weight = out_channels_first(layer, layer.weight)
    grouped = weight.unflatten(0, (layer.groups, -1)).transpose(0, 1)  # [O / groups, groups, I / groups, ...]
    return grouped.flatten(1, 2).flatten(2)


def _from_input_channels(columns: Tensor, layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return columns.flatten(1)
    weight = out_channels_first(layer, layer.weight)
    return as_stored(layer, columns.unflatten(1, (layer.groups, -1)).transpose(0, 1).reshape(weight.shape))


def _mean_response(layer: Any, means: Tensor) -> Tensor:
    """Return the mean of a layer's outputs, [O], without its bias, for an input with the `means`, [C]."""
    groups = getattr(layer, "groups", 1)
    columns = _by_input_channel(layer, len(means))
    reached = (columns.sum(2) * means).unflatten(1, (groups, -1)).sum(2)  # [O / groups, groups]
    return reached.T.flatten()


@torch.no_grad()
def absorb_high_biases(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Move what a ReLU never cuts from each first layer's bias to the second layer's bias, in place."""
    images = list(images)
    graph = capture(model, images[0])
    pairs = [pair for pair in find_pairs(graph) if pair.relu and pair.shifts and _can_absorb(model, pair)]
    modules = {pair.first: model.get_submodule(pair.first) for pair in pairs}
    sums: dict[str, Tensor] = {}
    least: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        y = modules[name].forward(value)  # calling the module would call this hook again
        is_linear = isinstance(modules[name], nn.Linear)
        y = y.flatten(0, -2).T.double() if is_linear else y.transpose(0, 1).flatten(1).double()
        found = torch.stack([torch.full_like(y[:, 0], y.shape[1]), y.sum(1), y.square().sum(1)])
        sums[name] = sums.get(name, torch.zeros_like(found)) + found
        least[name] = torch.minimum(y.amin(1), least.get(name, y.amin(1)))

    run_watched(model, modules, images, watch)
    for pair in pairs:
        count, total, squares = sums[pair.first]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        _absorb(model, pair, (mean - 3 * std).minimum(least[pair.first]).clamp_min(0).float())


def _can_absorb(model: nn.Module, pair: Pair) -> bool:
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    padding = getattr(second, "padding", "valid")
    padded = padding != "valid" and (isinstance(padding, str) or any(padding))
    return first.bias is not None and second.bias is not None and not padded and not is_transposed(second)


def _absorb(model: nn.Module, pair: Pair, amount: Tensor) -> None:
    first: Any = model.get_submodule(pair.first)
    second: Any = model.get_submodule(pair.second)
    first.bias.sub_(amount)
    second.bias.add_(_mean_response(second, amount))
    if pair.clamp:
        model.get_submodule(pair.clamp).bound.sub_(amount)  # type: ignore[union-attr,operator]
