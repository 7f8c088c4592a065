"""BatchNorm and its activation in one compute what PyTorch computes, and are joined only where that is the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy import normalization
from quantstudy.gradients import Replaced
from quantstudy.machine.compiler import library
from quantstudy.normalization import FusedNormalization

pytestmark = pytest.mark.skipif(library(normalization._SOURCE) is None, reason="no AVX2 or no compiler")
CLAMPS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": list,
    "relu": lambda: [nn.ReLU(inplace=True)],
    "relu6": lambda: [nn.ReLU6(inplace=True)],
    "hardtanh": lambda: [nn.Hardtanh(-0.5, 0.25, inplace=True)],
}


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "_LEAST", 1)


def fused(model: nn.Module) -> Replaced:
    """The context that replaces the functions of BatchNorm and of activations alone."""
    replaced = FusedNormalization(model)
    return Replaced({F.batch_norm: replaced.batch_norm, F.relu: replaced.relu, F.hardtanh: replaced.hardtanh})


def images(*shape: int) -> Tensor:
    """Maps whose channels have means of some standard deviations, channels_last."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 0.7 + 3 * torch.randn(1, shape[1], 1, 1)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def kernels_in(y: Tensor) -> int:
    """How many BatchNorms `y` was computed by kernels of."""
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [each for each, _ in node.next_functions]
    return sum(node.name() == "_FusedBackward" for node in seen)


def with_parameters(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.train()


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((6, 8, 1, 1), {}),
        ((3, 16, 5, 7), {"momentum": None}),
        ((1, 8, 40, 41), {"eps": 0.1, "momentum": 0.3}),
        ((5, 24, 31, 3), {"track_running_stats": False}),
    ],
)
def test_values_gradients_and_statistics_stay(shape: tuple[int, ...], settings: dict[str, Any], clamp: str) -> None:
    x = images(*shape)
    model = with_parameters(nn.BatchNorm2d(shape[1], **settings), *CLAMPS[clamp]())
    exact, wide = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    towards = torch.randn(shape)
    for _ in range(2):  # whose second changes statistics that are not those of the start
        with fused(model):
            y = model(x)
        wanted = exact(wide)
        found = torch.autograd.grad(y, [x, *model.parameters()], towards)
        expected = torch.autograd.grad(wanted, [wide, *exact.parameters()], towards.double())
    assert kernels_in(y) == 1
    for one, other in zip((y, *found, *model.buffers()), (wanted, *expected, *exact.buffers()), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_row_is_summed_with_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = images(3, 8, 30, 31), with_parameters(nn.BatchNorm2d(8))
    towards = torch.randn_like(x)
    wanted = F.batch_norm(x, None, None, *model.parameters(), training=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with fused(model):
        found = model(x)
    gradients = (torch.autograd.grad(y, [x, *model.parameters()], towards) for y in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    x = (1000 + 0.01 * torch.randn(4, 8, 50, 50)).contiguous(memory_format=torch.channels_last)
    model = with_parameters(nn.BatchNorm2d(8, eps=1e-9, momentum=1.0))
    with fused(model):
        model(x)
    torch.testing.assert_close(model[0].running_var.double(), x.double().var((0, 2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("towards", [torch.randn(8, 2, 4, 5).transpose(0, 1), torch.randn(1, 8, 1, 1)])
def test_gradients_arrive_in_any_memory_format(towards: Tensor) -> None:
    x, model = images(2, 8, 4, 5), with_parameters(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    with fused(model):
        found = model(x)
    gradients = (torch.autograd.grad(y, x, towards.expand(2, 8, 4, 5)) for y in (found, model(x)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_not_a_number_stays(clamp: str) -> None:
    """Else training that diverged would look as if it had not."""
    x, model = images(2, 8, 4, 4).detach(), with_parameters(nn.BatchNorm2d(8), *CLAMPS[clamp]())
    x[0, 3, 1, 1] = torch.nan
    x.requires_grad_()
    with fused(model):
        y = model(x)
    y.sum().backward()
    assert y.detach().isnan().all((0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]
    assert x.grad is not None and x.grad.isnan().any((0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]


class Between(nn.Sequential):
    """A chain that reads what is between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[1](y.clone()) + y


def shared() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(norm, nn.ReLU(inplace=True), norm)


def watched(what: str) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    if what == "norm":
        model[0].register_forward_hook(lambda module, given, y: y - 1)
    else:
        model[1].register_forward_pre_hook(lambda module, given: (given[0] - 1,))
    return model


@pytest.mark.parametrize(
    "model",
    [
        Between(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(8), nn.LeakyReLU(inplace=True)),
        nn.Sequential(nn.BatchNorm2d(8), nn.Identity(), nn.ReLU6(inplace=True)),
        watched("norm"),
        watched("activation"),
        shared(),
    ],
    ids=["read between", "not in place", "leaky", "not next", "hook", "pre-hook", "shared"],
)
def test_an_activation_is_joined_only_where_nobody_sees_what_is_between(model: nn.Module) -> None:
    x, twin = images(2, 8, 6, 6), copy.deepcopy(model)
    context = fused(model)
    with context:
        y = model(x)
    assert not context.functions[F.batch_norm].__self__._ranges  # type: ignore[attr-defined]
    assert kernels_in(y) >= 1
    torch.testing.assert_close(y, twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "norm"),
    [
        (images(2, 12, 4, 4), nn.BatchNorm2d(12)),
        (torch.randn(2, 8, 4, 4), nn.BatchNorm2d(8)),
        (images(2, 8, 4, 4).double(), nn.BatchNorm2d(8).double()),
        (images(2, 8, 4, 4), nn.BatchNorm2d(8, affine=False)),
        (images(2, 8, 4, 4), nn.BatchNorm2d(8).eval()),
        (torch.randn(64, 8), nn.BatchNorm1d(8)),
    ],
    ids=["channels", "memory format", "double", "no weight", "eval", "no maps"],
)
def test_what_has_no_kernel_is_left_to_pytorch(x: Tensor, norm: nn.Module) -> None:
    twin = copy.deepcopy(norm)
    with fused(norm):
        y = norm(x)
    assert not kernels_in(y)
    torch.testing.assert_close([y, *norm.buffers()], [twin(x), *twin.buffers()])


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    model = nn.BatchNorm2d(8)
    with fused(model), pytest.raises(ValueError, match="more than 1 value per channel"):
        model(images(1, 8, 1, 1))


def test_small_maps_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = nn.BatchNorm2d(8)
    with fused(model):
        assert not kernels_in(model(images(2, 8, 8, 8)))
        assert kernels_in(model(images(2, 8, 128, 128)))
