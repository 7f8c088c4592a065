"""What a network of quantized layers tells about itself."""

from typing import Any

import pytest
import torch
from torch import nn

from quantstudy.network.attention import Product
from quantstudy.quantization.layers import ActivationQuantizer, activation_modes
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from tests.runtimes.variants import DYNAMIC, FLOAT, STATIC, quantized


@pytest.mark.parametrize("scheme", [DYNAMIC, ActivationScheme("dynamic", 4), STATIC, FLOAT], ids=str)
def test_activation_modes_are_those_of_every_layer_and_operand(scheme: ActivationScheme) -> None:
    network: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    assert activation_modes(network) == set()
    made: Any = quantized(network, torch.randn(2, 3, 2, 2), WeightScheme(8), scheme)
    assert activation_modes(made) == {scheme.mode}
    made.network[1].activation.scheme = STATIC
    assert activation_modes(made) == {"static", scheme.mode}
    product: Any = Product()
    product.right = ActivationQuantizer(scheme)
    assert activation_modes(nn.ModuleList([network, product])) == {scheme.mode}
