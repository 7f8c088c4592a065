from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy.quantization.observers import collect
from quantstudy.quantization.ranges import activation_range, squared_error
from quantstudy.quantization.schemes import ActivationScheme

FOUR = ActivationScheme("static", 4)
EIGHT = ActivationScheme("static", 8)


def statistics(values: Tensor, bins: int = 2048) -> dict[str, Any]:
    layer = nn.Sequential(nn.Linear(values.shape[-1], 1))
    return collect(layer, [(values, torch.empty(0))], bins)["layers"]["0"]  # type: ignore[no-any-return]


@pytest.fixture
def signed() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(200, 64) + 0.3


@pytest.fixture
def relu(signed: Tensor) -> Tensor:
    """Half zeros, a bell, and one outlier far away."""
    values = signed.relu()
    values[0, 0] = 60.0
    return values


def fake_quantized(values: Tensor, bounds: tuple[float, float], scheme: ActivationScheme) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(values, *scheme.choose_qparams(*bounds), 0, scheme.highest)


def test_percentiles_match_the_values_within_a_bin(signed: Tensor) -> None:
    row = statistics(signed)
    width = float(row["edges"][1] - row["edges"][0])
    for percentile in (95.0, 99.0):
        low, high = activation_range(row, EIGHT, "minmax", percentile)
        assert high == pytest.approx(float(signed.quantile(percentile / 100)), abs=2 * width)
        assert low == pytest.approx(float(signed.quantile(1 - percentile / 100)), abs=2 * width)
    assert activation_range(row, EIGHT) == activation_range(row, EIGHT, "minmax", 100.0) == (row["min"], row["max"])
    assert activation_range(row, EIGHT, "moving_average") == tuple(row["moving"])
    centers = (row["edges"][1:] + row["edges"][:-1]).double() / 2
    bounds = (-1.0, 2.0)
    wanted = float((fake_quantized(signed, bounds, FOUR) - signed).square().mean())
    assert squared_error(centers, row["counts"], bounds, FOUR) == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("name", ["signed", "relu"])
def test_mse_has_less_error_than_minmax_and_any_shrunk_range(name: str, request: pytest.FixtureRequest) -> None:
    values = request.getfixturevalue(name)
    row = statistics(values)
    best = activation_range(row, FOUR, "mse")
    errors = {
        share: float((fake_quantized(values, (share * row["min"], share * row["max"]), FOUR) - values).square().mean())
        for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    }
    found = float((fake_quantized(values, best, FOUR) - values).square().mean())
    assert found < 0.9 * errors[1.0]
    assert found <= 1.02 * min(errors.values())


@pytest.mark.parametrize("scheme", [FOUR, EIGHT], ids=["4-bit", "8-bit"])
def test_entropy_cuts_an_outlier_and_keeps_the_bell(relu: Tensor, scheme: ActivationScheme) -> None:
    low, high = activation_range(statistics(relu), scheme, "entropy")
    assert low == 0.0
    assert float(relu.flatten()[1:].quantile(0.9)) < high < 30.0


def test_entropy_keeps_a_flat_distribution() -> None:
    torch.manual_seed(0)
    row = statistics(torch.rand(200, 64))
    _, high = activation_range(row, EIGHT, "entropy")
    assert high > 0.95
