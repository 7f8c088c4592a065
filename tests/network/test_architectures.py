"""Networks by name and by import path: attention opened, one's own code found, checked and quantized."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import vit_b_16
from torchvision.models.vision_transformer import VisionTransformer

from quantstudy import layout
from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.files import read_json, sha256
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.network import architectures, attention
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.fp32 import load_fp32, save_fp32
from quantstudy.network.weights import load_pretrained
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.variant import load_variant, save_variant
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.kernels import int8_kernels_available
from quantstudy.runtimes.onnx_graph import network_graph
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import open_session, why_missing
from stages import calibrate, download, evaluate, finetune, ptq, trace
from tests.conftest import Project

pytestmark = pytest.mark.slow

PREPROCESSING = P.Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
INT8 = P.Static(kind="static", weight_bits=8, activation_bits=8)
INT8_DYNAMIC = P.Dynamic(kind="dynamic", weight_bits=8, activation_bits=8)
INT4 = P.WeightOnly(kind="weight_only", weight_bits=4, group_size=32)
OWN = """
    import torch
    from torch import nn
    from .parts import Block


    class Network(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.register_buffer("gain", torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1), persistent=False)
            self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect")
            self.block = Block(16)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.head = nn.Linear(16, classes)

        def forward(self, images):
            x = self.block(self.block(self.stem(images * self.gain)))
            if x.sum() > 1e9:  # control flow that cannot be traced
                x = x * 0
            return self.head(self.encoder(x.flatten(2).mT).mean(1))


    def network(num_classes):
        return Network(num_classes)


    def broken(num_classes):
        raise KeyError("width")


    def tuples(num_classes):
        return nn.Identity()


    def nothing(num_classes):
        return 3
"""
PARTS = """
    from torch import nn


    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(width)
            self.again = self.conv

        def forward(self, x):
            return self.norm(self.again(self.conv(x))).relu()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """A package of one's own in the project's folder; its import path."""
    package = f"own_{abs(hash(request.node.name))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "net.py").write_text(textwrap.dedent(OWN))
    (tmp_path / package / "parts.py").write_text(textwrap.dedent(PARTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return f"{package}.net"


def calibrated(model: torch.nn.Module) -> Calibration:
    return Calibration(model, [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))], bins=64)


@torch.no_grad()
def test_opened_attention_computes_the_same() -> None:
    torch.manual_seed(0)
    original = VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10).eval()
    images, state = torch.randn(3, 3, 32, 32), dict(original.state_dict())
    torch.nn.init.normal_(original.heads.head.weight)
    wanted = original(images)
    attention.open_attention(original)
    torch.testing.assert_close(original(images), wanted, rtol=1e-5, atol=1e-5)
    assert attention.opened_names(state).keys() == original.state_dict().keys()


def test_a_vision_transformer_takes_weights_of_another_image_size(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(vit_b_16(image_size=64, num_classes=7).state_dict(), path)
    model = architectures.build("vit_b_16", 10, 32)
    row = P.Model(architecture="vit_b_16", weights=str(path), weights_sha256=sha256(path))
    report = load_pretrained(model, row, "s")
    assert report.random == ["heads.head.weight", "heads.head.bias"]
    assert model.get_parameter("encoder.pos_embedding").shape == (1, 5, 768)


def test_an_image_size_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match=r"key: 'vit_b_16' for 40 px cannot be built: .*indivisible by patch size"):
        architectures.build("vit_b_16", 10, 40, "key")
    with pytest.raises(UserError, match="key: the network fails on images of 16 px: RuntimeError"):
        architectures.check_logits(architectures.build("alexnet", 10), 10, 16, "key")


FAMILIES = {"vgg11_small": 9, "resnet18": 21, "efficientnet_b0": 82, "convnext_tiny": 59}
FAMILIES |= {"regnet_y_400mf": 86, "vit_b_16": 50}


@pytest.mark.parametrize(("architecture", "layers"), FAMILIES.items())
@torch.no_grad()
def test_every_layer_of_each_family_is_quantized(architecture: str, layers: int) -> None:
    torch.manual_seed(0)
    model = fold_batchnorm(architectures.build(architecture, 10, 32))
    calibration, images = calibrated(model), torch.randn(4, 3, 32, 32)
    for settings in (INT8, INT4):
        variant = quantize(model, calibration, settings)
        counts = stored(variant)
        assert counts["layers_quantized"] == counts["layers_quantizable"] == layers
        assert not not_quantized(variant)["layers"]
        assert torch.isfinite(build_executable(variant, "eager", torch.device("cpu")).run(images)).all()


