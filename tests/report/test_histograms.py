"""The outliers of a layer's input, from its histogram."""

from pathlib import Path

import pytest
import torch

from quantstudy.errors import UserError
from quantstudy.report.histograms import check_calibration, histogram_name, layer_statistics

PERCENTILES = (99.9, 99.0, 95.0)


def layer(values: torch.Tensor, bins: int = 512) -> dict[str, object]:
    low, high = (float(bound) for bound in torch.aminmax(values))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std(unbiased=False)),
        "edges": torch.linspace(low, high, bins + 1),
        "counts": torch.histc(values, bins, low, high).double(),
    }


def test_statistics_of_a_normal_input() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    facts = layer_statistics(layer(values), PERCENTILES)
    assert facts["kurtosis"] == pytest.approx(3, abs=0.1)
    assert list(facts["percentiles"]) == ["99.9", "99", "95"]
    for name, quantile in (("95", 1.645), ("99", 2.326), ("99.9", 3.09)):
        row = facts["percentiles"][name]
        assert (row["low"], row["high"]) == pytest.approx((-quantile, quantile), abs=0.1)
        assert row["outlier_fraction"] == pytest.approx(2 * (100 - float(name)) / 100, rel=0.25)
        assert row["range_ratio"] == pytest.approx((facts["max"] - facts["min"]) / (row["high"] - row["low"]))
    facts = layer_statistics(layer(torch.full((100,), 2.0)), PERCENTILES)
    assert facts["kurtosis"] is None and facts["percentiles"]["95"]["outlier_fraction"] == 0.0
    assert histogram_name("features.18.conv.0.0") == "hist_features.18.conv.0.0.png"
    assert histogram_name("../a b/é") == "hist_.._a_b__.png"


@pytest.mark.parametrize("content", [None, {}, {"layers": {}}, {"layers": [1]}])
def test_not_a_calibration_file(content: object) -> None:
    with pytest.raises(UserError, match=r"a\.pt: not a calibration file; run calibrate again"):
        check_calibration(content, Path("a.pt"))
