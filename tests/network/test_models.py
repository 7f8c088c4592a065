"""Building, loading weights and folding BatchNorm."""

from pathlib import Path

import pytest
import torch
from torch import nn

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.files import sha256
from quantstudy.network.architectures import build
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.fp32 import load_fp32, load_preprocessing, save_fp32, skeleton
from quantstudy.network.weights import load_pretrained
from stages import download, finetune
from tests.conftest import Project

PREPROCESSING = P.Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def row(path: Path, architecture: str = "mobilenet_v2", **changes: str) -> P.Model:
    return P.Model(**({"architecture": architecture, "weights": str(path), "weights_sha256": sha256(path)} | changes))


@pytest.fixture
def imagenet_like(tmp_path: Path) -> Path:
    """A MobileNetV2 state_dict with another number of classes."""
    path = tmp_path / "weights.pth"
    torch.save(build("mobilenet_v2", 20).state_dict(), path)
    return path


def test_a_head_of_other_classes_keeps_its_random_start(imagenet_like: Path) -> None:
    model = build("mobilenet_v2", 10)
    report = load_pretrained(model, row(imagenet_like), "s")
    assert report.random == ["classifier.1.weight", "classifier.1.bias"]
    state = torch.load(imagenet_like, weights_only=True)
    assert torch.equal(model.state_dict()["features.0.0.weight"], state["features.0.0.weight"])
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("features.0.")}, imagenet_like)
    report = load_pretrained(build("mobilenet_v2", 10), row(imagenet_like), "s")
    assert len(report.loaded) == 6 and "features.1.conv.0.0.weight" in report.random
    assert "features.1.conv.0.0.weight" in str(report)


@pytest.mark.parametrize("architecture", ["vgg11_small", "mine:network"])
def test_only_torchvisions_networks_have_imagenet_weights(architecture: str) -> None:
    with pytest.raises(
        UserError, match=rf"^studies\.\w+\.model\.weights: torchvision has no imagenet weights of {architecture}; "
    ):
        load_pretrained(nn.Linear(1, 1), P.Model(architecture=architecture, weights="imagenet"), "s")


def test_a_wrong_file_of_weights_or_architecture_is_one_line(imagenet_like: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"studies\.s\.model\.weights: .* is not of architecture vgg11"):
        load_pretrained(build("vgg11", 10), row(imagenet_like, "vgg11"), "s")
    with pytest.raises(UserError, match=sha256(imagenet_like)):
        load_pretrained(build("mobilenet_v2", 10), row(imagenet_like, weights_sha256="0" * 64), "s")
    gone = P.Model(architecture="mobilenet_v2", weights=str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=r"gone\.pth: no such file"):
        load_pretrained(build("mobilenet_v2", 10), gone, "s")
    with pytest.raises(UserError, match=r"model\.architecture: 'mobilenetv2' is unknown \(did you mean mobilenet_v2\?"):
        build("mobilenetv2", 10)


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "vgg11_bn", "resnet18"])
def test_folding_keeps_the_function_and_the_names(architecture: str) -> None:
    torch.manual_seed(0)
    model = build(architecture, 10).train()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model(images)
        folded = fold_batchnorm(model)
        torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]


def test_a_saved_model_loads_folded(tmp_path: Path) -> None:
    model = build("mobilenet_v2", 10).eval()
    path = tmp_path / "fp32.pth"
    save_fp32(path, model, "mobilenet_v2", 10, PREPROCESSING)
    assert load_preprocessing(path) == PREPROCESSING
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_fp32(path)(images), model(images), rtol=1e-4, atol=1e-4)


def test_auxiliary_heads_are_left_out_and_computing_networks_have_a_skeleton_too(tmp_path: Path) -> None:
    model = build("googlenet", 10)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict() | {"aux1.conv.conv.weight": torch.zeros(1)}, path)
    assert load_pretrained(model, row(path, "googlenet"), "s").random == []
    network = skeleton("regnet_y_400mf", 10)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert network.fc.out_features == 10


def test_a_trained_network_is_kept_as_it_is_by_0_epochs(project: Project) -> None:
    torch.manual_seed(1)
    trained = build("mobilenet_v2", 10)
    torch.save({"state_dict": trained.state_dict()}, "own.pth")
    row = {"architecture": "mobilenet_v2", "weights": "own.pth", "weights_sha256": sha256(Path("own.pth"))}
    project.edit("studies.tiny.model", row)
    project.edit("studies.tiny.training.epochs", 0)
    download.main(["--study", "tiny"])
    finetune.main(["--study", "tiny"])
    kept = load_checkpoint(Path("models/tiny/fp32.pth"))["state_dict"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in trained.state_dict().items())
    assert len(Path("reports/tiny/curves/finetune.csv").read_text().splitlines()) == 2
    torch.save(build("mobilenet_v2", 7).state_dict(), "own.pth")
    project.edit("studies.tiny.model.weights_sha256", sha256(Path("own.pth")))
    assert "studies.tiny.training.epochs: 0 keeps the weights" in project.failure(finetune.main)
    trained.features[0][1].running_var[3] = float("nan")
    torch.save({"net": trained.state_dict()}, "own.pth")
    project.edit("studies.tiny.model", row | {"weights_sha256": sha256(Path("own.pth")), "weights_key": "net"})
    Path("models/tiny/fp32.pth").unlink()
    assert "own.pth: features.0.1.running_var has 1 values that are not finite" in project.failure(finetune.main)
    assert not Path("models/tiny/fp32.pth").exists()
