"""Gain correction keeps the size of each output channel: the slope of the quantized output on fp32's is 1."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods.gain_correction import correct_gains, output_gain
from quantstudy.methods.moments import input_moments
from quantstudy.quantization.layers import LayerScheme, quantize_layers
from quantstudy.quantization.schemes import WeightScheme
from tests.methods.test_gptq import LAYERS, correlated


def slope(after: Tensor, before: Tensor) -> Tensor:
    """Of each channel's values on those `before`, by least squares: [C]."""
    x, y = (value.movedim(1, 0).flatten(1).double() for value in (before, after))
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x * x).sum(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group_size", [None, 8], ids=["channel", "group"])
@torch.no_grad()
def test_the_slope_of_every_channel_becomes_one(name: str, group_size: int | None) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), correlated(shape)
    moments, network = input_moments(model, [x]), copy.deepcopy(model)
    (layer,) = quantize_layers(network, {"0": LayerScheme(WeightScheme(3, group_size, "mse"))}).values()
    layer.freeze()
    codes, wanted = layer.weight_codes(), model(x)
    before = slope(network(x), wanted)
    gain = output_gain(model[0].weight, layer.dequantized(), moments["0"]).double()
    torch.testing.assert_close(gain, before, rtol=1e-3, atol=1e-3)
    correct_gains(model, network, moments)
    assert (before - 1).abs().max() > 0.02
    precision = 1e-3 if group_size is None else 1e-2  # scales of groups are bfloat16
    torch.testing.assert_close(slope(network(x), wanted), torch.ones_like(before), rtol=precision, atol=0)
    assert torch.equal(layer.weight_codes(), codes)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.0, 1e-3], ids=["constant", "nearly"])
def test_a_constant_output_is_left_as_it_is(spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = 5 + spread * torch.rand(8, 64)
    model = nn.Sequential(nn.Linear(64, 8))
    weight = model[0].weight.detach()
    weight[0] -= weight[0].mean()  # its output is small too
    gain = output_gain(weight, (weight / 0.1).round() * 0.1, input_moments(model, [x])["0"])
    assert torch.equal(gain, torch.ones(8))


def test_channels_without_codes_or_of_the_wrong_sign_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(64, 4)
    weight = model[0].weight.detach()
    rounded = torch.stack([torch.zeros(4), -weight[1]])
    assert torch.equal(output_gain(weight, rounded, input_moments(model, [x])["0"]), torch.ones(2))
