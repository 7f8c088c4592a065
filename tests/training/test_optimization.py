"""The loss, the optimizer and the learning rate by step, against their formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from quantstudy.params import Training
from quantstudy.training.optimization import make_optimizer, make_schedule, training_loss

RATE, STEPS = 0.1, 20


def settings(**keys: object) -> Training:
    return Training(epochs=4, learning_rate=RATE, **keys)  # type: ignore[arg-type]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_weight_decay_is_for_matrices_and_kernels_alone(name: str, kind: type) -> None:
    model = network()
    found = make_optimizer(model, settings(optimizer=name, weight_decay=0.5))
    assert type(found) is kind
    decay = {id(p): group["weight_decay"] for group in found.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.5 if name in ("0.weight", "3.weight") else 0.0 for name, _ in model.named_parameters()
    }


def test_a_bias_without_a_gradient_stays_a_weight_decays_and_momentum_adds_up() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.fill_(1.0)
    make_optimizer(model, settings(weight_decay=0.5)).step()
    assert torch.equal(model[3].bias, torch.ones(2)) and torch.equal(model[1].weight, torch.ones(4))
    torch.testing.assert_close(model[3].weight, torch.full((2, 4), 1 - RATE * 0.5))
    weight = nn.Parameter(torch.zeros(1, 1))
    model = nn.ParameterList([weight])
    optimizer = make_optimizer(model, settings(momentum=0.5, weight_decay=0.0))
    for _ in range(2):
        weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert weight.item() == pytest.approx(-RATE * (1 + 1.5))


def rates(schedule: str) -> list[float]:
    optimizer = make_optimizer(network(), settings(schedule=schedule))
    steps = make_schedule(optimizer, settings(schedule=schedule), STEPS // 4)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_schedules_follow_their_formulas() -> None:
    wanted = [RATE * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS + 1)]
    assert rates("cosine") == pytest.approx(wanted, abs=1e-9)
    assert set(rates("constant")) == {RATE}
    found = rates("one_cycle")
    peak = found.index(max(found))
    assert peak == pytest.approx(0.3 * STEPS, abs=1) and found[peak] == pytest.approx(RATE, rel=0.02)
    assert found[0] == pytest.approx(RATE / 25) and found[-1] < RATE / 1000
    assert found[: peak + 1] == sorted(found[: peak + 1]) and found[peak:] == sorted(found[peak:], reverse=True)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 2, 1, 1, 0])


def test_label_smoothing_shares_out_a_part_of_the_target(logits: Tensor) -> None:
    target = torch.eye(3)[LABELS] * 0.7 + 0.3 / 3
    wanted = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, LABELS, label_smoothing=0.3), wanted)
    taught = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    target = 0.75 * torch.eye(3)[LABELS] + 0.25 * taught
    wanted = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(training_loss(logits, LABELS, taught=taught, share=0.25), wanted)
