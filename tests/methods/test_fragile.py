"""Fragile layers get more bits and sturdy ones fewer, within what the file may grow by."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods.calibration import Calibration
from quantstudy.methods.fragile import input_losses_alone, losses_alone, with_fragile_layers
from quantstudy.methods.recipes import quantize
from quantstudy.methods.uniform import output_error, rounded_alone
from quantstudy.network.macs import count_macs
from quantstudy.params import Static, WeightOnly
from quantstudy.quantization.layers import LayerScheme, quantized_layers
from quantstudy.quantization.schemes import WeightScheme


def slow(share: float) -> Any:
    return pytest.param(share, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def calibration(network: nn.Module, images: Tensor) -> Calibration:
    return Calibration(network, [images], bins=512)


def row_of(share: float, bits: int | None = 8) -> WeightOnly:
    how = {"rounding": "gptq", "weight_range": "mse", "bias_correction": True}
    given = {"weight_bits": 4, "group_size": 32, "fragile_bits": bits, "fragile_share": share}
    return WeightOnly.model_validate({"kind": "weight_only"} | how | given)


@pytest.fixture
def small() -> nn.Module:
    """A network with small layers and a large one, whose logits differ from image to image."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU(), nn.Conv2d(32, 128, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128 * 9, 10)).eval()


@pytest.mark.parametrize("share", [slow(0.0), slow(0.005), 0.02, slow(0.1)])
def test_a_file_grows_by_no_more_than_the_share(share: float, small: nn.Module, images: Tensor) -> None:
    calibration = Calibration(small, [images])
    plain, found = (quantize(small, calibration, row_of(share, bits)) for bits in (None, 8))
    sizes = [sum(layer.scheme.weight.layout(layer.shape).nbytes for layer in quantized_layers(v.network).values())
             for v in (plain, found)]  # fmt: skip
    assert sizes[1] <= (1 + share) * sizes[0]
    errors = [output_error(small, variant, calibration.images) for variant in (plain, found)]
    assert errors[1] < errors[0]
    assert {layer.scheme.weight.bits for layer in quantized_layers(plain.network).values()} == {4}


class Two(nn.Module):
    """Two layers of one size, of which one adds a thousandth to what the other gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.faint, self.strong = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        x = self.first(x.flatten(1))
        return self.strong(x) + 1e-3 * self.faint(x)


def test_bits_go_from_where_they_do_least_to_where_they_do_most() -> None:
    torch.manual_seed(0)
    model, scheme = Two().eval().requires_grad_(False), LayerScheme(WeightScheme(4, 32))
    own = Calibration(model, [torch.randn(8, 1, 8, 8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    schemes = dict.fromkeys(own.replaceable, scheme)
    losses = losses_alone(model, own.replaceable, rounded_alone(model, own, row_of(0), schemes)[0], own.images[0])
    assert losses["strong"] > 100 * losses["faint"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = with_fragile_layers(own.replaceable, schemes, losses, 8, 0.0)
    bits = {name: scheme.weight.bits for name, scheme in found.items()}
    assert bits["faint"] == 3 and max(bits["first"], bits["strong"]) == 5


def test_more_than_four_bits_and_edges_stay(network: nn.Module, calibration: Calibration) -> None:
    for row in (WeightOnly(kind="weight_only", weight_bits=5), Static(kind="static", weight_bits=2, fragile_bits=None)):
        layers = quantized_layers(quantize(network, calibration, row).network).values()
        assert {layer.scheme.weight.bits for layer in layers} == {row.weight_bits}
    edges = Static(kind="static", weight_bits=4, edge_bits=8)
    bits = [
        layer.scheme.weight.bits for layer in quantized_layers(quantize(network, calibration, edges).network).values()
    ]
    assert (bits[0], bits[-1]) == (8, 8) and max(bits[1:-1]) <= 7


def static_row(share: float, bits: int | None = 8) -> Static:
    given = {"weight_bits": 4, "activation_bits": 4, "edge_bits": 8, "fragile_bits": bits, "fragile_operations": share}
    return Static.model_validate({"kind": "static", "rounding": "gptq", "activation_range": "mse"} | given)


def operations(calibration: Calibration, variant: nn.Module) -> int:
    layers = quantized_layers(variant.network)  # type: ignore[arg-type]
    _, macs = count_macs(calibration.model, tuple(calibration.images[0].shape[1:]))  # type: ignore[arg-type]
    return sum(macs[name] * layer.scheme.weight.bits * layer.activation.scheme.bits for name, layer in layers.items())


@pytest.mark.parametrize("share", [slow(share) for share in (0.0, 0.1, 0.5, 4.0)])
def test_inputs_get_more_bits_within_the_share_of_operations(
    share: float, network: nn.Module, calibration: Calibration
) -> None:
    plain, found = (quantize(network, calibration, static_row(own)) for own in (0.0, share))
    assert operations(calibration, found) <= (1 + share) * operations(calibration, plain)
    bits = [layer.activation.scheme.bits for layer in quantized_layers(found.network).values()]
    assert min(bits) >= 4 and max(bits) <= 8 and (share > 0 or sorted(set(bits)) == [4, 8])
    errors = [output_error(network, variant, calibration.images) for variant in (plain, found)]
    assert errors[1] < errors[0] or share == 0
    alike = quantize(network, calibration, static_row(share, None))
    assert {layer.activation.scheme.bits for layer in quantized_layers(alike.network).values()} == {4, 8}


def test_inputs_of_six_bits_get_more_and_those_of_seven_do_not(small: nn.Module, images: Tensor) -> None:
    calibration = Calibration(small, [images])
    for bits, widths in ((6, {6, 7, 8}), (7, {7})):
        row = Static(kind="static", weight_bits=8, activation_bits=bits, fragile_operations=0.1)
        layers = quantized_layers(quantize(small, calibration, row).network).values()
        found = {layer.activation.scheme.bits for layer in layers}
        assert found <= widths and len(found) >= min(len(widths), 2)


def test_an_input_that_is_given_by_name_is_rounded_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            """Name the input."""
            y: Tensor = self.layer(input=x)
            return y

    model, x = Named(), torch.randn(8, 4)
    assert input_losses_alone(model, {"layer": torch.zeros_like}, x)["layer"] > 0.1


@torch.no_grad()
def test_multiply_accumulates_are_those_of_the_layers() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(2), nn.Linear(64, 5)
    )
    assert list(count_macs(network, (4, 6, 6))[1].values()) == [2 * 9 * 8 * 16, 8 * 6 * 4 * 16, 64 * 5 * 6]


def test_a_file_may_have_the_least_and_the_most_bits_alone(network: nn.Module, calibration: Calibration) -> None:
    row = row_of(0.1).model_copy(update={"fragile_between": False})
    found = quantize(network, calibration, row)
    assert {layer.scheme.weight.bits for layer in quantized_layers(found.network).values()} == {4, 8}
