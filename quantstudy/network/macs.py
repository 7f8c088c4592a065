"""Multiply-accumulates per image, counted by PyTorch's FlopCounterMode.

It counts each operator that multiplies, whatever calls it.
"""

from collections import Counter

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quantstudy.network.architectures import Shape, image_shape
from quantstudy.network.graph import LAYERS


@torch.no_grad()
def count_macs(model: nn.Module, image_size: int | Shape) -> tuple[int, dict[str, int]]:
    """Return the multiply-accumulates per image of all matrix products, and of every Conv2d and Linear by its name.

    The total includes products outside the layers, such as attention's. Sums, pooling and normalization count as zero.

    Args:
        model: an fp32 model in eval mode that takes float32 [N, channels, height, width].
        image_size: channels, height and width of an image, or pixels a side of a square RGB image.
    """
    device = next(model.parameters()).device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused operator is not counted
        model(torch.zeros(1, *image_shape(image_size), device=device))
    found = {name.partition(".")[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    by_module: Counter[int] = Counter()  # the counter files a layer that lies at several places under one of them
    for name, module in model.named_modules(remove_duplicate=False):
        by_module[id(module)] += found.get(name, 0)
    return counter.get_total_flops() // 2, {name: by_module[id(module)] for name, module in layers.items()}
