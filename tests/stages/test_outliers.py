"""The outliers stage on a calibration file of two layers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from quantstudy import layout
from quantstudy.quantization.observers import collect
from stages import outliers

HISTOGRAMS = ["hist_0.png", "hist_2.png"]


@pytest.fixture
def calibrated(project):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    path = layout.calibration("tiny")
    path.parent.mkdir(parents=True)
    torch.save(collect(model, [(torch.randn(8, 3, 16, 16), torch.zeros(8))], 256), path)
    return project


def test_writes_statistics_and_a_histogram_a_layer(calibrated, capsys: pytest.CaptureFixture[str]) -> None:
    outliers.main(["--study", "tiny"])
    folder = Path("reports/tiny")
    statistics = json.loads((folder / "activation_stats.json").read_text())
    assert statistics["images"] == 8 and list(statistics["layers"]) == ["0", "2"]
    assert statistics["layers"]["2"]["min"] == 0.0
    assert list(statistics["layers"]["2"]["percentiles"]) == ["99.9", "99", "95"]
    found = {path.name: path.read_bytes() for path in sorted((folder / "outlier_quant_results").iterdir())}
    assert list(found) == HISTOGRAMS
    outliers.main(["--study", "tiny"])
    assert all((folder / "outlier_quant_results" / name).read_bytes() == found[name] for name in HISTOGRAMS)
    assert "2 histograms of 8 calibration images" in capsys.readouterr().out
    layout.calibration("tiny").unlink()
    assert "models/tiny/calibration.pt: no such file" in calibrated.failure(outliers.main)
