import copy
import math

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods.calibration import Calibration
from quantstudy.methods.lsq import estimate_batchnorm, freeze_learned, learnable
from quantstudy.network.architectures import build
from quantstudy.network.folding import fold_batchnorm, fold_pairs
from quantstudy.network.graph import capture
from quantstudy.params import Qat, QatLsq, QatOverrides
from quantstudy.quantization import schemes
from quantstudy.quantization.layers import LayerScheme, quantized_layers
from quantstudy.quantization.learned import LearnedActivation, LearnedWeight
from quantstudy.quantization.observers import collect, quantizable_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme


def paper_gradient(v: Tensor, lowest: int, highest: int) -> Tensor:
    """Equation 3 of the paper: of round(clip(v)) * s by s; what rounds to the grid's end still counts as inside."""
    inside = (v.round() >= lowest) & (v.round() <= highest)
    return torch.where(inside, v.round() - v, v.clamp(lowest, highest))


@pytest.mark.parametrize("cached", [2**18, 80], ids=["at once", "in parts"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_and_scale_have_the_gradients_of_the_paper(
    bits: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemes, "_CACHED", cached)
    torch.manual_seed(0)
    scheme, weight = WeightScheme(bits), torch.randn(5, 4, 3, 3).to(memory_format=torch.channels_last)
    weight.requires_grad_(True)
    quantizer = LearnedWeight(weight.detach(), scheme)
    with torch.no_grad():
        quantizer.scale.mul_(0.4)  # so that some weights are outside
    upstream = torch.randn_like(weight)
    (quantizer(weight) * upstream).sum().backward()
    v = weight.detach() / quantizer.scale.detach().view(-1, 1, 1, 1)
    inside = (v.round() >= scheme.lowest) & (v.round() <= scheme.highest)
    assert not inside.all()
    torch.testing.assert_close(weight.grad, upstream * inside)
    factor = 1 / math.sqrt(weight[0].numel() * scheme.highest)
    wanted = (paper_gradient(v, scheme.lowest, scheme.highest) * upstream).flatten(1).sum(1) * factor
    torch.testing.assert_close(quantizer.scale.grad, wanted, rtol=1e-4, atol=1e-6)


def test_the_activation_scale_has_the_gradient_of_the_paper() -> None:
    torch.manual_seed(0)
    x, zero_point, highest = torch.randn(6, 4, 5, 5), 5, 15
    quantizer = LearnedActivation(0.3, zero_point, highest)
    upstream = torch.randn_like(x)
    (quantizer(x) * upstream).sum().backward()
    wanted = (paper_gradient(x / 0.3, -zero_point, highest - zero_point) * upstream).sum()
    wanted = wanted / math.sqrt(x[0].numel() * highest)
    torch.testing.assert_close(quantizer.scale.grad, wanted[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 8], ids=["channel", "group"])
def test_a_frozen_weight_is_the_trained_one(group_size: int | None) -> None:
    torch.manual_seed(0)
    scheme, weight = WeightScheme(4, group_size), torch.randn(5, 3, 3, 3)
    quantizer = LearnedWeight(weight, scheme)
    codes, scale = quantizer.freeze(weight)
    torch.testing.assert_close(scheme.dequantize(codes, scale), quantizer(weight).detach())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = build("mobilenet_v2", 10).train()
    with torch.no_grad():
        for _ in range(10):
            model(images)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn_like(module.weight))  # half of the gammas are negative
    return model.eval()


def test_folding_after_training_leaves_the_function(network: nn.Module, images: Tensor) -> None:
    statistics = collect(fold_batchnorm(network), [(images, torch.zeros(16))], 256)["layers"]
    scheme = LayerScheme(WeightScheme(4, weight_range="mse"), ActivationScheme("static", 8))
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    pairs, unfolded = fold_pairs(capture(network, images), norms)
    assert len(pairs) == 52 and not unfolded
    calibration, row = Calibration(network, [images], lambda: statistics), QatLsq(kind="qat_lsq", weight_bits=4)
    found, stray = learnable(network, calibration, dict.fromkeys(quantizable_layers(network), scheme), row, pairs)
    assert not stray and not found.training
    with torch.no_grad():
        trained = found(images)
        freeze_learned(found, pairs)
        frozen = found(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    assert len(quantized_layers(found)) == 53
    assert float((frozen - trained).norm() / trained.norm()) < 2e-2  # float32 rounding moves a few codes of activations


def test_batchnorm_is_estimated_as_the_average_of_the_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3))
    batches = [(torch.randn(8, 3, 4, 4) * 3 + 1, torch.zeros(8)) for _ in range(4)]
    estimate_batchnorm(network, batches)
    means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(network[0].running_mean, means)
    torch.testing.assert_close(network[0].running_var, variances)
    assert network[0].momentum == 0.1 and not network[0].training
    network = nn.Sequential(nn.Conv2d(3, 2, 1))
    before = copy.deepcopy(network.state_dict())
    estimate_batchnorm(network, [])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_pace_is_the_studys_for_the_method_then_the_methods_then_the_studys() -> None:
    row = Qat(epochs=1, learning_rate=1e-5, methods={"qat_a": {"learning_rate": 3e-3}})  # type: ignore[dict-item]
    method = QatLsq(kind="qat_lsq", weight_bits=4, activation_bits=8, epochs=7, learning_rate=2e-2)
    plain = QatLsq(kind="qat_lsq", weight_bits=4, activation_bits=8)
    found = [method.training(row, "qat_a"), method.training(row, "qat_b"), plain.training(row, "qat_b")]
    assert [(pace.epochs, pace.learning_rate) for pace in found] == [(7, 3e-3), (7, 2e-2), (1, 1e-5)]
    augmented = {"augmentation": "crop_flip", "methods": {"qat_a": QatOverrides(augmentation="flip")}}
    cropped = row.model_copy(update=augmented)
    assert [method.training(cropped, name).augmentation for name in ("qat_a", "qat_b")] == ["flip", "crop_flip"]
