"""Bytes and SQNR of single layers."""

import copy

import pytest
import torch
from torch import nn

from quantstudy.measure.per_layer import layer_sqnr_db, weight_storage
from quantstudy.network.fp32 import skeleton
from quantstudy.quantization.layers import LayerScheme, quantize_layers
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.quantization.sqnr import SQNR_LIMIT_DB, sqnr_db
from quantstudy.quantization.variant import Variant


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(72, 5)]
    return nn.Sequential(*layers).eval()


def with_rounded(network: nn.Module, bits: dict[str, int]) -> Variant:
    network = copy.deepcopy(network)
    for layer in quantize_layers(network, {name: LayerScheme(WeightScheme(n)) for name, n in bits.items()}).values():
        layer.freeze()
    return Variant(network)


def test_sqnr_and_bytes_of_each_layer(network: nn.Module) -> None:
    images, variant = torch.randn(2, 3, 8, 8), with_rounded(network, {"2": 4})
    found = layer_sqnr_db(network, variant, images)
    assert list(found) == ["0", "2", "4"]
    assert found["0"] == SQNR_LIMIT_DB > found["2"]
    with torch.no_grad():
        assert found["4"] == sqnr_db(network(images).numpy(), variant(images).numpy())
    assert found["2"] < layer_sqnr_db(network, with_rounded(network, {"2": 8}), images)["2"]
    found = weight_storage(with_rounded(network, {"0": 8, "4": 4}))
    assert found == {"0": (108 + 4 * 4, 108), "2": (72 * 4, 72), "4": (180 + 5 * 4, 360)}
    found = weight_storage(skeleton("mobilenet_v2", 10))
    assert len(found) == 53 and all(size == 4 * weights for size, weights in found.values())


class OnlyIfLarge(nn.Module):
    """Runs its second layer if the output of the first is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if x.mean() > 0 else x


def test_a_layer_that_only_one_of_the_two_runs_has_no_sqnr() -> None:
    model, other = OnlyIfLarge().requires_grad_(False), OnlyIfLarge().requires_grad_(False)
    for network, bias in ((model, -9.0), (other, 9.0)):
        network.first.bias.fill_(bias)
    assert [*layer_sqnr_db(model, other, torch.rand(2, 3, 8, 8))] == ["first"]
