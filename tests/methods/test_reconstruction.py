import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from quantstudy.methods import moments
from quantstudy.methods.reconstruction import Limits, SoftRounding, cached, reconstruct
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme

LIMITS = Limits(steps=150, batch_size=16)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(stem, InvertedResidual(8, 8, 1, 2), *head).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quantized(network: nn.Module, bits: int = 3, activation: ActivationScheme | None = None) -> nn.Module:
    copied = copy.deepcopy(network)
    scheme = LayerScheme(WeightScheme(bits), activation or ActivationScheme())
    quantize_layers(copied, dict.fromkeys(quantizable_layers(network), scheme))
    return copied.requires_grad_(False)


def nearest(network: nn.Module) -> nn.Module:
    copied = quantized(network)
    for layer in quantized_layers(copied).values():
        layer.freeze()
    return copied


def test_the_output_is_closer_than_with_rounding_to_nearest(network: nn.Module, images: Tensor) -> None:
    found = quantized(network)
    assert reconstruct(network, found, images, LIMITS) == {}
    with torch.no_grad():
        y = network(images)
        errors = [float((model(images) - y).norm()) for model in (found, nearest(network))]
    assert errors[0] < 0.8 * errors[1]
    assert all(layer.frozen for layer in quantized_layers(found).values())


def test_no_layer_is_reconstructed_worse_than_by_rounding_to_nearest(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3))
    for steps in (1, 20, 200):
        found = quantized(network)
        reconstruct(network, found, images, Limits(steps=steps, batch_size=16))
        with torch.no_grad():
            y = network(images)
            errors = [float((model(images) - y)[-8:].square().mean()) for model in (found, nearest(network))]
        assert errors[0] <= errors[1] * (1 + 1e-6)


def test_each_code_is_the_one_below_or_above(network: nn.Module, images: Tensor) -> None:
    found = quantized(network)
    reconstruct(network, found, images, LIMITS)
    for name, layer in quantized_layers(found).items():
        weight = network.get_submodule(name).weight
        scaled = weight.flatten(1) / layer.weight_scale
        assert ((layer.weight_codes().flatten(1) - scaled).abs() <= 1 + 1e-4).all(), name


def test_soft_rounding_starts_at_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    soft = SoftRounding(weight, WeightScheme(4, 8))
    with torch.no_grad():
        difference = (soft(weight) - weight).abs().flatten(1)
    inside = weight.flatten(1) <= 7 * soft.scale.amin()  # what lies above the highest code is clipped
    assert float(difference[inside].max()) < 0.02 * float(soft.scale.amax())


def test_what_is_too_large_is_left(network: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantstudy.methods.reconstruction.LARGE", 100)
    found = quantized(network)
    skipped = reconstruct(network, found, images, LIMITS)
    sizes = {name: layer.shape.numel() for name, layer in quantized_layers(found).items()}
    assert [*skipped] == [name for name, size in sizes.items() if size > 100]
    assert all(layer.frozen == (name not in skipped) for name, layer in quantized_layers(found).items())


@pytest.mark.parametrize("kept", [10, 20, 64])
def test_activations_are_kept_for_as_many_images_as_fit(network: nn.Module, images: Tensor, kept: int) -> None:
    rounded, images = nearest(network), images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = rounded[0](images), network[:2](images), network[0](images)
    size = sum(values[0].nbytes for values in wanted)
    found = cached(network, rounded, "1", images.split(16), kept * size, plain=True)
    for values, whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            values, whole[: max(kept, 16)], msg=f"{kept} images fit; the first batch stays whole"
        )
        assert values.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("batch", [50, 64, 128, 256])
@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1, groups=2)])
def test_patches_of_all_columns_stand_for_all_patches_whatever_the_batch_size(layer: nn.Module, batch: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(256, 2, 32, 32) + torch.linspace(0, 4, 32)  # each column has another mean
    found = moments.input_moments(nn.Sequential(layer), images.split(batch))["0"]
    every = moments.patches(layer, images)
    torch.testing.assert_close(found.mean, every.mean(1), rtol=0.02, atol=0)
    torch.testing.assert_close(found.second[0], every.mT @ every / every.shape[1], rtol=0.04, atol=0)


@torch.no_grad()
def test_rows_of_a_linear_layer_stand_for_all_rows() -> None:
    torch.manual_seed(0)
    x = torch.rand(100, 200, 3) + torch.linspace(0, 4, 200)[:, None]  # each place has another mean
    found = moments.input_moments(nn.Sequential(nn.Linear(3, 4)), [x[:64], x[64:]])["0"]
    torch.testing.assert_close(found.mean[0], x.mean((0, 1)), rtol=0.02, atol=0)


class Windows(nn.Module):
    """Cuts each image into four windows and gives all of them to a linear layer."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.linear = first, nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)  # [N, 2, 2, 192]
        rows = windows.flatten(0, 2) if self.first else windows.flatten(1, 2).transpose(0, 1)
        return self.linear(rows)


@pytest.mark.parametrize("first", [True, False], ids=["windows in the batch", "the batch comes second"])
@pytest.mark.parametrize("batch", [16, 64])
def test_activations_are_kept_whole_that_have_other_rows_than_images(images: Tensor, first: bool, batch: int) -> None:
    network = Windows(first).eval()
    seen: list[Tensor] = []
    network.linear.register_forward_pre_hook(lambda _, values: seen.append(values[0]))
    with torch.no_grad():
        wanted = torch.cat([network(part) for part in images.split(batch)])
    inputs, targets = cached(Windows(first).eval(), network, "linear", images.split(batch), 1e9)
    torch.testing.assert_close(inputs, torch.cat(seen[: len(images) // batch]))
    assert targets.shape == wanted.shape
