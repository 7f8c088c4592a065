"""The moments of each layer's input on calibration images, which GPTQ and gain correction work on.

A convolution is a linear layer over patches: for each of its groups, X [columns, K] holds a patch of K = (in_channels /
groups) * kH * kW values a column, as `nn.Unfold` lays them out, padding included. A linear layer has one group.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.quantization.observers import quantizable_layers, run_watched

BLOCK = 4096
"""Columns beyond which second moments are kept for blocks of K alone: 25,088 of them (VGG-11) would take 2.5 GB."""
_COLUMNS = 8192


@dataclass
class Moments:
    """Of a layer's input: `mean` [groups, K]; `second`, E[x xᵀ], [groups, k, k] for each block of at most BLOCK."""

    mean: Tensor
    second: list[Tensor]


@torch.no_grad()
def input_moments(
    model: nn.Module, batches: Iterable[Tensor], names: Collection[str] | None = None
) -> dict[str, Moments]:
    """Return the moments of the input of every Conv2d and Linear, or of those of `names`, over `batches` [N, 3, S, S].

    Of each batch a layer sees at most 8,192 patches, evenly spread.
    """
    totals: dict[str, list[Tensor]] = {}
    counts: Counter[str] = Counter()
    layers = {name: layer for name, layer in quantizable_layers(model).items() if names is None or name in names}

    def watch(name: str, value: Tensor) -> None:
        x = _some_patches(layers[name], value)
        sums = [x.sum(1), *(block.mT @ block for block in x.split(BLOCK, dim=2))]
        if name in totals:
            sums = [total.add_(part) for total, part in zip(totals[name], sums, strict=True)]
        totals[name] = sums
        counts[name] += x.shape[1]

    run_watched(model, layers, batches, watch)
    means = {name: [total.div_(counts[name]) for total in found] for name, found in totals.items()}
    return {name: Moments(mean, second) for name, (mean, *second) in means.items()}


def _some_patches(layer: Any, value: Tensor) -> Tensor:
    """Return at most about `_COLUMNS` patches, image by image: those of a whole batch can take gigabytes."""
    if isinstance(layer, nn.Linear):
        return patches(layer, value)[:, :: -(-(value.numel() // value.shape[-1]) // _COLUMNS)]
    first = patches(layer, value[:1])
    step = -(-first.shape[1] * len(value) // _COLUMNS)
    return torch.cat([patches(layer, image[None])[:, ::step] for image in value], dim=1)


def patches(layer: Any, x: Tensor) -> Tensor:
    """Return a layer's input as float32 [groups, patches, K]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    padding = layer.padding if isinstance(layer.padding, tuple) else _same_padding(layer)
    columns = F.unfold(x.float(), layer.kernel_size, layer.dilation, padding, layer.stride)  # [N, C * kH * kW, L]
    columns = columns.unflatten(1, (layer.groups, -1))  # [N, groups, K, L]
    return columns.permute(1, 0, 3, 2).flatten(1, 2)


def _same_padding(layer: Any) -> tuple[int, int]:
    if layer.padding == "valid":
        return (0, 0)
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    height, width = (dilation * (size - 1) // 2 for size, dilation in sizes)
    return (height, width)
