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
    "relu, kept": lambda: [nn.ReLU()],
    "relu6": lambda: [nn.ReLU6(inplace=True)],
    "hardtanh": lambda: [nn.Hardtanh(-0.5, 0.25, inplace=True)],
}


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalization, "_LEAST", 1)


def fused(model: nn.Module) -> Replaced:
    """The context that replaces BatchNorm alone."""
    replaced = FusedNormalization(model)
    return Replaced({F.batch_norm: replaced.batch_norm}, replaced.forwards)


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
    assert kernels_in(found) == 1
    gradients = (torch.autograd.grad(y, [x, *model.parameters()], towards) for y in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    x = (1000 + 0.01 * torch.randn(4, 8, 50, 50)).contiguous(memory_format=torch.channels_last)
    model = with_parameters(nn.BatchNorm2d(8, eps=1e-9, momentum=1.0))
    with fused(model):
        assert kernels_in(model(x)) == 1
    torch.testing.assert_close(model[0].running_var.double(), x.double().var((0, 2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("towards", [torch.randn(8, 2, 4, 5).transpose(0, 1), torch.randn(1, 8, 1, 1)])
def test_gradients_arrive_in_any_memory_format(towards: Tensor) -> None:
    x, model = images(2, 8, 4, 5), with_parameters(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    with fused(model):
        found = model(x)
    assert kernels_in(found) == 1
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
    assert kernels_in(y) == 1
    y.sum().backward()
    assert y.detach().isnan().all((0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]
    assert x.grad is not None and x.grad.isnan().any((0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]


class Between(nn.Sequential):
    """A chain that reads what is between its layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[1](y.clone()) + y


class Sliced(nn.Sequential):
    """A network that calls parts of a chain by themselves."""

    def forward(self, x: Tensor) -> Tensor:
        chain = self[0]
        y = chain[:1](x)
        for layer in chain:
            x = layer(x)
            y = y + x.mean((2, 3), keepdim=True)
        return y - chain[0](x) + chain[1](x)


class Softplus(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x) - 1


def tied() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Hardswish())
    model[2].weight = model[0].weight
    return model


def shared() -> nn.Module:
    norm, clamp = nn.BatchNorm2d(8), nn.ReLU6()
    return nn.Sequential(norm, clamp, norm, nn.Tanh(), clamp, norm, clamp)


def watched(register: str) -> nn.Module:
    """A hook of the BatchNorm or, where it is called before, of the activation changes what it sees."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    if register == "register_forward_pre_hook":
        model[1].register_forward_pre_hook(lambda module, given: (given[0] - 1,))
    elif register == "register_forward_hook":
        model[0].register_forward_hook(lambda module, given, y: y - 1)
    else:
        model[0].register_full_backward_hook(lambda module, inner, outer: (inner[0] * outer[0].abs().max(),))
    return model


def told() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    model[1].forward = torch.cos
    return model


JOINED_AND_NOT: dict[str, tuple[nn.Module, int]] = {  # and the BatchNorms that have a kernel
    "read between": (Between(nn.BatchNorm2d(8), nn.ReLU(inplace=True)), 1),
    "in parts": (Sliced(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())), 3),
    "another activation": (nn.Sequential(nn.BatchNorm2d(8), nn.LeakyReLU(inplace=True)), 1),
    "not next": (nn.Sequential(nn.BatchNorm2d(8), nn.Identity(), nn.ReLU6(inplace=True)), 1),
    "activation of its own": (nn.Sequential(nn.BatchNorm2d(8), Softplus()), 1),
    "normalization of its own": (nn.Sequential(Scaled(8), nn.ReLU6()), 1),
    "eval": (nn.Sequential(nn.BatchNorm2d(8).eval(), nn.ReLU6()), 0),
    "no weight": (nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.ReLU6(), nn.BatchNorm2d(8)), 1),
    "nested": (nn.Sequential(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU6()), nn.BatchNorm2d(8)), 2),
    "in another chain": (nn.Sequential(nn.Sequential(nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 8, 1)), 1),
    "pre-hook": (watched("register_forward_pre_hook"), 1),
    "hook": (watched("register_forward_hook"), 1),
    "backward hook": (watched("register_full_backward_hook"), 1),
    "forward of its own": (told(), 1),
    "tied weights": (tied(), 2),
    "shared modules": (shared(), 3),
}


@pytest.mark.parametrize("case", JOINED_AND_NOT)
def test_only_the_chain_that_calls_both_joins_them(case: str) -> None:
    model, norms = JOINED_AND_NOT[case]
    twin, towards = copy.deepcopy(model), torch.randn(2, 8, 6, 6)
    outcomes = []
    for network, context in ((model, fused(model)), (twin, Replaced({}))):
        x = images(2, 8, 6, 6)
        with context:
            y = network(x)
        assert kernels_in(y) == (norms if network is model else 0)
        outcomes.append([y, *torch.autograd.grad(y, [x, *network.parameters()], towards, allow_unused=True)])
        outcomes[-1] += network.buffers()
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_nothing_behind() -> None:
    norm = nn.BatchNorm2d(8)
    chain, x = nn.Sequential(norm, nn.ReLU()), images(2, 8, 6, 6)
    context = fused(chain)
    with context:
        with pytest.raises(ValueError, match="4D input"):
            chain(torch.randn(8))
        torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True))


def strided(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.weight = nn.Parameter(torch.rand(8, 2)[:, 0])
    return norm


@pytest.mark.parametrize(
    ("x", "norm"),
    [
        (images(2, 12, 4, 4), nn.BatchNorm2d(12)),
        (torch.randn(2, 8, 4, 4), nn.BatchNorm2d(8)),
        (images(2, 8, 4, 4).double(), nn.BatchNorm2d(8).double()),
        (images(2, 8, 4, 4), nn.BatchNorm2d(8, affine=False)),
        (images(2, 8, 4, 4), nn.BatchNorm2d(8).eval()),
        (images(2, 8, 4, 4), strided(nn.BatchNorm2d(8))),
        (torch.randn(64, 8), nn.BatchNorm1d(8)),
    ],
    ids=["channels", "memory format", "double", "no weight", "eval", "strided", "no maps"],
)
def test_what_has_no_kernel_is_left_to_pytorch(x: Tensor, norm: nn.Module) -> None:
    twin = copy.deepcopy(norm)
    with fused(norm):
        y = norm(x)
    assert not kernels_in(y)
    torch.testing.assert_close([y, *norm.buffers()], [twin(x), *twin.buffers()])


@pytest.mark.parametrize(
    ("vectors", "eps", "reason"),
    [
        ((torch.zeros(8), torch.ones(8), torch.ones(4), torch.zeros(8)), 1e-5, "weight"),
        ((torch.zeros(4), torch.ones(8), torch.ones(8), torch.zeros(8)), 1e-5, "running_mean"),
        ((torch.zeros(8), None, torch.ones(8), torch.zeros(8)), 1e-5, "running_var"),
        ((None, None, torch.ones(8), torch.zeros(8)), 0.0, "eps"),
    ],
)
def test_what_pytorch_refuses_is_refused(vectors: tuple[Tensor, ...], eps: float, reason: str) -> None:
    with fused(nn.BatchNorm2d(8)), pytest.raises((RuntimeError, ValueError), match=reason):
        F.batch_norm(images(2, 8, 4, 4), *vectors, training=True, eps=eps)


def test_at_its_bounds_an_activation_has_no_gradient() -> None:
    """As where training starts with a weight of 0: all values are 0."""
    x, model = images(2, 8, 4, 4), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    with fused(model):
        y = model(x)
    assert kernels_in(y) == 1
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), [x, *model.parameters()]))


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
