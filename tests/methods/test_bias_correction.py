"""Bias correction from calibration images."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods.bias_correction import FEW, is_on
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.params import WeightOnly

FROM_IMAGES = WeightOnly(kind="weight_only", weight_bits=3, bias_correction=True)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5


class Residual(nn.Module):
    """Layers behind which come a ReLU, nothing, a sum in place and its ReLU, and a ReLU that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.alone = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.added, self.function = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 8, 1)
        self.first, self.last = nn.ReLU(inplace=True), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone(self.first(self.seen(x)))
        y = self.added(x)
        y += x
        return nn.functional.relu(self.function(self.last(y)))


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return what each layer gives, before others write to it, and under `sum` what the last activation reads."""
    found: dict[str, Tensor] = {}
    model = copy.deepcopy(model)
    for name in ("seen", "alone", "added", "function"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, inputs, y, name=name: found.update({name: y.clone()}))
    model.last.register_forward_pre_hook(lambda _, inputs: found.update(sum=inputs[0].clone()))  # type: ignore[operator]
    model(images)
    return found


@pytest.mark.parametrize("settings", [FROM_IMAGES, FROM_IMAGES.model_copy(update={"rounding": "gptq"})], ids=str)
def test_the_mean_error_is_zero_where_an_activation_lets_values_through(settings: WeightOnly, images: Tensor) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    fp32 = outputs(model, images)
    found = outputs(quantize(model, Calibration(model, [images]), settings).network, images)
    everywhere = torch.ones_like(fp32["alone"])
    # Half the slope of a hardswish is at zero.
    active = {"seen": fp32["seen"] > 0, "alone": everywhere, "added": fp32["sum"] > 0, "function": everywhere[:, :8]}
    for name, where in active.items():
        error = ((found[name] - fp32[name]) * where).sum((0, 2, 3)) / where.sum((0, 2, 3))
        assert error.abs().max() < 1e-5, name


def test_a_channel_that_is_nearly_always_off_is_moved_little() -> None:
    """All of its error lies where the ReLU is off: a weight of an input that is there when another is not."""
    model = nn.Sequential(nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -0.4]).view(1, 2, 1, 1))
        model[0].bias.fill_(0.0)
    images = torch.zeros(64, 2, 8, 8)
    images[:, 0, 0], images[:, 1, 1:] = 1.0, 1.0
    two_bits = FROM_IMAGES.model_copy(update={"weight_bits": 2})
    rounded = quantize(model, Calibration(model, [images]), two_bits)
    assert rounded.network[0].dequantized().flatten()[1] != model[0].weight.flatten()[1]
    plain = quantize(model, Calibration(model, [images]), two_bits.model_copy(update={"bias_correction": False}))
    error = (plain.network[0].dequantized() - model[0].weight).flatten()[0]
    torch.testing.assert_close(rounded.network[0].bias, -error.reshape(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    images = torch.randn(40, 3, 2, 2)
    variant = quantize(model, Calibration(model, [images]), FROM_IMAGES)
    with torch.no_grad():
        y = model[1](images.flatten(1))
        error = (variant.network[1].dequantized() - model[1].weight) @ images.flatten(1).T
        expected = model[1].bias - (error.T * (y > 0)).sum(0) / (y > 0).sum(0).clamp_min(40)
    torch.testing.assert_close(variant.network[1].bias, expected)


@pytest.mark.parametrize("shape", [(400, 12), (80, 5, 12), (20, 16, 16, 12)], ids=str)
@pytest.mark.parametrize("outputs", [16, 20])
@torch.no_grad()
def test_the_channels_of_a_linear_layer_come_last(shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, outputs), nn.GELU()).eval()
    x = torch.randn(shape) + 0.5
    variant = quantize(model, Calibration(model, [x]), FROM_IMAGES)
    wanted, found = (net[0](x).flatten(0, -2) for net in (model, variant.network))
    seen = is_on(model[1], wanted)
    error = ((found - wanted) * seen).sum(0) / seen.sum(0)
    assert error[seen.sum(0) >= FEW].abs().max() < 1e-5
    assert len(error) == outputs


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_activation_is_on_where_its_slope_is_large_at_any_size(size: float) -> None:
    x = size * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(is_on(nn.ReLU(inplace=True), x), x > 0)
    assert torch.equal(is_on(nn.ReLU6(), x), (x > 0) & (x < 6))
