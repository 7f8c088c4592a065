"""A small network with every kind of layer that the figures of `docs/` need, trained in seconds on digits.

It is a MobileNet in miniature: a convolution, an inverted residual with a depthwise convolution, BatchNorm and ReLU6
behind each, a linear head; about 8,000 weights on images of 8 by 8 pixels.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.data.digits import digits
from quantstudy.data.images import store
from quantstudy.methods.calibration import Calibration
from quantstudy.network.folding import fold_batchnorm
from quantstudy.params import Preprocessing
from quantstudy.quantization.sqnr import sqnr_db

EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 64, 4e-3
CALIBRATION_IMAGES = 256
BINS = 2048
SEEN = Preprocessing(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass(frozen=True)
class Example:
    """The trained network, with and without BatchNorm folded, and images float32 [N, 3, 8, 8] with their labels."""

    unfolded: nn.Module
    model: nn.Module
    calibration: Calibration
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def top1(self, network: nn.Module) -> float:
        """Return the accuracy on the test images, percent."""
        images, labels = self.test
        with torch.no_grad():
            return 100 * float((network.eval()(images).argmax(1) == labels).float().mean())

    def sqnr_db(self, network: nn.Module) -> float:
        """Return how far the logits of `network` are from the fp32 network's on the test images, dB."""
        with torch.no_grad():
            before, after = (np.asarray(net(self.test[0])) for net in (self.model, network.eval()))
        return sqnr_db(before, after)


class _Residual(nn.Module):
    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(channels, expanded, 1),
            *_block(expanded, expanded, 3, groups=expanded),
            *_block(expanded, channels, 1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _block(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def _network() -> nn.Sequential:
    return nn.Sequential(
        *_block(3, 16, 3),
        _Residual(16, 48),
        *_block(16, 32, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@cache
def example() -> Example:
    """Train the network, with the same result each time on one machine; return it in eval mode."""
    torch.manual_seed(0)
    (images, labels), test = (_pixels(split) for split in store(digits(), SEEN))
    network = _network()
    train(network, (images, labels), EPOCHS, LEARNING_RATE)
    model = fold_batchnorm(network)
    shown = images[:CALIBRATION_IMAGES]
    calibration = Calibration(model, shown.split(BATCH_SIZE), bins=BINS)
    return Example(network, model, calibration, (images, labels), test)


def figure(rows: int, columns: int, height: float = 3.0, **ratios: Any) -> tuple[Figure, Any]:
    """Return an empty figure and its axes: one object for a single panel, else an array."""
    drawn = Figure(figsize=(8.0 if columns > 1 else 6.0, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, **ratios)


def train(network: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rate: float) -> None:
    """Train in place by Adam, the rate falling to zero along a cosine; the network is left in eval mode."""
    images, labels = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)


def _pixels(split: Any) -> tuple[Tensor, Tensor]:
    return split.images.float() / 127.5 - 1, split.labels
