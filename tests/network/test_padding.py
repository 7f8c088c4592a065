"""Convolutions that pad their input themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.network.graph import LAYERS, capture
from quantstudy.network.padding import SamePadding, open_padding, padded_names

Forward = Callable[[Any, Tensor], Tensor]


def same(layer: Any, x: Tensor) -> Tensor:
    """Pad by TensorFlow's rule, only where there is something to pad, and name all arguments."""
    reach = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    totals = [
        max((-(-size // step) - 1) * step + far - size, 0)
        for size, far, step in zip(x.shape[2:], reach, layer.stride, strict=True)
    ]
    if any(totals):
        x = F.pad(x, [side for total in totals[::-1] for side in (total // 2, total - total // 2)])
    return F.conv2d(
        x, layer.weight, layer.bias, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )  # fmt: skip


def layer_of(kind: Any, forward: Forward, *sizes: Any, **keys: Any) -> nn.Module:
    """Return a layer of a subclass of `kind` with that forward pass."""
    layer: nn.Module = type("Own", (kind,), {"forward": forward})(*sizes, **keys)
    return layer


Padded = tuple[Any, Forward, dict[str, Any], tuple[int, ...]]
PADDED: dict[str, Padded] = {
    "same, stride 2": (nn.Conv2d, same, {"kernel_size": 3, "stride": 2}, (17, 24)),
    "same, stride 4": (nn.Conv2d, same, {"kernel_size": 5, "stride": (4, 1), "bias": False}, (19, 22)),
    "same, dilated": (nn.Conv2d, same, {"kernel_size": 3, "stride": 2, "dilation": 3}, (21, 20)),
    "same, depthwise": (nn.Conv2d, same, {"kernel_size": 3, "stride": 2, "groups": 8}, (17, 24)),
    "same, stride 1": (nn.Conv2d, same, {"kernel_size": (3, 5)}, (17, 24)),
    "same, 1 x 1": (nn.Conv2d, same, {"kernel_size": 1}, (17, 24)),
    "right and below": (
        nn.Conv2d,
        lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (0, 1, 0, 1))),
        {"kernel_size": 3, "stride": 2},
        (17, 24),
    ),
    "and its own": (
        nn.Conv2d,
        lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (1, 2), mode="constant", value=0.0)),
        {"kernel_size": 3, "padding": (1, 2)},
        (17, 24),
    ),
    "cropped": (
        nn.Conv2d,
        lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (-1, -1, -1, -1))),
        {"kernel_size": 3},
        (17, 24),
    ),
    "causal": (
        nn.Conv1d,
        lambda layer, x: nn.Conv1d.forward(layer, F.pad(x, (4, 0))),
        {"kernel_size": 3, "dilation": 2},
        (24,),
    ),
    "three axes": (
        nn.Conv3d,
        lambda layer, x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias),
        {"kernel_size": 3},
        (20, 20, 20),
    ),
}
KEEPS_ITS_NAME = {"same, stride 1", "same, 1 x 1"}


@pytest.mark.parametrize("name", PADDED)
@torch.no_grad()
def test_a_layer_that_pads_becomes_a_plain_one(name: str) -> None:
    kind, forward, keys, size = PADDED[name]
    network = nn.Sequential(layer_of(kind, forward, 8, 16, **keys), nn.Flatten())
    x, state = torch.randn(2, 8, *size), copy.deepcopy(network.state_dict())
    assert not capture(network, x).plain
    wanted = network(x)
    open_padding(network)
    assert torch.equal(network(x), wanted), "another result"
    expected = ["0" if name in KEEPS_ITS_NAME else "0.conv"]
    assert (
        list(capture(network, x).plain) == expected == [n for n, m in network.named_modules() if isinstance(m, LAYERS)]
    )
    renamed = padded_names(state, network.state_dict())
    assert renamed.keys() == network.state_dict().keys()
    network.load_state_dict(renamed)
    assert torch.equal(network(x), wanted), "another result after loading"


def standardized(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight / layer.weight.std(), layer.bias, layer.stride, layer.padding)


NOT_PADDED: dict[str, Forward] = {
    "another weight": standardized,
    "no zeros": lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (1, 1, 1, 1), value=1.0)),
    "reflected": lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "something behind": lambda layer, x: nn.Conv2d.forward(layer, x).relu(),
    "something before": lambda layer, x: nn.Conv2d.forward(layer, F.pad(x * 2, (1, 1))),
    "no bias": lambda layer, x: F.conv2d(x, layer.weight),
    "another stride": lambda layer, x: F.conv2d(x, layer.weight, layer.bias, stride=3),
    "padded twice": lambda layer, x: nn.Conv2d.forward(layer, F.pad(F.pad(x, (1, 1)), (1, 1))),
    "cropped, then padded": lambda layer, x: F.conv2d(F.pad(x, (-1, -1)), layer.weight, layer.bias, padding=1),
    "by another rule": lambda layer, x: nn.Conv2d.forward(layer, F.pad(x, (0, x.shape[3] % 2))),
    "by values": lambda layer, x: nn.Conv2d.forward(layer, x if x.mean() > 0 else F.pad(x, (1, 1))),
}


@pytest.mark.parametrize("name", NOT_PADDED)
def test_a_layer_that_does_more_stays(name: str) -> None:
    network = nn.Sequential(layer_of(nn.Conv2d, NOT_PADDED[name], 8, 16, 3))
    before = network[0]
    open_padding(network)
    assert network[0] is before


def test_same_padding_gives_an_output_of_the_size_over_the_stride() -> None:
    for size in range(5, 40):
        for kernel, stride, dilation in ((1, 2, 1), (3, 2, 1), (3, 3, 2), (7, 4, 1)):
            x = torch.zeros(1, 1, size, size)
            padded = SamePadding([kernel] * 2, [stride] * 2, [dilation] * 2)(x)
            reach = dilation * (kernel - 1) + 1
            assert max((padded.shape[2] - reach) // stride + 1, 0) == -(-size // stride)
