"""Fragile layers keep more bits, within what the file may grow."""

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods.calibration import Calibration
from quantstudy.methods.fragile import losses_alone, with_fragile_layers
from quantstudy.methods.recipes import quantize
from quantstudy.params import Static, WeightOnly
from quantstudy.quantization.layers import LayerScheme, quantized_layers
from quantstudy.quantization.schemes import WeightScheme

FOUR = WeightScheme(4, 32)


@pytest.fixture(scope="module")
def calibration(network: nn.Module, images: Tensor) -> Calibration:
    return Calibration(network, [images], bins=512)


def bits_of(model: nn.Module, calibration: Calibration, share: float, bits: int | None = 8) -> dict[str, int]:
    schemes = {name: LayerScheme(FOUR) for name in calibration.replaceable}
    found = with_fragile_layers(model, calibration, schemes, bits, share)
    return {name: scheme.weight.bits for name, scheme in found.items()}


def nbytes(calibration: Calibration, bits: dict[str, int]) -> int:
    layers = calibration.replaceable
    return sum(WeightScheme(width, 32).layout(layers[name].weight.shape).nbytes for name, width in bits.items())


@pytest.mark.parametrize("share", [0.0, 0.005, 0.02, 0.1])
def test_a_file_grows_by_no_more_than_the_share(share: float, network: nn.Module, calibration: Calibration) -> None:
    before = nbytes(calibration, dict.fromkeys(calibration.replaceable, 4))
    bits = bits_of(network, calibration, share)
    assert nbytes(calibration, bits) <= (1 + share) * before
    assert (8 in bits.values()) == (share > 0)


def test_depthwise_layers_and_the_first_come_before_others(network: nn.Module, calibration: Calibration) -> None:
    layers = calibration.replaceable
    depthwise = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
    first = calibration.graph.order[0]
    bits = bits_of(network, calibration, 0.02)
    kept = {name for name, width in bits.items() if width == 8}
    assert kept and (kept <= depthwise | {first} or depthwise | {first} <= kept)


def test_the_layer_that_hurts_most_is_kept() -> None:
    class Two(nn.Module):
        """Two layers of one size, of which one adds a thousandth to what the other gives."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.faint, self.strong = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1))
            return self.strong(x) + 1e-3 * self.faint(x)

    torch.manual_seed(0)
    model = Two().eval()
    own = Calibration(model, [torch.randn(8, 1, 8, 8)])
    assert {name for name, width in bits_of(model, own, 0.7).items() if width == 8} == {"first", "strong"}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = losses_alone(model, own, dict.fromkeys(own.replaceable, FOUR))
    assert losses["strong"] > 100 * losses["faint"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_more_than_four_bits_and_none_leave_all_alike(network: nn.Module, calibration: Calibration) -> None:
    assert set(bits_of(network, calibration, 0.02, None).values()) == {4}
    for row in (
        WeightOnly(kind="weight_only", weight_bits=5),
        Static(kind="static", weight_bits=2, fragile_bits=None),
    ):
        layers = quantized_layers(quantize(network, calibration, row).network).values()
        assert {layer.scheme.weight.bits for layer in layers} == {row.weight_bits}
