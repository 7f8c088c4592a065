import copy

import pytest
import torch
from torch import nn

from quantstudy.quantization.layers import LayerScheme, QuantConv2d, QuantLinear
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.runtimes.weight_only import WeightOnlyLinear, has_kernel, use_weight_only_kernels

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def linear(bits: int, group_size: int | None, shape: tuple[int, int] = (128, 48), bias: bool = True) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear(nn.Linear(*shape, bias=bias), LayerScheme(WeightScheme(bits, group_size)))
    layer.freeze()
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64)], ids=["int4-g32", "int4-g64"])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3), (40,)], ids=str)
@torch.no_grad()
def test_it_computes_the_layer_up_to_bfloat16(
    bits: int, group_size: int | None, dtype: torch.dtype, bias: bool, rows: tuple[int, ...]
) -> None:
    layer = linear(bits, group_size, bias=bias).to(CUDA)
    x = torch.randn(*rows, 128).bfloat16().to(CUDA, dtype)
    found = WeightOnlyLinear(layer)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer(x.float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("layer", "can"),
    [
        (linear(8, None), False),
        (linear(4, 32), True),
        (linear(4, 16), False),
        (linear(4, None), False),
        (linear(4, 32, (100, 48)), False),
        (linear(4, 32, (128, 10)), False),
        (QuantLinear(nn.Linear(32, 16), LayerScheme(WeightScheme(8), ActivationScheme("static", 8))), False),
        (QuantConv2d(nn.Conv2d(32, 16, 1), LayerScheme(WeightScheme(8))), False),
    ],
    ids=["int8", "int4", "small-group", "per-channel", "odd-inputs", "few-outputs", "quantized-input", "convolution"],
)
def test_a_layer_that_no_kernel_takes_is_left(layer: nn.Module, can: bool) -> None:
    layer = copy.deepcopy(layer).to(CUDA)
    assert has_kernel(layer, CUDA) == can
    network = nn.Sequential(layer)
    use_weight_only_kernels(network, CUDA)
    assert isinstance(network[0], WeightOnlyLinear) == can
