"""`python -m quantstudy tune`: the same model in other operators."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from quantstudy.__main__ import main
from quantstudy.errors import UserError, run_stage
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.runtimes.onnx_graph import INPUT, graph_of, network_graph
from quantstudy.runtimes.onnx_model import save_onnx, to_onnx
from quantstudy.runtimes.onnx_tuning import may_saturate, tuned
from quantstudy.runtimes.sessions import open_session, why_missing
from tests.runtimes.variants import DYNAMIC, STATIC, quantized

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
    return made(tmp_path_factory.mktemp("onnx"), 7)  # with 8 bits CPUs without VNNI saturate


def made(folder: Path, bits: int, **keys: Any) -> Path:
    torch.manual_seed(0)
    model = residual(CLASSES).eval().requires_grad_(False)
    variant = quantized(model, torch.randn(8, 3, SIZE, SIZE), WeightScheme(bits), STATIC, **keys)
    path = folder / "model.onnx"
    save_onnx(path, to_onnx(variant, network_graph(ARCHITECTURE, CLASSES, SIZE)))
    return path


def tune(source: Path, out: Path, *options: str) -> None:
    main(["tune", str(source), "--out", str(out), "--runtime", "onnxruntime", *options])


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_the_file_computes_the_same(exported: Path, tmp_path: Path) -> None:
    import onnxruntime

    out, unsigned = tmp_path / "tuned.onnx", tmp_path / "unsigned.onnx"
    tune(exported, out)
    tune(made(tmp_path, 8), unsigned, "--without-vnni")
    for path in (out, unsigned):
        assert operators(path) - operators(exported) == {"MatMul": 2, "Sub": 2, "Transpose": 2}
    images = np.random.default_rng(0).standard_normal((3, 3, SIZE, SIZE), np.float32)

    def run(path: Path, level: onnxruntime.GraphOptimizationLevel) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {INPUT: images})[0])

    for before, after in ((exported, out), (tmp_path / "model.onnx", unsigned)):
        onnx.checker.check_model(onnx.load(after), full_check=True)
        as_float32 = run(before, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
        in_integers = run(after, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        np.testing.assert_allclose(as_float32, in_integers, rtol=1e-4, atol=1e-4)
        assert after.stat().st_size < 1.3 * before.stat().st_size


def test_what_needs_no_change_is_copied(tmp_path: Path) -> None:
    source = made(tmp_path, 4)
    tune(source, tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").read_bytes() == source.read_bytes()
    out = tmp_path / "out.onnx"
    tune(made(tmp_path, 4, in_8_bits=("first", "head")), out, "--without-vnni")
    types = {tensor.data_type for tensor in onnx.load(out).graph.initializer if len(tensor.dims) > 1}
    assert types == {TensorProto.UINT8, TensorProto.INT4}


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
@pytest.mark.parametrize("activation", [STATIC, DYNAMIC, ActivationScheme("dynamic", 4)], ids=str)
@pytest.mark.parametrize(
    ("weight", "in_8_bits"),
    [(WeightScheme(8, 16), ()), (WeightScheme(8, 1024), ()), (WeightScheme(4, 16), ("first", "head"))],
    ids=["8 bits", "8 bits, whole rows", "4 bits between"],
)
@torch.no_grad()
def test_weights_in_blocks_stay(weight: WeightScheme, in_8_bits: tuple[str, ...], activation: ActivationScheme) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIZE, SIZE)
    variant = quantized(residual(CLASSES), images, weight, activation, in_8_bits=in_8_bits)
    plain = to_onnx(variant, network_graph(ARCHITECTURE, CLASSES, SIZE))
    found = tuned(plain, saturates=True)
    assert all(tensor in found.graph.initializer for tensor in plain.graph.initializer if len(tensor.dims) > 1)
    wanted, logits = variant(images), open_session(found, "onnxruntime", 1).run(images)
    assert (wanted - logits).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(("group_size", "wanted"), [(16, False), (32, False), (64, True), (256, True), (None, True)])
def test_weights_in_several_blocks_a_row_do_not_saturate(group_size: int | None, wanted: bool) -> None:
    """Where a block is the whole row OpenVINO multiplies in int8."""
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), torch.rand(4, 1, SIZE, SIZE)
    nn.init.ones_(network[1].weight)  # type: ignore[arg-type]
    variant = quantized(network, images, WeightScheme(8, group_size), STATIC)
    assert may_saturate(to_onnx(variant, graph_of(network, images.shape[1:]))) == wanted


def test_mistakes_are_one_line_and_write_nothing(exported: Path, tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.onnx", tmp_path / "foreign.onnx"
    text.write_text("no model")
    model = onnx.load(exported)
    model.producer_name = "another"
    onnx.save(model, foreign)
    out, cut, tuned = (tmp_path / f"{name}.onnx" for name in ("out", "cut", "tuned"))
    cut.write_bytes(exported.read_bytes()[:14])
    tune(exported, tuned)
    for source, target, message in (
        (tmp_path / "missing.onnx", out, "no file"),
        (text, out, "not an ONNX model"),
        (foreign, out, "'another'"),
        (cut, out, "not an ONNX model"),
        (tuned, out, "tuned for onnxruntime before"),
        (exported, exported, "--out"),
        (exported, tmp_path / "out.pth", "ends in .onnx"),
    ):
        with pytest.raises(UserError, match=message):
            tune(source, target)
    assert not out.exists()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    for out in (tmp_path / "folder.onnx", tmp_path / "file" / "out.onnx"):
        with pytest.raises(SystemExit, match=r"error: .*(folder\.onnx|file): "):
            run_stage(lambda out=out: tune(exported, out))  # type: ignore[misc]
