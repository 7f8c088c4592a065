"""Train the codes, scales and biases of a frozen quantized network, for block-wise and for joint fine-tuning.

A weight is s exp(t) clip(round(v)). v starts at the weight's code and learns in units of the step, so one learning rate
suits layers of any size. t and the activation scales learn relative to their start. Gradients pass the rounding
straight through. Layers of more than `LARGE` weights keep their codes: Adam on a hundred million weights takes seconds
per step.

What is learned on a few hundred images is judged on others. `split` holds some of the images out, and `Best` goes back
to the state with the least error on them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.learned import LearnedActivation
from quantstudy.quantization.schemes import WeightScheme

LARGE = 4_000_000
SCALE_SHARE, BIAS_SHARE = 1 / 15, 1 / 30
"""The learning rates of scales, relative to their start, and of biases, as shares of the codes' rate."""
CHECKS = 10
"""How often the error on the held-out images is measured."""
PATIENCE = 4
"""This many checks in a row, each with a larger error than the check before, end the training."""
_KEPT_SHARE, _LEAST_KEPT = 8, 8


class MovingCodes(nn.Module):
    """A weight quantizer whose codes and scales learn; they start at the values of a frozen layer."""

    def __init__(self, codes: Tensor, scale: Tensor, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, codes.shape
        self.register_buffer("start", scale.clone())
        self.start: Tensor
        self.codes = nn.Parameter(scheme.grouped(codes.float()))
        self.log_scale = nn.Parameter(torch.zeros_like(scale))

    def scale(self) -> Tensor:
        """Return the scales, float32 [O, groups]."""
        return self.start * self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight; the argument, the layer's own weight, is not used."""
        rounded = torch.fake_quantize_per_tensor_affine(self.codes, 1.0, 0, self.scheme.lowest, self.scheme.highest)
        return self.scheme.ungrouped(rounded * self.scale().unsqueeze(2), self.shape)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 codes and the scales."""
        codes = self.codes.round().clamp(self.scheme.lowest, self.scheme.highest).to(torch.int8)
        return self.scheme.ungrouped(codes, self.shape), self.scale()


def make_trainable(network: nn.Module, drop: float = 0.0) -> dict[str, str]:
    """Let the biases, activation scales, codes and weight scales of frozen layers learn, and nothing else, in place.

    Args:
        network: quantized, its layers frozen.
        drop: the probability that a value of an activation is not rounded during training.

    Returns:
        The layers whose codes and weight scales do not learn, each with the reason.
    """
    network.requires_grad_(False)
    layers = quantized_layers(network)
    for layer in layers.values():
        layer.forget_dense()
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
        activation = layer.activation
        if activation.scheme.mode == "static":
            grid = (activation.scale, activation.zero_point, activation.scheme.highest)
            activation.learned = LearnedActivation(*grid, drop=drop)
        if layer.shape.numel() <= LARGE:
            layer.weight_quantizer = MovingCodes(layer.weight_codes(), layer.weight_scale.float(), layer.scheme.weight)
    reason = f"more than {LARGE:,} weights: codes and scales stay"
    return {name: reason for name, layer in layers.items() if layer.weight_quantizer is None}


def parameter_groups(network: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return Adam's groups of what `make_trainable` lets learn: codes at `rate`, all else in proportion to it."""
    layers = list(quantized_layers(network).values())
    quantizers = [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    found = [
        {"params": [quantizer.codes for quantizer in quantizers], "lr": rate},
        {"params": [quantizer.log_scale for quantizer in quantizers], "lr": rate * SCALE_SHARE},
        {"params": [layer.bias for layer in layers if layer.bias is not None], "lr": rate * BIAS_SHARE},
    ]
    for layer in layers:
        if (learned := layer.activation.learned) is not None:
            found.append({"params": [learned.scale], "lr": rate * SCALE_SHARE * layer.activation.scale})
    return [group for group in found if group["params"]]


@torch.no_grad()
def freeze_trained(network: nn.Module) -> None:
    """Freeze what `make_trainable` made trainable, in place."""
    for layer in quantized_layers(network).values():
        layer.activation.adopt_learned()
        if layer.weight_quantizer is not None:
            layer.freeze()
        layer.requires_grad_(False)


def split(count: int) -> tuple[int, int]:
    """Return how many of `count` images train, and how many after them judge; too few images do both."""
    kept = max(count // _KEPT_SHARE, _LEAST_KEPT)
    return (count - kept, kept) if count >= 2 * kept else (count, count)


class Best:
    """The trainable parameters' state with the least error so far; the state before training is the first candidate."""

    def __init__(self, network: nn.Module, error: float) -> None:
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.first = self.last = self.error = error
        self.rises = 0
        self._keep()

    def _keep(self) -> None:
        self._values = [parameter.detach().clone() for parameter in self.parameters]

    def add(self, error: float) -> bool:
        """Record the current error; return whether training should go on.

        At high learning rates the error may lie above the first one for long, and fall below it only as the rates
        decay. So `PATIENCE` rises in a row end a training, not the lack of a better error.
        """
        self.rises = self.rises + 1 if error > self.last else 0
        self.last = error
        if error < self.error:
            self.error = error
            self._keep()
        return self.rises < PATIENCE

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best state."""
        for parameter, value in zip(self.parameters, self._values, strict=True):
            parameter.copy_(value)


@contextlib.contextmanager
def everything_rounded(network: nn.Module) -> Iterator[None]:
    """Round all values of a training network's activations (`drop` 0), as the finished network does."""
    learned = [module for module in network.modules() if isinstance(module, LearnedActivation)]
    before = [module.drop for module in learned]
    for module in learned:
        module.drop = 0.0
    try:
        yield
    finally:
        for module, drop in zip(learned, before, strict=True):
            module.drop = drop


def train_to_best(
    network: nn.Module, rate: float, steps: int, loss: Callable[[], Tensor], error: Callable[[], float]
) -> Best:
    """Train what `make_trainable` lets learn, in place, by Adam with a learning rate that falls to 0 by a cosine.

    Args:
        network: the network; it ends in the state with the least error.
        rate: the learning rate of the codes.
        steps: the most steps; an error that keeps rising ends the training earlier.
        loss: returns the loss of the next batch; it is called with gradients enabled.
        error: returns the error on images that `loss` does not see.
    """
    best = Best(network, error())
    if not best.parameters:
        return best
    optimizer = torch.optim.Adam(parameter_groups(network, rate), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    every = max(steps // CHECKS, 1)
    for step in range(steps):
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
        if (step + 1) % every == 0 and not best.add(error()):
            break
    best.restore()
    return best
