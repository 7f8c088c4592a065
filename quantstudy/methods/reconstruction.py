"""AdaRound: learn which way each weight is rounded, layer by layer.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, *Up or Down? Adaptive Rounding for Post-Training Quantization*,
ICML 2020. A weight becomes s * clip(floor(w / s) + h(v)), h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
(equation 23), and v is learned by Adam to minimize

    mean over batch and places of |layer(x) - layer_q(x_q)|^2 + 0.01 sum(1 - |2 h(v) - 1|^beta)

x is the layer's input in the fp32 network, and x_q its input in the network that is quantized up to the layer. The
second term is left out for the first fifth of the steps; then beta falls from 20 to 2. In the end h is rounded to 0 or
1.

Activation scales stay as calibrated. An eighth of the images is held out: if rounding to nearest reconstructs the layer
better on these, it is kept. A layer of more than `LARGE` weights is left to the caller: with some hundred million
weights, one step takes a second. `methods.blocks` reconstructs whole blocks.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantstudy.methods.trainable import LARGE, split
from quantstudy.quantization.layers import QuantLinear, quantized_layers
from quantstudy.quantization.observers import run_watched
from quantstudy.quantization.schemes import WeightScheme

LEARNING_RATE = 0.01
_REGULARIZATION = 0.01
_WARM_UP = 0.2
_STRETCH = (-0.1, 1.1)


@dataclass(frozen=True)
class Limits:
    """Limits of reconstruction: steps per layer, images per step, megabytes of cached activations."""

    steps: int = 1000
    batch_size: int = 32
    memory_mb: float = 2000.0


class SoftRounding(nn.Module):
    """A weight quantizer whose rounding is learned: `forward` is soft, `freeze` is final."""

    def __init__(self, weight: Tensor, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme, self.hard = scheme, False
        self.scale = scheme.choose_scale(weight)
        scaled = scheme.grouped(weight.detach()) / self.scale.unsqueeze(2)
        self.floor = scaled.floor()
        low, high = _STRETCH
        fraction = ((scaled - self.floor - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(torch.logit(fraction))

    def up(self) -> Tensor:
        """Return h(v), how far each weight is rounded up, in [0, 1]."""
        low, high = _STRETCH
        return (torch.sigmoid(self.v) * (high - low) + low).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the softly rounded weight, in the shape of `weight`."""
        return self.scheme.ungrouped(self._codes() * self.scale.unsqueeze(2), weight.shape)

    def _codes(self) -> Tensor:
        up = (self.v >= 0).to(self.v.dtype) if self.hard else self.up()
        return (self.floor + up).clamp(self.scheme.lowest, self.scheme.highest)

    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 codes and the scales."""
        self.hard = True
        with torch.no_grad():
            return self.scheme.ungrouped(self._codes().to(torch.int8), weight.shape), self.scale

    def penalty(self, beta: float) -> Tensor:
        """Return how far from 0 or 1 the h(v) are: sum(1 - |2 h - 1|^beta)."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()


def reconstruct(
    reference: nn.Module, network: nn.Module, images: Tensor, limits: Limits, order: Sequence[str] = ()
) -> dict[str, str]:
    """Freeze the layers of `network` with learned rounding, one by one.

    Args:
        reference: the fp32 network.
        network: its copy with quantized layers, not yet frozen.
        images: float32 [N, 3, S, S] to learn on.
        limits: the limits of each layer.
        order: the names of the layers in the order in which they run; without it, that of their definition.

    Returns:
        The layers that are left to the caller, each with the reason.
    """
    places = {name: place for place, name in enumerate(order)}
    layers = sorted(quantized_layers(network).items(), key=lambda item: places.get(item[0], len(places)))
    skipped = {}
    rows = [_rows(network, images[:count], [name for name, _ in layers]) for count in (1, 2)] if len(images) > 1 else []
    with tqdm(layers, desc="reconstruction", unit="layer", leave=False, mininterval=1.0) as bar:
        for name, layer in bar:
            if layer.shape.numel() > LARGE:
                skipped[name] = f"more than {LARGE:,} weights are learned; rounded by GPTQ"
                continue
            if rows and rows[1][name] != 2 * rows[0][name]:
                skipped[name] = "rows of its input belong to several images; rounded by GPTQ"
                continue
            inputs, targets = cached(reference, network, name, images.split(64), limits.memory_mb * 1e6)
            before, after = _learn(layer, inputs, targets, limits)
            del inputs, targets
            bar.set_postfix_str(f"{name}: error {before:.3g} -> {after:.3g}")
    return skipped


