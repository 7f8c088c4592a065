"""AdaRound, layer by layer or block by block: learn which way each weight is rounded.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, *Up or Down? Adaptive Rounding for Post-Training Quantization*,
ICML 2020; with the blocks of Li et al., *BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction*, ICLR 2021. A weight becomes s * clip(floor(w / s) + h(v)), h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)
(equation 23), and v is learned by Adam to minimize

    mean over batch and places of |unit(x) - unit_q(x_q)|^2 + 0.01 sum(1 - |2 h(v) - 1|^beta)

where x is the fp32 network's input of the unit and x_q that of the network quantized up to there; beta falls from 20 to
2, after a fifth of the steps without the second term. In the end h is rounded to 0 or 1.

A unit is a residual block, or whatever else is no plain container, or a layer outside of such. Unlike BRECQ there is no
Fisher information in the loss, and activation scales stay as calibrated. If rounding to nearest reconstructs the unit
better on the same images, that is kept. A unit of more than `LARGE` weights is left to the caller: at some hundred
million, one step takes a second.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.schemes import WeightScheme

LARGE = 4_000_000
LEARNING_RATE = 0.01
_REGULARIZATION = 0.01
_WARM_UP = 0.2
_STRETCH = (-0.1, 1.1)


@dataclass(frozen=True)
class Limits:
    """Of reconstruction: steps a unit, images a step, seconds in all, megabytes of cached activations."""

    steps: int = 1000
    batch_size: int = 32
    seconds: float = 480.0
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


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a network with quantized layers that are reconstructed one after another, by name."""
    layers = set(quantized_layers(model).values())
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        is_container = module is model or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if module in layers or (not is_container and any(part in layers for part in module.modules())):
            found[name] = module
        elif is_container:
            for child, part in module.named_children():
                visit(f"{name}.{child}" if name else child, part)

    visit("", model)
    return found


def reconstruct(reference: nn.Module, network: nn.Module, images: Tensor, limits: Limits, block: bool) -> list[str]:
    """Freeze the layers of `network` with learned rounding, unit by unit; return the layers that were left to others.

    Args:
        reference: the fp32 network.
        network: its copy with quantized layers, not yet frozen.
        images: float32 [N, 3, S, S] to learn on.
        limits: the time limit shortens the schedule of each unit alike, in share of what is left.
        block: whether residual blocks are units, or each layer is one.
    """
    units = find_units(network) if block else dict(quantized_layers(network))
    skipped, deadline = [], time.monotonic() + limits.seconds
    with tqdm(total=len(units), desc="reconstruction", unit="unit", leave=False, mininterval=1.0) as bar:
        for number, (name, unit) in enumerate(units.items()):
            layers: list[Any] = list(quantized_layers(unit).values())
            if sum(layer.shape.numel() for layer in layers) > LARGE:
                skipped += [full for full, layer in quantized_layers(network).items() if layer in layers]
                continue
            share = (deadline - time.monotonic()) / (len(units) - number)
            ends = time.monotonic() + max(share, 0.0)
            inputs, targets = _cached(reference, network, name, images, limits)
            before, after = _learn(unit, layers, inputs, targets, limits, ends)
            bar.set_postfix_str(f"{name}: error {before:.3g} -> {after:.3g}")
            bar.update()
    return skipped


def _learn(
    unit: nn.Module, layers: list[Any], inputs: Tensor, targets: Tensor, limits: Limits, ends: float
) -> tuple[float, float]:
    """Learn the rounding of one unit and freeze it; return its error with rounding to nearest, and now."""
    before = _error(unit, inputs, targets)
    quantizers = [SoftRounding(layer.weight, layer.scheme.weight) for layer in layers]
    for layer, quantizer in zip(layers, quantizers, strict=True):
        layer.weight_quantizer = quantizer
    optimizer = torch.optim.Adam([quantizer.v for quantizer in quantizers], LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for progress in progress_of(limits.steps, ends):
            chosen = torch.randint(len(inputs), (limits.batch_size,), generator=generator)
            loss = (unit(inputs[chosen]) - targets[chosen]).square().sum(1).mean()
            if progress > _WARM_UP:
                beta = 20 - 18 * (progress - _WARM_UP) / (1 - _WARM_UP)
                loss = loss + _REGULARIZATION * sum(quantizer.penalty(beta) for quantizer in quantizers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for quantizer in quantizers:
        quantizer.hard = True
    after = _error(unit, inputs, targets)
    for layer in layers:
        if after > before:
            layer.weight_quantizer = None
        layer.freeze()
    return before, min(before, after)


def progress_of(steps: int, ends: float) -> Iterator[float]:
    """Yield the share of a schedule that is over, by steps or, when these do not fit, by time."""
    started = time.monotonic()
    for step in range(steps):
        spent = (time.monotonic() - started) / max(ends - started, 1e-9)
        if spent >= 1 and step:
            return
        yield max(step / steps, min(spent, 1.0))


@torch.no_grad()
def _error(unit: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    pairs = zip(inputs.split(64), targets.split(64), strict=True)
    return sum(float((unit(x) - y).square().sum()) for x, y in pairs) / targets.numel()


class _Reached(Exception):
    """The unit's input is there; the rest of the network need not run."""


@torch.no_grad()
def _cached(
    reference: nn.Module, network: nn.Module, name: str, images: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Return the unit's input in the quantized network and its output in the fp32 one, of as many images as fit."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    room = limits.memory_mb * 1e6

    def keep_input(_: nn.Module, values: tuple[Tensor, ...]) -> None:
        inputs.append(values[0])
        raise _Reached

    def keep_output(_: nn.Module, values: Any, result: Tensor) -> None:
        targets.append(result)
        raise _Reached

    with (
        network.get_submodule(name).register_forward_pre_hook(keep_input),
        reference.get_submodule(name).register_forward_hook(keep_output),
    ):
        for batch in images.split(64):
            for model in (network, reference):
                with contextlib.suppress(_Reached):
                    model(batch)
            room -= inputs[-1].nbytes + targets[-1].nbytes
            if room < 0:
                break
    return torch.cat(inputs), torch.cat(targets)
