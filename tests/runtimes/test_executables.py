"""Executables of networks in 16-bit floats."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantstudy.quantization.variant import cast
from quantstudy.runtimes import executables
from quantstudy.runtimes.executables import build_executable

CPU = torch.device("cpu")


class Convolutions(TorchDispatchMode):
    """Records the types that convolutions run in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.ops.aten.convolution.default:
            self.dtypes.append(args[1].dtype)
        return function(*args, **(kwargs or {}))


class ByName(nn.Module):
    """Calls its convolution with names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(input=x, weight=self.layer.weight, bias=self.layer.bias)


def test_a_network_may_have_a_dtype_of_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    network.dtype = "auto"
    assert build_executable(network, "eager", CPU).run(torch.randn(1, 3, 4, 4)).shape == (1, 2, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_emulated_convolutions_are_float32s_rounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), ByName(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(executables, "arithmetic_is_native", lambda name, device: name == "float32")
    variant = cast(network, dtype)
    expected = variant(images)
    with Convolutions() as convolutions:
        found = build_executable(variant, "eager", CPU).run(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    assert convolutions.dtypes == 2 * [torch.float32]
