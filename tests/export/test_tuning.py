"""`python -m quantstudy tune`: the same model in other operators."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from quantstudy.__main__ import main
from quantstudy.errors import UserError
from quantstudy.export.graph import INPUT, network_graph
from quantstudy.export.onnx_model import save_onnx, to_onnx
from quantstudy.methods.registry import static
from quantstudy.params import Static
from quantstudy.quantization.observers import collect
from quantstudy.runtimes.sessions import why_missing

SIZE, CLASSES = 8, 10
ARCHITECTURE = f"{__name__}:residual"


class Residual(nn.Module):
    """A pointwise convolution in a sum, one with a stride, and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.strided, self.head = nn.Conv2d(8, 16, 1, stride=2), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, S, S] to logits [N, classes]."""
        x = self.first(x).relu()
        return self.head((self.strided(x + self.second(x)) * 1.5).mean((2, 3)))


def residual(num_classes: int) -> nn.Module:
    return Residual(num_classes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = residual(CLASSES).eval().requires_grad_(False)
    statistics = collect(model, [(torch.randn(8, 3, SIZE, SIZE), torch.zeros(8))], bins=64)
    variant = static(model, statistics, Static(kind="static", weight_bits=8, activation_bits=8))
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    save_onnx(path, to_onnx(variant, network_graph(ARCHITECTURE, CLASSES, SIZE)))
    return path


def tune(source: Path, out: Path, *options: str) -> None:
    main(["tune", str(source), "--out", str(out), "--runtime", *options])


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_the_file_computes_the_same(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    out = tmp_path / "tuned.onnx"
    tune(exported, out, "onnxruntime")
    assert "new: 2 MatMul, 2 Sub, 2 Transpose" in capsys.readouterr().out
    onnx.checker.check_model(onnx.load(out), full_check=True)
    images = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE), np.float32)
    before, after = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {INPUT: images})[0]
        for path in (exported, out)
    )
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    assert out.stat().st_size < 1.3 * exported.stat().st_size


def test_what_needs_no_change_is_copied(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(exported, tmp_path / "x.onnx", "openvino", "--batch-size", "16")
    assert "nothing to change" in capsys.readouterr().out
    assert (tmp_path / "x.onnx").read_bytes() == exported.read_bytes()


def test_mistakes_are_one_line_and_write_nothing(exported: Path, tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.onnx", tmp_path / "foreign.onnx"
    text.write_text("no model")
    model = onnx.load(exported)
    model.producer_name = "another"
    onnx.save(model, foreign)
    out = tmp_path / "out.onnx"
    for source, target, message in (
        (tmp_path / "missing.onnx", out, "no such file"),
        (text, out, "not an ONNX file"),
        (foreign, out, "'another'"),
        (exported, exported, "--out"),
        (exported, tmp_path / "out.pth", "ends in .onnx"),
    ):
        with pytest.raises(UserError, match=message):
            tune(source, target, "onnxruntime")
    assert not out.exists()
