import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods import gptq as module
from quantstudy.methods.gptq import gptq, gptq_codes
from quantstudy.methods.moments import Moments, input_moments, patches
from quantstudy.quantization.schemes import WeightScheme

Case = tuple[nn.Module, Tensor]
LAYERS = {
    "linear": (lambda: nn.Linear(40, 12), (64, 40)),
    "convolution": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=1), (16, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2), (16, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding="same"), (16, 8, 9, 9)),
}


def correlated(shape: tuple[int, ...]) -> Tensor:
    """Images or rows whose channels are strongly correlated, which is what GPTQ makes use of."""
    x = torch.randn(shape) + 2 * torch.randn(shape[0], *[1] * (len(shape) - 1))
    return x.relu()


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make(), correlated(shape)


def output(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer computes with another weight."""
    before = layer.weight.data
    layer.weight.data = weight
    with torch.no_grad():
        y = layer(x)
    layer.weight.data = before
    return y


@torch.no_grad()
def test_patches_times_the_weight_is_the_layer_and_moments_are_of_all_batches(case: Case) -> None:
    layer, x = case
    found = patches(layer, x)
    rows = layer.weight.flatten(1).unflatten(0, (len(found), -1))
    y = (found @ rows.mT).permute(0, 2, 1).flatten(0, 1)  # [out, patches]
    wanted = layer(x)
    wanted = wanted.transpose(0, 1).flatten(1) if wanted.ndim == 4 else wanted.T
    torch.testing.assert_close(y + layer.bias[:, None], wanted, rtol=1e-4, atol=1e-4)
    model = nn.Sequential(layer)
    whole, parts = input_moments(model, [x])["0"], input_moments(model, x.chunk(4))["0"]
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.second, whole.second)


@pytest.mark.parametrize("scheme", [WeightScheme(4), WeightScheme(3), WeightScheme(4, 32)], ids=["w4", "w3", "w4-g32"])
def test_the_output_error_is_below_that_of_rounding_to_nearest(case: Case, scheme: WeightScheme) -> None:
    layer, x = case
    weight = layer.weight.detach()
    scale = scheme.choose_scale(weight)
    moments = input_moments(nn.Sequential(layer), [x])["0"]
    wanted = output(layer, weight, x)
    errors = [
        (output(layer, scheme.dequantize(codes, scale), x) - wanted).square().sum()
        for codes in (gptq_codes(weight, scale, scheme, moments), scheme.quantize(weight, scale))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_weight_is_rounded_once_in_each_scheme(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = case
    weight, moments = layer.weight.detach(), input_moments(nn.Sequential(layer), [x])["0"]
    first, scale = gptq(weight, WeightScheme(4), moments)
    assert torch.equal(first, gptq_codes(weight, scale, WeightScheme(4), moments))
    other, _ = gptq(2 * weight, WeightScheme(4), moments)
    assert torch.equal(first, other)  # a scale twice as large
    monkeypatch.setattr(module, "gptq_codes", None)
    again, same = gptq(weight.clone(), WeightScheme(4), moments)
    assert torch.equal(first, again) and torch.equal(scale, same)
    again.zero_()
    assert torch.equal(first, gptq(weight, WeightScheme(4), moments)[0])
    for given in ((weight + 1, WeightScheme(4)), (weight, WeightScheme(3))):
        with pytest.raises(TypeError):
            gptq(*given, moments)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_at_its_scale_of_least_squared_error(case: Case, bits: int) -> None:
    layer, x = case
    scheme, weight = WeightScheme(bits, 16, "mse"), layer.weight.detach()
    moments = input_moments(nn.Sequential(layer), [x])["0"]
    codes, scale = gptq(weight, scheme, moments)
    plain = scheme.choose_scale(weight)
    before = scheme.dequantize(gptq_codes(weight, plain, scheme, moments), plain)
    rounded = scheme.dequantize(codes, scale)
    places = [dimension for dimension in range(x.ndim) if dimension != 1]
    wanted = output(layer, weight, x)
    found, first = ((output(layer, each, x) - wanted).square().mean(places) for each in (rounded, before))
    torch.testing.assert_close(module.output_errors(weight, rounded, moments), found, rtol=1e-3, atol=1e-6)
    assert (found <= 1.001 * first).all() and found.sum() < 0.99 * first.sum()
    assert ((scale != plain).any(1) == (found < 0.999 * first)).all()


def test_only_few_bits_of_least_squared_error_are_searched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = case
    weight, moments = layer.weight.detach(), input_moments(nn.Sequential(layer), [x])["0"]
    for scheme in (WeightScheme(5, None, "mse"), WeightScheme(3)):
        assert torch.equal(gptq(weight, scheme, moments)[1], scheme.choose_scale(weight))
    monkeypatch.setattr(module, "LARGE", weight.numel() - 1)
    scheme = WeightScheme(3, None, "mse")
    assert torch.equal(gptq(weight, scheme, moments)[1], scheme.choose_scale(weight))


def test_columns_of_more_power_are_rounded_first() -> None:
    layer, scheme = nn.Linear(32, 64, bias=False), WeightScheme(3)
    power = torch.ones(32)
    power[20] = 100.0
    x = (torch.randn(400, 1) + 0.5 * torch.randn(400, 32)) * power.sqrt()
    moments = input_moments(nn.Sequential(layer), [x])["0"]
    weight = layer.weight.detach()
    scale = scheme.choose_scale(weight)
    codes = gptq_codes(weight, scale, scheme, moments)
    assert torch.equal(codes[:, 20], scheme.quantize(weight, scale)[:, 20])  # no error of others was moved to it
    assert not torch.equal(codes, scheme.quantize(weight, scale))


def test_without_correlation_it_is_rounding_to_nearest(case: Case) -> None:
    layer, x = case
    scheme, weight = WeightScheme(4), layer.weight.detach()
    groups, _, columns = patches(layer, x).shape
    moments = Moments(torch.zeros(groups, columns), [torch.eye(columns).expand(groups, -1, -1)])
    scale = scheme.choose_scale(weight)
    assert torch.equal(gptq_codes(weight, scale, scheme, moments), scheme.quantize(weight, scale))
    moments = input_moments(nn.Sequential(layer), [torch.zeros_like(x)])["0"]
    assert gptq_codes(weight, scale, scheme, moments).abs().max() <= 8
