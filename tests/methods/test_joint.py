import copy

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods import joint
from quantstudy.methods.joint import MovingCodes, finetune_jointly, freeze_trained, make_trainable, parameter_groups
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))


def quantized(network: nn.Module, activation: ActivationScheme) -> nn.Module:
    copied = copy.deepcopy(network)
    for layer in quantize_layers(
        copied, dict.fromkeys(("0", "2", "5"), LayerScheme(WeightScheme(3), activation))
    ).values():
        layer.activation.scale, layer.activation.zero_point = activation.choose_qparams(-3.0, 3.0)
        layer.freeze()
    return copied


def divergence(network: nn.Module, reference: nn.Module, images: list[Tensor]) -> float:
    with torch.no_grad():
        x = torch.cat(images)
        p, q = reference(x).log_softmax(1), network(x).log_softmax(1)
    return float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("activation", [ActivationScheme(), ActivationScheme("static", 4)], ids=["w3", "w3a4"])
def test_predictions_come_closer_to_the_teacher(
    activation: ActivationScheme, network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "STEPS", 200)
    found = quantized(network, activation)
    before = divergence(found, network, images)
    teacher = copy.deepcopy(network.state_dict())
    finetune_jointly(network, found, images, 60)
    assert divergence(found, network, images) < 0.5 * before
    assert all(layer.frozen and layer.activation.learned is None for layer in quantized_layers(found).values())
    assert all(torch.equal(teacher[name], value) for name, value in network.state_dict().items())


def test_codes_start_where_they_were(network: nn.Module, images: list[Tensor]) -> None:
    torch.manual_seed(0)
    scheme, weight = WeightScheme(4, 8), torch.randn(4, 3, 3, 3)
    scale = scheme.choose_scale(weight)
    codes = scheme.quantize(weight, scale)
    quantizer = MovingCodes(codes, scale, scheme)
    kept, same = quantizer.freeze(weight)
    assert torch.equal(kept, codes) and torch.equal(same, scale)
    torch.testing.assert_close(quantizer(weight).detach(), scheme.dequantize(codes, scale))
    found = quantized(network, ActivationScheme("static", 8))
    with torch.no_grad():
        before = found(images[0])
        make_trainable(found)
        torch.testing.assert_close(found(images[0]), before)
        freeze_trained(found)
        assert torch.equal(found(images[0]), before)
    assert all(layer.frozen for layer in quantized_layers(found).values())
    make_trainable(found)
    slow, fast = ([group["lr"] for group in parameter_groups(found, rate)] for rate in (0.01, 0.03))
    assert len(slow) == 3 + 3 and [3 * rate for rate in slow] == pytest.approx(fast) and max(fast) == 0.03


def test_large_layers_keep_codes(network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "CODE_RATE", 0.5)
    monkeypatch.setattr(joint, "LARGE", 300)
    monkeypatch.setattr(joint, "STEPS", 20)
    found = quantized(network, ActivationScheme())
    before = {name: layer.weight_codes().clone() for name, layer in quantized_layers(found).items()}
    named = finetune_jointly(network, found, images, 60)
    kept = {name: torch.equal(layer.weight_codes(), before[name]) for name, layer in quantized_layers(found).items()}
    assert kept == {"0": False, "2": False, "5": True}
    assert list(named) == ["5"]
