"""The judge runs a variant as it would run when shipped."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.search import judging
from tests.runtimes.variants import quantized


@pytest.mark.parametrize(("mode", "bits"), [("dynamic", 8), ("dynamic", 4), ("static", 4), ("none", 32)])
def test_batches_are_as_large_as_the_goals_if_results_depend_on_them(
    mode: Any, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = P.Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    images, sizes = torch.zeros(4, 3, 8, 8), list[int]()
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))

    def run(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch[:, 0, 0, :5]

    monkeypatch.setattr(judging, "exported_model", lambda *_: None)
    monkeypatch.setattr(judging, "open_session", lambda *_: SimpleNamespace(run=run))
    judge = judging.Judge(network, None, seen, None, P.Goal(max_drop=1.0, batch_size=2), 1)  # type: ignore[arg-type]
    variant = quantized(network, images, WeightScheme(8), ActivationScheme(mode, bits))
    split = Split(torch.zeros(4, dtype=torch.int64), ("a", "b"), seen, images.to(torch.uint8))
    judge.logits(judge.shipped(variant), split)
    assert sizes == ([2, 2] if mode == "dynamic" else [64])
