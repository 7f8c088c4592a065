"""Calibration statistics against direct computation."""

from pathlib import Path

import pytest
import torch
from torch import nn

from quantstudy.errors import UserError
from quantstudy.quantization.observers import check_calibration, collect, histogram_percentile


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8) * scale, torch.zeros(6)) for scale in (1.0, 3.0)]


def test_every_layer_is_observed_over_all_batches(model: nn.Module, batches: list) -> None:
    found = collect(model, batches, 256)
    values = torch.cat([images for images, _ in batches]).flatten()
    row = found["layers"]["0"]
    assert found["images"] == 12 and list(found["layers"]) == ["0", "3"]
    assert row["min"] == values.min() and row["max"] == values.max()
    assert row["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert row["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert row["counts"].sum() == values.numel()
    low, high = row["moving"]
    first, second = (images for images, _ in batches)
    assert high == pytest.approx(float(first.max() + 0.1 * (second.max() - first.max())), rel=1e-5)
    assert low == pytest.approx(float(first.min() + 0.1 * (second.min() - first.min())), rel=1e-5)


def test_a_constant_input_has_a_histogram() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    row = collect(model, [(torch.full((3, 4), 2.0), torch.zeros(3))], 64)["layers"]["0"]
    assert row["counts"].sum() == 12 and row["min"] == row["max"] == 2.0
    edges, counts = torch.arange(5.0), torch.tensor([10.0, 80.0, 9.0, 1.0], dtype=torch.float64)
    assert histogram_percentile(edges, counts, 99.0) == (0.0, 3.0)
    assert histogram_percentile(edges, counts, 90.0) == (1.0, 2.0)


def test_statistics_are_finite_when_they_are_taken_and_when_they_are_read(model: nn.Module, batches: list) -> None:
    found, path = collect(model, batches, 64) | {"study": "a"}, Path("calibration.pt")
    assert check_calibration(found, path, "a") == found["layers"]
    with pytest.raises(UserError, match="of the study 'a', not 'b'"):
        check_calibration(found, path, "b")
    for key in ("max", "moving", "counts"):
        wrong = torch.as_tensor(found["layers"]["3"][key]) / 0
        with pytest.raises(UserError, match=rf"calibration\.pt: {key} of the input of 3 is not finite"):
            check_calibration({"layers": found["layers"] | {"3": {key: wrong}}}, path)
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="calibration: the input of 3 is not finite"):
        collect(model, batches, 64)
