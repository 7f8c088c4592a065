"""Convolutions with quick gradients compute what PyTorch's own compute, and which functions are replaced where."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantstudy import gradients, normalization
from quantstudy.gradients import Replaced, padded_conv2d, quick_gradients

PADDED = Replaced({F.conv2d: padded_conv2d})


@pytest.mark.parametrize(
    ("size", "kernel", "geometry"),
    [
        ((1, 1), 3, {"padding": 1}),
        ((1, 1), 3, {"padding": 1, "stride": 2, "bias": False}),
        ((1, 1), 3, {"padding": 2, "dilation": 2}),
        ((1, 1), 3, {"padding": 2}),
        ((1, 1), (1, 5), {"padding": (0, 2)}),
        ((2, 2), 3, {"padding": 1}),
        ((2, 1), 3, {"padding": 1, "stride": (2, 1)}),
        ((3, 4), 5, {"padding": 2, "stride": 2}),
        ((1, 1), 3, {"padding": 1, "out_channels": 12}),
        ((2, 2), 3, {"padding": "same"}),
        ((2, 2), 3, {"padding": 1, "padding_mode": "reflect"}),
        ((4, 4), 3, {"padding": 1}),
        ((1, 1), 3, {"padding": 1, "groups": 1}),
        ((1, 1), 3, {"padding": 1, "groups": 2}),
    ],
)
def test_values_and_gradients_stay(size: tuple[int, int], kernel: Any, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    arguments = {"out_channels": 6, "groups": 6} | geometry
    layer = nn.Conv2d(6, kernel_size=kernel, **arguments).double()
    x = torch.randn(3, 6, *size, dtype=torch.double, requires_grad=True)
    wanted = layer(x)
    with PADDED:
        found = layer(x)
    torch.testing.assert_close(found, wanted)
    towards = torch.randn_like(wanted)
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, towards), torch.autograd.grad(wanted, inputs, towards)
    )


@pytest.mark.parametrize(
    ("x", "weight", "geometry"),
    [
        (torch.randn(4, 1, 1), torch.randn(4, 1, 3, 3), (1, 1, 1, 4)),
        (torch.randn(2, 4, 2, 2), torch.randn(4, 1, 3, 3), ((1,), (1,), (1,), 4)),
        (torch.randn(2, 1, 1, 1), torch.randn(4, 1, 3, 3), (1, 1, 1, 4)),
        (torch.randn(2, 4, 1, 1).double(), torch.randn(4, 1, 3, 3), (1, 1, 1, 4)),
    ],
    ids=["unbatched", "short geometry", "too few channels", "two types"],
)
def test_what_pytorch_takes_or_refuses_stays(x: torch.Tensor, weight: torch.Tensor, geometry: tuple[Any, ...]) -> None:
    def outcome() -> torch.Tensor | str:
        try:
            return nn.functional.conv2d(x, weight, None, *geometry)
        except RuntimeError as error:
            return str(error)

    wanted = outcome()
    with PADDED:
        found = outcome()
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted)
    else:
        assert found == wanted


def test_only_a_depthwise_convolution_of_a_small_map_is_replaced() -> None:
    x = torch.randn(2, 4, 1, 1)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    with PADDED:
        assert layer(x).grad_fn.name() == "AddBackward0"
        assert layer(torch.randn(2, 4, 3, 3)).grad_fn.name() == "ConvolutionBackward0"
        assert nn.Conv2d(4, 4, 3, padding=1)(x).grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize(
    ("kind", "flags", "compiled", "replaced"),
    [
        ("cpu", {"avx2"}, True, {F.conv2d, F.batch_norm, F.relu, F.hardtanh}),
        ("cpu", {"avx512f"}, True, {F.batch_norm, F.relu, F.hardtanh}),
        ("cpu", {"avx2"}, False, {F.conv2d}),
        ("cuda", {"avx2"}, True, set()),
    ],
)
def test_what_is_slow_is_replaced(
    kind: str, flags: set[str], compiled: bool, replaced: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(gradients, "is_x86", lambda: True)
    monkeypatch.setattr(normalization, "library", lambda source: object() if compiled else None)
    for network, expected in ((nn.Sequential(nn.BatchNorm2d(8)), replaced), (nn.Linear(2, 2), replaced & {F.conv2d})):
        context = quick_gradients(network, torch.device(kind))
        assert set(getattr(context, "functions", {})) == expected
        for _ in range(2):
            with context:
                pass
