"""The package from Python: quick to import, its models run as their files do, its errors name the choices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantstudy as qs
from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.network.architectures import build
from quantstudy.quantization.variant import load_variant

HALVES = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(build("resnet18", 7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> "qs.Model":
    return qs.load_model(weights, "resnet18", image_size=32, mean=HALVES, std=HALVES)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, quantstudy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="quantise"):
        qs.quantise  # noqa: B018


def test_a_state_dict_computes_what_its_network_does(weights: Path, model: "qs.Model", images: Tensor) -> None:
    network = build("resnet18", 7).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(qs.run(model, images), network(images), rtol=1e-4, atol=1e-4)
    assert model.preprocessing.image_size == 32 and model.variant == "fp32"


@pytest.mark.parametrize(
    "method", ["int8_weight_only", P.WeightOnly(kind="weight_only", weight_bits=8)], ids=["name", "row"]
)
def test_a_saved_variant_is_loaded_as_it_was(method: Any, model: "qs.Model", images: Tensor, tmp_path: Path) -> None:
    before = qs.run(model, images)
    variant = qs.quantize(model, images.split(4), method)
    qs.save(variant, tmp_path / "variant.pth")
    loaded = qs.load_model(tmp_path / "variant.pth")
    assert loaded.variant == variant.variant and loaded.preprocessing == model.preprocessing
    assert torch.equal(qs.run(loaded, images), qs.run(variant, images))
    with torch.no_grad():
        assert torch.equal(load_variant(tmp_path / "variant.pth")(images), variant.network(images))
    assert torch.equal(qs.run(model, images), before)


def test_what_a_file_says_is_not_said_twice(model: "qs.Model", images: Tensor, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "variant.pth"
    qs.save(qs.quantize(model, images, "int8_weight_only"), path)
    for key, value in {"architecture": "resnet18", "image_size": 32, "mean": HALVES, "weights_key": "model"}.items():
        with pytest.raises(UserError, match=f"^{key}: .* says that itself; leave it out"):
            qs.load_model(path, **{key: value})
    with pytest.raises(UserError, match=r"^std: preprocessing says that; leave it out"):
        qs.load_model(weights, "resnet18", preprocessing="torchvision", std=HALVES)


def test_a_mistake_names_the_choices(weights: Path, model: "qs.Model", images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method: 'int8_statik' is unknown .*int8_static"):
        qs.quantize(model, images, "int8_statik")
    with pytest.raises(UserError, match="'qat_int8'"):
        qs.quantize(model, images, "qat_int8")
    with pytest.raises(UserError, match=r"runtime: 'tensorrt' .*eager"):
        qs.run(model, images, "tensorrt")
    with pytest.raises(UserError, match="architecture"):
        qs.load_model(weights)
    with pytest.raises(UserError, match="fp32"):
        qs.save(model, tmp_path / "fp32.pth")
    for row in (P.QatStatic(kind="qat_static", weight_bits=8), P.MixedBudget(kind="mixed_budget", mean_bits=4)):
        with pytest.raises(UserError, match=f"method: {row.kind} needs "):
            qs.quantize(model, images, row)
    for wrong in (
        [],
        images[:0],
        images[:, :1],
        images[0],
        images.double(),
        [images, images[..., :16]],
        images.numpy(),
    ):
        with pytest.raises(UserError, match=r"images: .*; give normalized float32 \[N, 3, 32, 32\]"):
            qs.quantize(model, wrong)
        with pytest.raises(UserError, match="images: "):
            qs.run(model, wrong)
    variant = qs.quantize(model, images, "int8_weight_only")
    with pytest.raises(UserError, match="int8_weight_only"):
        qs.quantize(variant, images, "int8_weight_only")
