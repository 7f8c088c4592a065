"""BRECQ: train one block after another until its output is close to the fp32 block's output again.

Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang and Gu, *BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction*, ICLR 2021. For each unit of a network, in the order in which the units run, Adam minimizes

    mean over batch and places of Σ_c w_c (unit_q(x_mixed) - unit(x))_c²

x is the unit's input in the fp32 network, and x_q its input in the network that is quantized up to the unit. Each value
of x_mixed comes from x or from x_q, at even odds; activations are rounded at even odds too (QDrop, Wei et al., ICLR
2022). w is the Fisher information of the unit's output, here one number per channel: the mean square of the gradient of
-log p(y), with y drawn from fp32's predictions. Without w, only the largest channels would count.

Unlike the paper there is no soft rounding. Codes start as GPTQ chose them and move by straight-through gradients,
together with scales and biases, as in the block-wise training of Chen et al., *EfficientQAT*, ACL 2025. An eighth of
the images is held out and decides which state of a unit is best; the starting state is a candidate too.
"""

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantstudy.methods.reconstruction import cached
from quantstudy.methods.trainable import everything_rounded, freeze_trained, make_trainable, split, train_to_best
from quantstudy.quantization.layers import QuantLinear, quantized_layers

RATE = 0.005
BATCH_SIZE = 32
PLACES = 2**16
"""The most positions of a unit's input in a batch; a batch has at least 8 images."""
DROP = 0.5
MEMORY = 1e9
"""The most bytes of activations to keep for a unit."""
_FISHER_IMAGES = 64


class Unit(NamedTuple):
    """What is reconstructed at once."""

    channels: int
    """The axis of the channels in its output."""
    rows: int
    """How many rows of its input and output an image has."""


def find_units(network: nn.Module, images: Tensor) -> tuple[dict[str, Unit], dict[str, str]]:
    """Return the units to reconstruct one after another, in the order in which they run, and what cannot be one.

    A unit is the largest module that takes and returns one tensor, whose rows belong to one image each, and that
    contains quantized layers, all called once. A plain container is none; its parts may be. The network runs on the
    first two of `images` [N, C, H, W] and on the first alone.

    Returns:
        The units by name, and the layers of no unit, each with the reason.
    """
    two = images[:2] if len(images) > 1 else images.expand(2, *images.shape[1:])
    calls, alone = _calls(network, two), _calls(network, two[:1])
    layers = {id(layer) for layer in quantized_layers(network).values()}
    units: dict[str, Unit] = {}
    left: dict[str, str] = {}
    taken: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        inside = {id(part) for part in module.modules()} & layers
        if not inside - taken:
            return
        is_layer, is_container = id(module) in layers, module is network or isinstance(module, _CONTAINERS)
        problem = _problem(calls[id(module)], alone[id(module)])
        once = not inside & taken and all(len(calls[part]) == 1 for part in inside)
        if not problem and once and (is_layer or not is_container):
            units[name] = Unit(_channel_axis(network, two, calls, module), alone[id(module)][0].given[0])
            taken.update(inside)
        elif is_layer:
            left[name] = problem
            taken.add(id(module))
        else:
            for child, part in module.named_children():
                visit(f"{name}.{child}" if name else child, part)

    visit("", network)
    starts = {name: calls[id(network.get_submodule(name))][0].start for name in units}
    return dict(sorted(units.items(), key=lambda unit: starts[unit[0]])), left


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class _Call:
    start: int
    """How many calls began before."""
    given: torch.Size = field(default_factory=torch.Size)
    """The shape of its input; none if the module does not take one tensor to one."""
    result: torch.Size = field(default_factory=torch.Size)


_Calls = Mapping[int, list[_Call]]


def _problem(calls: list[_Call], alone: list[_Call]) -> str:
    """Return why a module with these calls, for two images and for one, cannot be a unit."""
    if len(calls) != 1 or len(alone) != 1:
        return f"is called {len(calls)} times"
    (call,), (one,) = calls, alone
    if not call.given or not call.result:
        return "does not take one tensor to one"
    rows = {call.given[0], call.result[0], 2 * one.given[0], 2 * one.result[0]}
    return "" if len(rows) == 1 else "rows of its input or output belong to several images"