def tiny_vit(num_classes: int, image_size: int) -> VisionTransformer:
    """A vision transformer small enough to export in a test."""
    return VisionTransformer(image_size, 16, 2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=num_classes)


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
@pytest.mark.parametrize("settings", [INT8, INT8_DYNAMIC, INT4], ids=["static", "dynamic", "weight-only"])
@torch.no_grad()
def test_opened_attention_exports(settings: Any) -> None:
    name = "tests.network.test_architectures:tiny_vit"
    torch.manual_seed(0)
    model = architectures.build(name, 10, 48).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    images = torch.randn(8, 3, 48, 48)
    calibration = Calibration(model, [images], bins=64)
    variant = quantize(model, calibration, settings)
    exported = exported_model(variant, network_graph(name, 10, 48), "onnxruntime")
    found, wanted = open_session(exported, "onnxruntime", 1).run(images), variant(images)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@torch.no_grad()
def test_a_network_of_ones_own_is_quantized_and_what_is_not_is_reported(own: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = architectures.build(f"{own}:network", 10).eval()
    architectures.check_logits(model, 10, 32, "key")
    path = tmp_path / "fp32.pth"
    save_fp32(path, model, f"{own}:network", 10, PREPROCESSING)
    images = torch.randn(4, 3, 32, 32)
    fp32 = load_fp32(path)
    assert torch.equal(fp32(images), model.to(memory_format=torch.channels_last)(images))
    attention = ["encoder.self_attn.in_proj", "encoder.self_attn.out_proj"]
    rest = ["encoder.linear1", "encoder.linear2", "head"]
    assert list(quantizable_layers(fp32)) == ["stem", "block.conv", *attention, *rest]
    for settings in (INT8.model_copy(update={"saturation_free": True}), INT4):
        variant = quantize(fp32, calibrated(fp32), settings)
        assert list(quantized_layers(variant.network)) == ["block.conv", *attention, *rest]
        left = not_quantized(variant)
        assert left["layers"] == ["stem"]
        assert left["parameters"] == {"BatchNorm2d": 32, "LayerNorm": 64}
        assert "1 attention modules" in remark(left)[0]
        assert variant.skipped["quantization"] == {"stem": "padding_mode 'reflect'"}
        saved = tmp_path / "variant.pth"
        save_variant(saved, variant, load_checkpoint(path), "variant")
        again = load_variant(saved)
        assert torch.equal(again(images), variant(images))
        kernels = build_executable(again, "eager", torch.device("cpu"))
        if int8_kernels_available():
            assert not [layer for layer in quantized_layers(again).values() if layer.emits_int8]
        assert (kernels.run(images) - model(images)).norm() < 0.2 * model(images).norm()


def test_changed_code_is_noticed(own: str, tmp_path: Path) -> None:
    name = f"{own}:network"
    code = architectures.code_sha256(name)
    assert code is not None
    architectures.check_code(name, code, "key")
    path = tmp_path / "fp32.pth"
    save_fp32(path, architectures.build(name, 10), name, 10, PREPROCESSING)
    parts = tmp_path / own.partition(".")[0] / "parts.py"
    parts.write_text(parts.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=f"key: '{code}' is not the SHA-256 of the code of {name}; the one found is"):
        architectures.check_code(name, code, "key")
    with pytest.raises(UserError, match=r"fp32\.pth: code_sha256: "):
        load_fp32(path)


def test_code_of_another_sha256_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange_net.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="key: 'abc' is not the SHA-256 of the code of strange_net:network"):
        architectures.check_code("strange_net:network", "abc", "key")
    assert not Path("ran").exists()


def test_mistakes_in_an_import_path_are_one_line(own: str) -> None:
    for path, line in {
        "not_there.net:network": "key: not_there.net cannot be imported from .*: ModuleNotFoundError",
        f"{own}:netwrk": r"key: in .*\.net: 'netwrk' is unknown \(did you mean network\?\)",
        f"{own}:broken": "key: .* cannot be built: KeyError: 'width'",
        f"{own}:nothing": "key: .* returned int, not a torch.nn.Module",
    }.items():
        with pytest.raises(UserError, match=line):
            architectures.build(path, 10, key="key")
    with pytest.raises(UserError, match="key: the network has no convolution and no linear layer"):
        architectures.check_logits(architectures.build(f"{own}:tuples", 10), 10, 32, "key")


def test_a_study_of_ones_own_network(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("small_study_net.py").write_text(
        textwrap.dedent("""
            from torch import nn


            def network(num_classes):
                return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(8, num_classes))
        """)
    )
    monkeypatch.syspath_prepend(project.root)
    project.edit("studies.tiny.model", {"architecture": "small_study_net:network"})
    download.main(["--study", "tiny"])
    line = project.failure(finetune.main)
    assert "studies.tiny.model.code_sha256: None is not the SHA-256 of the code of small_study_net:network" in line
    project.edit("studies.tiny.model.code_sha256", line.rpartition(" ")[2])
    for stage in (finetune, calibrate, trace):
        stage.main(["--study", "tiny"])
    ptq.main(["--study", "tiny", "--method", "int8_static"])
    for variant in ("fp32", "int8_static"):
        evaluate.main(["--study", "tiny", "--variant", variant])
    metrics = read_json(layout.metrics("tiny", "int8_static"))
    assert metrics["layers_quantized"] == metrics["layers_quantizable"] == 2
