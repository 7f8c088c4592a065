"""Convolutions with quick gradients compute what PyTorch's own compute, and which functions are replaced where."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
        ("cpu", {"avx2"}, True, {F.conv2d, F.batch_norm}),
        ("cpu", {"avx512f"}, True, {F.batch_norm}),
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
        assert set(context.functions if isinstance(context, Replaced) else ()) == expected
        assert isinstance(context, Replaced) == bool(expected)
        for _ in range(2):
            with context:
                pass


def test_a_module_has_its_own_forward_again() -> None:
    layer, x = nn.ReLU(), torch.ones(1)
    context = Replaced({}, {layer: lambda x: -x})
    for _ in range(2):
        with pytest.raises(KeyError), context:
            assert layer(x) == -1
            raise KeyError
        assert layer(x) == 1 and "forward" not in vars(layer)


@pytest.mark.skipif(normalization.library(normalization._SOURCE) is None, reason="no AVX2 or no compiler")
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_by_a_checkpoint_is_the_same(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gradients, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(normalization, "_LEAST", 1)
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), depthwise, nn.BatchNorm2d(8))
    block = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for context in (quick_gradients(block, torch.device("cpu")), Replaced({})):
        with context:
            y = checkpoint(block, x, use_reentrant=reentrant).square() @ torch.randn(2, 3, generator=seeded())
        block.zero_grad()
        y[..., 0].sum().backward()
        found.append([parameter.grad for parameter in block.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