def _calls(network: nn.Module, images: Tensor) -> _Calls:
    """Return the calls of each module, by its id."""
    found: dict[int, list[_Call]] = defaultdict(list)
    number = itertools.count()

    def enter(module: Any, *_: Any) -> None:
        found[id(module)].append(_Call(next(number)))

    def leave(module: Any, values: Any, keywords: Any, result: Any) -> None:
        given = [*values, *keywords.values()]
        takes_one = len(given) == 1 and isinstance(given[0], Tensor) and not keywords.keys() - {"input"}
        if takes_one and isinstance(result, Tensor):
            found[id(module)][-1].given, found[id(module)][-1].result = given[0].shape, result.shape

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        network(images.clone())
    return found


def _channel_axis(network: nn.Module, images: Tensor, calls: _Calls, unit: nn.Module) -> int:
    """Return the axis of a unit's output whose size is that of its last layer's channels, 1 or -1.

    If both axes have this size, the layer's first channel is shifted: the axis along which the output then changes at
    one place alone is that of the channels.
    """
    layer = max(quantized_layers(unit).values(), key=lambda inner: calls[id(inner)][0].start)
    shape, is_linear = calls[id(unit)][0].result, isinstance(layer, QuantLinear)
    if len(shape) < 3:
        return 1
    fits = [axis for axis in (1, -1) if shape[axis] == layer.shape[0]]
    if len(fits) == 1:
        return fits[0]
    if fits:
        plain, shifted = (_output(network, images, unit, layer, by) for by in (0.0, 1.0))
        changed = (shifted - plain).abs()
        places = {axis: int((changed.transpose(0, axis).flatten(1).amax(1) > 0).sum()) for axis in fits}
        if places[1] != places[-1]:
            return min(fits, key=lambda axis: places[axis])
    return -1 if is_linear and len(shape) == 3 else 1


@torch.no_grad()
def _output(network: nn.Module, images: Tensor, unit: nn.Module, layer: nn.Module, by: float) -> Tensor:
    """Return the output of `unit` if the first channel of its last layer is shifted by a number."""
    found: list[Tensor] = []

    def shift(module: nn.Module, values: Any, result: Tensor) -> Tensor:
        result.select(-1 if isinstance(module, QuantLinear) else 1, 0).add_(by)
        return result

    def keep(module: nn.Module, values: Any, result: Tensor) -> None:
        found.append(result.clone())

    with layer.register_forward_hook(shift), unit.register_forward_hook(keep):
        network(images.clone())
    return found[0]


def reconstruct_blocks(reference: nn.Module, network: nn.Module, images: Tensor, steps: int) -> dict[str, str]:
    """Train the units of `network` one after another; its layers are frozen before and after.

    Args:
        reference: the fp32 network.
        network: the quantized network, changed in place.
        images: float32 [N, C, H, W].
        steps: training steps of each unit.

    Returns:
        The layers whose codes and scales were not trained, each with the reason.
    """
    units, left = find_units(network, images)
    if not units:
        return left
    axes = {name: facts.channels for name, facts in units.items()}
    weights = fisher_information(reference, images[:_FISHER_IMAGES], axes)
    images, judges = _in_turns(images)
    with (
        tqdm(units.items(), desc="reconstruction", unit="unit", leave=False, mininterval=1.0) as bar,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)  # which values of an activation stay as they are
        for name, facts in bar:
            unit = network.get_submodule(name)
            kept = make_trainable(unit, DROP)
            left |= {f"{name}.{layer}" if layer else name: why for layer, why in kept.items()}
            if any(parameter.requires_grad for parameter in unit.parameters()):
                with everything_rounded(unit):
                    rounded, targets, plain = cached(reference, network, name, images.split(16), MEMORY, plain=True)
                rows = _rows(judges, len(targets), facts.rows)
                before, after = _learn(unit, (rounded, targets, plain), rows, weights[name], facts.channels, steps)
                del rounded, targets, plain  # before those of the next unit are kept
                bar.set_postfix_str(f"{name}: error {before:.3g} -> {after:.3g}")
            freeze_trained(unit)
    return left


