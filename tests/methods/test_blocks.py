"""Block-wise reconstruction: closer to fp32 on images it has not seen, or as it was."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from quantstudy.methods import blocks
from quantstudy.methods.blocks import find_units, fisher_information, reconstruct_blocks
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(stem, InvertedResidual(8, 8, 1, 2), *head).eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def frozen(network: nn.Module, activation: ActivationScheme) -> nn.Module:
    copied = copy.deepcopy(network)
    schemes = dict.fromkeys(quantizable_layers(network), LayerScheme(WeightScheme(3), activation))
    for layer in quantize_layers(copied, schemes).values():
        layer.activation.scale, layer.activation.zero_point = activation.choose_qparams(-3.0, 3.0)
        layer.freeze()
    return copied


def distance(network: nn.Module, found: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((network(images) - found(images)).norm())


@pytest.mark.parametrize("activation", [ActivationScheme(), ActivationScheme("static", 4)], ids=["w3", "w3a4"])
def test_images_that_were_not_seen_come_closer(
    network: nn.Module, images: Tensor, activation: ActivationScheme
) -> None:
    found, unseen = frozen(network, activation), images[-32:]
    before = distance(network, found, unseen)
    assert reconstruct_blocks(network, found, images[:64], 100) == {}
    assert distance(network, found, unseen) < 0.95 * before
    assert all(layer.frozen and layer.activation.learned is None for layer in quantized_layers(found).values())


def test_a_unit_that_training_makes_worse_stays_as_it_was(
    network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "RATE", 100.0)
    found = frozen(network, ActivationScheme("static", 8))
    before = {name: layer.weight_codes().clone() for name, layer in quantized_layers(found).items()}
    reconstruct_blocks(network, found, images, 20)
    assert all(torch.equal(layer.weight_codes(), before[name]) for name, layer in quantized_layers(found).items())


def test_large_layers_are_named_and_keep_codes(
    network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantstudy.methods.trainable.LARGE", 100)
    found = frozen(network, ActivationScheme())
    sizes = {name: layer.shape.numel() for name, layer in quantized_layers(found).items()}
    assert list(reconstruct_blocks(network, found, images, 5)) == [name for name, size in sizes.items() if size > 100]


def test_the_fisher_information_is_that_of_the_channels_that_matter(network: nn.Module, images: Tensor) -> None:
    network[4].weight[:, 3] = 0
    units, left = find_units(frozen(network, ActivationScheme()), images)
    found = fisher_information(network, images[:32], {name: unit.channels for name, unit in units.items()})
    assert list(found) == ["0.0", "1", "4"] and not left
    assert float(found["1"][3]) == 0 and (found["1"] > 0).sum() == 7
    assert all(float(weight.mean()) == pytest.approx(1) for weight in found.values())
