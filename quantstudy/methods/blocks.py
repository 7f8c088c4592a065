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
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantstudy.methods.reconstruction import cached, find_units
from quantstudy.methods.trainable import everything_rounded, freeze_trained, make_trainable, split, train_to_best

RATE = 0.005
BATCH_SIZE = 32
PLACES = 2**16
"""The most positions of a unit's input in a batch; a batch has at least 8 images."""
DROP = 0.5
MEMORY = 1e9
"""The most bytes of activations to keep for a unit."""
_FISHER_IMAGES = 64


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
    units, left = find_units(network), dict[str, str]()
    weights = fisher_information(reference, images[:_FISHER_IMAGES], list(units))
    with tqdm(units.items(), desc="reconstruction", unit="unit", leave=False, mininterval=1.0) as bar:
        for name, unit in bar:
            kept = make_trainable(unit, DROP)
            left |= {f"{name}.{layer}" if layer else name: why for layer, why in kept.items()}
            if any(parameter.requires_grad for parameter in unit.parameters()):
                with everything_rounded(unit):
                    rounded, targets, plain = cached(reference, network, name, images.split(16), MEMORY, plain=True)
                before, after = _learn(unit, rounded, targets, plain, weights[name], steps)
                del rounded, targets, plain  # before those of the next unit are kept
                bar.set_postfix_str(f"{name}: error {before:.3g} -> {after:.3g}")
            freeze_trained(unit)
    return left


def _learn(
    unit: nn.Module, rounded: Tensor, targets: Tensor, plain: Tensor, weight: Tensor, steps: int
) -> tuple[float, float]:
    """Train one unit; return its error on the held-out images, before and after."""
    train, judge = split(len(targets))
    weight = weight.view(-1, *[1] * (targets.ndim - 2)) / _spread(targets, weight)
    generator = torch.Generator().manual_seed(0)
    size = min(max(PLACES // max(plain[0, 0].numel(), 1), 8), BATCH_SIZE) if plain.ndim > 2 else BATCH_SIZE

    def loss() -> Tensor:
        chosen = torch.randint(train, (size,), generator=generator)
        keep = torch.rand(plain[chosen].shape, generator=generator) < DROP
        found = unit(torch.where(keep, plain[chosen], rounded[chosen]))
        return ((found - targets[chosen]).square() * weight).mean()

    best = train_to_best(unit, RATE, steps, loss, lambda: _error(unit, rounded[-judge:], targets[-judge:], weight))
    return best.first, best.error


def _spread(targets: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted variance of the outputs; errors are stated as a share of it."""
    axes = [axis for axis in range(targets.ndim) if axis != 1]
    return (targets.var(axes, correction=0) * weight).mean().clamp_min(1e-12)


@torch.no_grad()
def _error(unit: nn.Module, inputs: Tensor, targets: Tensor, weight: Tensor) -> float:
    with everything_rounded(unit):
        pairs = zip(inputs.split(16), targets.split(16), strict=True)
        return sum(float(((unit(x) - y).square() * weight).sum()) for x, y in pairs) / targets.numel()


def fisher_information(model: nn.Module, images: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return the mean squared gradient of each channel of the named modules' outputs, [C], scaled to the mean 1."""
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in images.split(16):
        outputs: dict[str, Tensor] = {}

        def keep(outputs: dict[str, Tensor], name: str, module: nn.Module, values: Any, result: Tensor) -> None:
            outputs.setdefault(name, result)

        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name in names:
                hook = functools.partial(keep, outputs, name)
                hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
            log_p = model(batch.clone().requires_grad_(True)).log_softmax(1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(-log_p.gather(1, drawn).sum(), list(outputs.values()), allow_unused=True)
        for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
            gradient = torch.zeros_like(output) if gradient is None else gradient
            axes = [axis for axis in range(gradient.ndim) if axis != 1]
            found[name] = found.get(name, torch.zeros(())) + gradient.square().sum(axes)
    return {name: total / total.mean().clamp_min(1e-30) for name, total in found.items()}
