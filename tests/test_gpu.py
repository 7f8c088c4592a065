"""What only a GPU runs; skipped without one."""

import pytest
import torch
from torch import nn

from quantstudy.machine.device import set_up
from quantstudy.measure.latency import time_alternately
from quantstudy.measure.memory import with_peak_memory_mb
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.params import load_params
from quantstudy.runtimes.executables import build_executable, worth_compiling
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Linear(64, 16)).eval()


@pytest.mark.parametrize("method", ["fp32", "bf16", "int8_weight_only", "int4_weight_only"])
@torch.no_grad()
def test_compiled_with_cuda_graphs_it_computes_the_same(method: str) -> None:
    set_up(0)

    def made() -> nn.Module:
        row = None if method == "fp32" else load_params(ROOT / "params.yaml").method(method)
        return quantize(network(), Calibration(network(), []), row) if row else network()

    assert worth_compiling(made(), CUDA)
    eager, compiled = (build_executable(made(), runtime, CUDA) for runtime in ("eager", "inductor"))
    assert eager.layers == compiled.layers
    for size in (1, 16, 1):
        images = torch.randn(size, 3, 8, 8, device=CUDA).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled.run(images), eager.run(images), rtol=0.02, atol=0.02)
    calls = {runtime: (lambda run=run: run(images)) for runtime, run in (("a", eager.run), ("b", compiled.run))}
    assert all(timing.median_ms > 0 for timing in time_alternately(calls, 0.1, on_cuda=True).values())


def test_float32_is_not_rounded_to_tf32() -> None:
    set_up(0)
    x, weight = torch.randn(1, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = nn.functional.conv2d(x.double(), weight.double())
    found = nn.functional.conv2d(x.cuda(), weight.cuda()).cpu()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_peak_memory_is_that_of_the_work() -> None:
    _, peak = with_peak_memory_mb(lambda: torch.empty(50_000_000, dtype=torch.uint8, device=CUDA), CUDA)
    assert peak == pytest.approx(50, rel=0.1)
