import copy

import pytest
import torch
from torch import Tensor, nn

from quantstudy.methods import joint, trainable
from quantstudy.methods.joint import augmented, finetune_jointly
from quantstudy.methods.trainable import Best, MovingCodes, freeze_trained, make_trainable, parameter_groups, split
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False)
    head = nn.Linear(8 * 16, 5)
    nn.init.normal_(head.weight, std=0.5)  # logits that differ, so that there is something to learn
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), head).eval()


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(64))


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
    monkeypatch.setattr(joint, "CODE_RATE", 0.01)
    found = quantized(network, activation)
    before = divergence(found, network, images)
    teacher = copy.deepcopy(network.state_dict())
    finetune_jointly(network, found, images, 300, "flip")
    assert divergence(found, network, images) < 0.6 * before
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


def test_large_layers_keep_codes(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = list(torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    monkeypatch.setattr(joint, "CODE_RATE", 0.03)
    monkeypatch.setattr(trainable, "LARGE", 300)
    found = quantized(network, ActivationScheme())
    before = {name: layer.weight_codes().clone() for name, layer in quantized_layers(found).items()}
    named = finetune_jointly(network, found, images, 100, "none")
    kept = {name: torch.equal(layer.weight_codes(), before[name]) for name, layer in quantized_layers(found).items()}
    assert kept == {"0": False, "2": False, "5": True}
    assert list(named) == ["5"]


def test_what_training_makes_worse_is_undone(
    network: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "CODE_RATE", 100.0)
    found = quantized(network, ActivationScheme("static", 8))
    before = {name: value.clone() for name, value in found.state_dict().items() if "dense" not in name}
    finetune_jointly(network, found, images, 20, "none")
    after = found.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_best_state_is_kept_and_a_rising_error_ends_the_training() -> None:
    layer = nn.Linear(1, 1, bias=False)
    best, hope = Best(layer, 1.0), []
    rises = [0.7 + 0.1 * check for check in range(trainable.PATIENCE)]
    for error in (2.0, *[1.9] * 2 * trainable.PATIENCE, 0.5, *rises):
        with torch.no_grad():
            layer.weight.fill_(error)
        hope.append(best.add(error))
    assert hope.index(False) == len(hope) - 1
    best.restore()
    assert float(layer.weight.detach()) == 0.5 and (best.first, best.error) == (1.0, 0.5)


@pytest.mark.parametrize(("count", "parts"), [(256, (224, 32)), (64, (56, 8)), (16, (8, 8)), (15, (15, 15))])
def test_a_part_of_the_images_judges(count: int, parts: tuple[int, int]) -> None:
    assert split(count) == parts


def test_crops_and_flips_are_of_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(8.0).expand(64, 3, 8, 8)  # brighter to the right
    flips = augmented(x, "flip", generator)
    torch.testing.assert_close(flips.flip(3)[flips[:, 0, 0, 0] > 3], x[flips[:, 0, 0, 0] > 3])
    assert {bool(image[0, 0, 0] > image[0, 0, 7]) for image in flips} == {True, False}
    crops = augmented(x, "crop_flip", generator)
    extents = (crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))).abs()
    assert crops.shape == x.shape and float(extents.min()) > 7 * joint.SMALLEST_CROP and float(extents.max()) <= 7
    assert augmented(x, "none", generator) is x