def _in_turns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images, and which of them judge, bool [N], so that of any first ones about an eighth does.

    A unit keeps as many of the first images as fit into memory; those that judge it train no other unit. If there are
    too few images, all of them do both.
    """
    train, judge = split(len(images))
    if train == len(images):
        return images, torch.ones(len(images), dtype=torch.bool)
    places = torch.cat([(torch.arange(count) + 0.5) / count for count in (train, judge)])
    order = places.argsort(stable=True)
    return images[order], order >= train


def _learn(
    unit: nn.Module,
    known: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    weight: Tensor,
    channels: int,
    steps: int,
) -> tuple[float, float]:
    """Train one unit; return its error on the held-out images, before and after.

    Args:
        unit: the unit, trainable.
        known: its rounded input, the output that it should have, and its input in fp32, each with the same rows.
        rows: those that train, and those that judge.
        weight: of each channel, [C].
        channels: the axis of the channels.
        steps: training steps.
    """
    (rounded, targets, plain), (train, judge) = known, rows
    shape = [1] * targets.ndim
    shape[channels] = -1
    weight = weight.view(shape) / _spread(targets, weight, channels)
    generator = torch.Generator().manual_seed(0)
    size = min(max(PLACES // max(plain[0, 0].numel(), 1), 8), BATCH_SIZE) if plain.ndim > 2 else BATCH_SIZE

    def loss() -> Tensor:
        chosen = train[torch.randint(len(train), (size,), generator=generator)]
        keep = torch.rand(plain[chosen].shape, generator=generator) < DROP
        found = unit(torch.where(keep, plain[chosen], rounded[chosen]))
        return ((found - targets[chosen]).square() * weight).mean()

    held = rounded[judge], targets[judge]
    best = train_to_best(unit, RATE, steps, loss, lambda: _error(unit, *held, weight))
    return best.first, best.error


def _rows(judges: Tensor, count: int, by_image: int) -> tuple[Tensor, Tensor]:
    """Return which of the first `count` rows of activations train and which judge; an image has `by_image` rows."""
    every, judges = torch.arange(count), judges.repeat_interleave(by_image)[:count]
    return (every, every) if bool(judges.all()) else (every[~judges], every[judges])


def _spread(targets: Tensor, weight: Tensor, channels: int) -> Tensor:
    """Return the weighted variance of the outputs; errors are stated as a share of it."""
    axes = [axis for axis in range(targets.ndim) if axis != channels % targets.ndim]
    return (targets.var(axes, correction=0) * weight).mean().clamp_min(1e-12)


@torch.no_grad()
def _error(unit: nn.Module, inputs: Tensor, targets: Tensor, weight: Tensor) -> float:
    with everything_rounded(unit):
        pairs = zip(inputs.split(16), targets.split(16), strict=True)
        return sum(float(((unit(x.clone()) - y).square() * weight).sum()) for x, y in pairs) / targets.numel()


def fisher_information(model: nn.Module, images: Tensor, axes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the mean squared gradient of each channel of some modules' outputs, [C], scaled to the mean 1.

    Args:
        model: the fp32 network.
        images: float32 [N, C, H, W].
        axes: the axis of the channels, by the module's name. The channels of a module that the network runs without
            gradients all have 1.
    """
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in images.split(16):
        outputs: dict[str, Tensor] = {}

        def keep(outputs: dict[str, Tensor], name: str, module: nn.Module, values: Any, result: Tensor) -> Tensor:
            outputs[name] = result
            return result.clone()  # an activation may write to what it gets

        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name in axes:
                hook = functools.partial(keep, outputs, name)
                hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
            log_p = model(batch.detach().requires_grad_().clone()).log_softmax(1)  # it may write to its images
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            loss = -log_p.gather(1, drawn).sum()
            known = {name: output for name, output in outputs.items() if output.requires_grad and loss.requires_grad}
            found_now = torch.autograd.grad(loss, list(known.values()), allow_unused=True) if known else ()
        gradients = dict(zip(known, found_now, strict=True))
        for name, output in outputs.items():
            gradient = gradients.get(name)
            if gradient is None:  # a network may run a part without gradients
                gradient = torch.ones_like(output) if name not in known else torch.zeros_like(output)
            others = [axis for axis in range(gradient.ndim) if axis != axes[name] % gradient.ndim]
            found[name] = found.get(name, torch.zeros(())) + gradient.square().sum(others)
    return {name: total / total.mean().clamp_min(1e-30) for name, total in found.items()}