@torch.no_grad()
def _rows(network: nn.Module, images: Tensor, names: Sequence[str]) -> Counter[str]:
    """Return the length of the first axis of each layer's input."""
    found: Counter[str] = Counter()
    layers = {name: network.get_submodule(name) for name in names}
    run_watched(network, layers, [images], lambda name, value: found.update({name: len(value)}))
    return found


def _learn(layer: Any, inputs: Tensor, targets: Tensor, limits: Limits) -> tuple[float, float]:
    """Learn the rounding of one layer and freeze it; return its error with rounding to nearest, and now."""
    train, judge = split(len(inputs))
    channels = -1 if isinstance(layer, QuantLinear) else 1
    before = _error(layer, inputs[-judge:], targets[-judge:])
    layer.weight_quantizer = quantizer = SoftRounding(layer.weight, layer.scheme.weight)
    optimizer = torch.optim.Adam([quantizer.v], LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for progress in (step / limits.steps for step in range(limits.steps)):
            chosen = torch.randint(train, (limits.batch_size,), generator=generator)
            loss = (layer(inputs[chosen]) - targets[chosen]).square().sum(channels).mean()
            if progress > _WARM_UP:
                beta = 20 - 18 * (progress - _WARM_UP) / (1 - _WARM_UP)
                loss = loss + _REGULARIZATION * quantizer.penalty(beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    quantizer.hard = True
    after = _error(layer, inputs[-judge:], targets[-judge:])
    if after > before:
        layer.weight_quantizer = None
    layer.freeze()
    return before, min(before, after)


@torch.no_grad()
def _error(layer: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    pairs = zip(inputs.split(64), targets.split(64), strict=True)
    return sum(float((layer(x) - y).square().sum()) for x, y in pairs) / targets.numel()


class _Reached(Exception):
    """The wanted tensor is recorded; the rest of the network need not run."""


@torch.no_grad()
def cached(
    reference: nn.Module, network: nn.Module, name: str, batches: Sequence[Tensor], most: float, *, plain: bool = False
) -> tuple[Tensor, ...]:
    """Return a module's input in `network`, its output in `reference` and, if `plain`, its input in `reference`.

    Args:
        reference: the fp32 network.
        network: the quantized network.
        name: the module's name, in both.
        batches: batches of images.
        most: the most bytes to return; images that would exceed them are left out, but for those of the first batch.
        plain: whether to return the third tensor.
    """
    seen: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    filled: Counter[int] = Counter()  # rows; attention in windows makes several of an image

    def keep_input(_: nn.Module, values: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen[0] = values[0] if values else keywords["input"]
        raise _Reached

    def keep_plain(_: nn.Module, values: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        if plain:
            seen[2] = (values[0] if values else keywords["input"]).clone()  # the module may write to it

    def keep_output(_: nn.Module, values: tuple[Tensor, ...], result: Tensor) -> None:
        seen[1] = result
        raise _Reached

    part, run, count = reference.get_submodule(name), 0, 0
    with (
        network.get_submodule(name).register_forward_pre_hook(keep_input, with_kwargs=True),
        part.register_forward_pre_hook(keep_plain, with_kwargs=True),
        part.register_forward_hook(keep_output),
    ):
        for batch in batches:
            for model in (network, reference):
                with contextlib.suppress(_Reached):
                    model(batch.clone())  # a network may write to its input
            if not kept:
                fitting = int(most * len(batch) / sum(value.nbytes for value in seen.values()))
                count = min(sum(map(len, batches)), max(fitting, len(batch)))
                kept = {index: _empty(seen[index], len(seen[index]) * count // len(batch)) for index in sorted(seen)}
            for index, whole in kept.items():
                place = whole[filled[index] : filled[index] + len(seen[index])]
                place.copy_(seen[index][: len(place)])
                filled[index] += len(place)
            run += len(batch)
            if run >= count:
                break
    return tuple(whole[: filled[index]] for index, whole in kept.items())


def _empty(like: Tensor, count: int) -> Tensor:
    """Return a tensor of `count` rows, in the memory format of `like`, before its first batch is written to it.

    To collect the batches and join them in the end would take twice the memory.
    """
    is_last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    made = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=made)
