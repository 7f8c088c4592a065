import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods import gptq
from quantstudy.methods.gptq import gptq_codes, importance
from quantstudy.methods.moments import Moments, input_moments, patches
from quantstudy.quantization.saturation import Limit, may_saturate
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


@pytest.mark.parametrize("limit", ["none", "pairs"])
def test_the_descent_leaves_less_error_and_keeps_pairs_from_saturating(
    limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 32, 3, groups=2), correlated((32, 8, 9, 9))
    weight = layer.weight.detach() * torch.rand(32, 4, 3, 3).round().mul(8).add(1)
    scheme = WeightScheme(8 if limit == "pairs" else 3, None, "mse", limit)
    moments = input_moments(nn.Sequential(layer), [x])["0"]
    scale, wanted, errors = scheme.choose_scale(weight), output(layer, weight, x), []
    for sweeps in (0, 1, 5):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        codes = gptq_codes(weight, scale, scheme, moments)
        assert limit == "none" or not may_saturate(codes, 2)
        errors.append(float((output(layer, scheme.dequantize(codes, scale), x) - wanted).square().sum()))
    assert errors[0] > 1.01 * errors[1] >= errors[2]


def test_scales_are_of_the_inputs_that_are_large() -> None:
    weight, x = torch.tensor([[1.0, 0.3, -0.3, 0.3]]), torch.tensor([[0.01, 1.0, 1.0, 1.0], [-0.01, 1.0, -1.0, 1.0]])
    moments = input_moments(nn.Sequential(nn.Linear(4, 1)), [x])["0"]
    scheme = WeightScheme(2, None, "mse")
    plain, weighted = scheme.choose_scale(weight), scheme.choose_scale(weight, importance(weight, moments))
    assert float(weighted) < float(plain)


def test_without_correlation_it_is_rounding_to_nearest(case: Case) -> None:
    layer, x = case
    scheme, weight = WeightScheme(4), layer.weight.detach()
    groups, _, columns = patches(layer, x).shape
    moments = Moments(torch.zeros(groups, columns), [torch.eye(columns).expand(groups, -1, -1)])
    scale = scheme.choose_scale(weight)
    assert torch.equal(gptq_codes(weight, scale, scheme, moments), scheme.quantize(weight, scale))
    moments = input_moments(nn.Sequential(layer), [torch.zeros_like(x)])["0"]
    assert gptq_codes(weight, scale, scheme, moments).abs().max() <= 8
