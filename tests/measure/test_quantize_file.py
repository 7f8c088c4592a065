"""`python -m quantstudy quantize`: a model file and a folder of images, no pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image

from quantstudy import params as P
from quantstudy.__main__ import main
from quantstudy.errors import run_stage
from quantstudy.network.architectures import build
from quantstudy.network.fp32 import save_fp32
from quantstudy.quantization.layers import ChannelReLU, quantized_layers
from quantstudy.quantization.variant import load_variant
from tests.conftest import ROOT

SEEN = P.Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SMALL = "shufflenet_v2_x0_5"
SIZES = ("--image-size", "32", "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ShuffleNet's state_dict, as DistributedDataParallel saves it, and 24 images in two folders; no params.yaml."""
    torch.manual_seed(0)
    model = build(SMALL, 7).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    torch.save({"model": state, "optimizer": {"momentum": torch.zeros(10**6)}, "epoch": 3}, tmp_path / "model.pth")
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(model: str = "model.pth", out: str = "out.pth", images: str = "images", **options: Any) -> None:
    given = {"method": "int8_static", "architecture": SMALL} | options
    flags = [text for key, value in given.items() if value for text in (f"--{key}", *value.split())]
    main(["quantize", model, "--images", images, "--out", out, *(SIZES if given["architecture"] else ()), *flags])


@pytest.mark.slow
def test_a_state_dict_becomes_a_variant_and_this_projects_file_onnx(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(**{"calibration-images": "16"})
    variant = load_variant(Path("out.pth"))
    assert len(quantized_layers(variant)) == 57
    printed = capsys.readouterr().out
    assert f"model.pth: {SMALL}, 7 classes, images of 32 px" in printed
    assert "57 of 57 layers in low bits" in printed
    assert "of 8 images" in printed and "calibrated on 16 others" in printed
    network = build(SMALL, 7)  # folding BatchNorm leaves its biases
    folded = sum(each.weight.numel() for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d))
    numbers = sum(each.numel() for each in network.parameters()) - folded
    assert f"out.pth: {Path('out.pth').stat().st_size / 1e6:.3f} MB, fp32 {4 * numbers / 1e6:.3f} MB" in printed
    save_fp32(Path("fp32.pth"), build("mobilenet_v2", 5), "mobilenet_v2", 5, SEEN)
    quantize("fp32.pth", "out.onnx", architecture=None, method="int4_weight_only")
    printed = capsys.readouterr().out
    assert "53 of 53 layers" in printed and "of 24 images" in printed and "calibrated on the same" in printed
    types = {tensor.data_type for tensor in onnx.load("out.onnx").graph.initializer}
    assert onnx.TensorProto.INT4 in types
    assert Path("out.onnx").stat().st_size < 0.2 * Path("fp32.pth").stat().st_size
    quantize("fp32.pth", architecture=None, method="int8_equalized")
    has_bounds = any(isinstance(module, ChannelReLU) for module in load_variant(Path("out.pth")).modules())
    assert has_bounds != ("without equalize" in capsys.readouterr().out)


def test_mistakes_are_one_line_and_leave_no_file(folder: Path) -> None:
    def failure(*arguments: str, **options: Any) -> str:
        with pytest.raises(SystemExit) as stop:
            run_stage(lambda: quantize(*arguments, **options))
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        return stop.value.code

    Path("empty").mkdir()
    Path("text.pth").write_text("hello")
    before = set(folder.rglob("*"))
    assert "gone.pth: no such file" in failure("gone.pth")
    assert "text.pth: truncated, corrupt or not a file of tensors" in failure("text.pth")
    assert "--method: 'int8_statc' is unknown (did you mean int8_static?)" in failure(method="int8_statc")
    assert "--method: 'qat_int8' is unknown" in failure(method="qat_int8")
    assert "--architecture: model.pth is a state_dict, which does not say its architecture; give it" in failure(
        architecture=None
    )
    assert "--architecture: 'resnet19' is unknown" in failure(architecture="resnet19")
    assert "not of architecture resnet18: it " in failure(architecture="resnet18")
    assert "not of architecture mobilenet_v2" in failure(architecture="mobilenet_v2")
    assert "--image-size: 3: write one whole number" in failure(**{"image-size": "3"})
    assert "--images: no images in empty" in failure(images="empty")
    assert "gone: no such file or folder" in failure(images="gone")
    assert "--out: 'x.tflite'" in failure(out="x.tflite")
    assert "--out: 'model.pth'" in failure(out="model.pth")
    state = torch.load("model.pth")["model"]
    torch.save({"model": state, "model_ema": state}, "several.pth")
    torch.save(state | {"module.conv1.0.weight": state["module.conv1.0.weight"] * float("nan")}, "nan.pth")
    torch.save(state | {"module.fc.weight": torch.full((7, 1024), 3e38)}, "large.pth")
    before |= {folder / f"{name}.pth" for name in ("several", "nan", "large")}
    assert "--weights-key: several.pth holds several state_dicts; name one of model (" in failure("several.pth")
    assert "nan.pth: conv1.0.weight has 648 values that are not finite" in failure("nan.pth")
    assert "logits: those of " in failure("large.pth", method="int8_weight_only")
    assert "--std: 0.0: " in failure(std="0 0 0")
    assert "--mean: nan: " in failure(mean="nan 0 0")
    assert set(folder.rglob("*")) == before
    quantize("several.pth", method="int8_weight_only", **{"weights-key": "model_ema"})
    assert "out.pth: holds the variant int8_weight_only" in failure("out.pth", "again.pth", architecture=None)


def test_the_packaged_methods_are_those_of_params(folder: Path) -> None:
    rows = yaml.safe_load((ROOT / "params.yaml").read_text())["methods"]
    assert yaml.safe_load(P.DEFAULT_METHODS.read_text())["methods"] == rows
    Path("params.yaml").write_text("methods: {mine: {kind: weight_only, weight_bits: 3}}")
    assert list(P.load_methods()) == ["mine"]
    Path("params.yaml").write_text("learning_rate: 1")  # another project's
    assert P.load_methods().keys() == rows.keys()
