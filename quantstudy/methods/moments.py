"""The moments of each layer's input on calibration images, for GPTQ and gain correction.

A convolution is a linear layer over patches. For each of its groups, X [patches, K] has one patch per row:
K = (in_channels / groups) * kH * kW values, in the order of `nn.Unfold`, padding included. A linear layer has one
group.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.network.graph import is_transposed
from quantstudy.quantization.observers import quantizable_layers, run_watched

BLOCK = 4096
"""If K is larger, second moments are kept only within blocks of this length: all of K = 25,088 (VGG-11) take 2.5 GB."""
_IMAGES, _PATCHES = 64, 8192
"""Images that are looked at at once, and about the most patches of them, drawn at random.

Patches at equal distances would lie in few columns of the map, the padded border among them, if the distance and the
map's width share a factor.
"""


@dataclass
class Moments:
    """Of a layer's input: `mean` [groups, K]; `second`, E[x xᵀ], [groups, k, k] for each block of at most BLOCK."""

    mean: Tensor
    second: list[Tensor]
    factors: dict[bool, list[tuple[Tensor | None, Tensor]]] = field(default_factory=dict, repr=False)
    """What `gptq` computes of each block on first use, by whether columns are in the order of their power."""
    rounded: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Codes and scales that `gptq` keeps: one network is rounded again and again, in bits that few layers differ in."""


@torch.no_grad()
def input_moments(
    model: nn.Module, batches: Iterable[Tensor], names: Collection[str] | None = None
) -> dict[str, Moments]:
    """Return the moments of the input of every layer, or of those of `names`, over `batches` [N, C, H, W].

    A transposed convolution has no moments: its outputs are not products with patches. Of 64 images, at most about
    8,192 patches of a layer count. They are drawn at random, by a fixed seed, and stand for the others.
    """
    totals: dict[str, list[Tensor]] = {}
    counts: Counter[str] = Counter()
    generators: defaultdict[str, torch.Generator] = defaultdict(lambda: torch.Generator().manual_seed(0))
    layers = {n: layer for n, layer in quantizable_layers(model).items() if not is_transposed(layer)}
    layers = {name: layer for name, layer in layers.items() if names is None or name in names}

    def watch(name: str, value: Tensor) -> None:
        for part in value.split(_IMAGES):
            x, count = _some_patches(layers[name], part, generators[name])
            share = count / x.shape[1]
            sums = [share * x.sum(1), *(share * (block.mT @ block) for block in x.split(BLOCK, dim=2))]
            if name in totals:
                sums = [total.add_(more) for total, more in zip(totals[name], sums, strict=True)]
            totals[name] = sums
            counts[name] += count

    run_watched(model, layers, batches, watch)
    means = {name: [total.div_(counts[name]) for total in found] for name, found in totals.items()}
    return {name: Moments(mean, second) for name, (mean, *second) in means.items()}


def _some_patches(layer: Any, value: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return patches drawn from a layer's input, [groups, patches, K], and how many it has: all can take gigabytes."""
    if isinstance(layer, nn.Linear):
        found = patches(layer, value)
        return found[:, _drawn(found.shape[1], _PATCHES, generator, value.device)], found.shape[1]
    groups, count, length = patches(layer, value[:1]).shape
    each = min(count, -(-_PATCHES // len(value)))
    found = torch.empty(groups, each * len(value), length, device=value.device)
    for number, image in enumerate(value):  # not joined in the end: a part keeps all patches of its image in memory
        places = _drawn(count, each, generator, value.device)
        found[:, number * each : (number + 1) * each] = patches(layer, image[None])[:, places]
    return found, count * len(value)


def _drawn(count: int, most: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return at most `most` of the numbers below `count`, int64, without replacement."""
    return (torch.randperm(count, generator=generator)[:most] if count > most else torch.arange(count)).to(device)


def patches(layer: Any, x: Tensor) -> Tensor:
    """Return a layer's input as float32 [groups, patches, K]; a transposed convolution has no patches."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    sizes, dimensions = list(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)), len(layer.kernel_size)
    x = F.pad(x.float(), layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else _both(layer))
    for axis, (size, dilation, stride) in enumerate(sizes, start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]  # [N, C, places..., kernel...]
    x = x.unflatten(1, (layer.groups, -1))
    order = [1, 0, *range(3, 3 + dimensions), 2, *range(3 + dimensions, 3 + 2 * dimensions)]
    return x.permute(order).flatten(2 + dimensions).flatten(1, 1 + dimensions)


def _both(layer: Any) -> list[int]:
    return [pad for pad in reversed(layer.padding) for _ in range(2)]
