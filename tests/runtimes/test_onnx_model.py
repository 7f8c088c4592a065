import copy
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.export import check, tuning
from quantstudy.methods.registry import POST_TRAINING
from quantstudy.network import models
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import collect
from quantstudy.quantization.variant import Variant, save_variant
from quantstudy.runtimes import executables, lowering, sessions
from quantstudy.runtimes.onnx_graph import INPUT, load_graph, network_graph, save_graph
from quantstudy.runtimes.onnx_model import save_onnx, to_onnx
from quantstudy.runtimes.sessions import open_session, why_missing

SIZE, CLASSES = 32, 10
PERCEPTRON = f"{__name__}:perceptron"
METHODS = {
    "int8-static": P.Static(kind="static", weight_bits=8, activation_bits=8),
    "saturation-free": P.Static(kind="static", weight_bits=8, activation_bits=8, saturation_free=True),
    "7-bit-static": P.Static(kind="static", weight_bits=7, activation_bits=8),
    "int4-static": P.Static(kind="static", weight_bits=4, activation_bits=8),
    "4-bit-activations": P.Static(kind="static", weight_bits=4, activation_bits=4),
    "int8-dynamic": P.Dynamic(kind="dynamic", weight_bits=8, activation_bits=8),
    "7-bit-dynamic": P.Dynamic(kind="dynamic", weight_bits=7, activation_bits=8),
    "int8-weight-only": P.WeightOnly(kind="weight_only", weight_bits=8),
    "int4-weight-only": P.WeightOnly(kind="weight_only", weight_bits=4, group_size=32),
    "3-bit-weights": P.WeightOnly(kind="weight_only", weight_bits=3, group_size=32),
    "mixed": P.MixedLinear(kind="mixed_linear", weight_bits=4, group_size=32, dtype="float16"),
    "bf16": P.Cast(kind="cast", dtype="bfloat16"),
}
RUNTIMES = [
    pytest.param(runtime, marks=pytest.mark.skipif(why_missing(runtime) is not None, reason=f"no {runtime}"))
    for runtime in ("onnxruntime", "openvino")
]


def perceptron(num_classes: int) -> nn.Module:
    """Two linear layers, 3072 and 32 inputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 32), nn.ReLU(), nn.Linear(32, num_classes))


@functools.cache
def graph(architecture: str) -> onnx.ModelProto:
    return network_graph(architecture, CLASSES, SIZE)


@functools.cache
def network(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(architecture, CLASSES)
    model(torch.randn(16, 3, SIZE, SIZE))  # gives the BatchNorms statistics
    return models.fold_batchnorm(model)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@functools.cache
def variant(architecture: str, method: str) -> Variant:
    settings = METHODS[method]
    statistics = collect(network(architecture), [(images(), torch.zeros(8))], bins=64)
    return POST_TRAINING[settings.kind](network(architecture), statistics, settings)


def snr_db(wanted: Tensor, found: Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (wanted - found).norm().clamp_min(1e-12)))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_runtime_computes_what_the_variant_does(method: str, runtime: str) -> None:
    model = variant("mobilenet_v2", method)
    found = open_session(to_onnx(model, graph("mobilenet_v2")), runtime, 1).run(images())
    weight_only = not any(layer.scheme.activation.mode != "none" for layer in quantized_layers(model).values())
    assert snr_db(model(images()), found) > (35 if weight_only else 15)  # codes at a half fall either way


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", ["mobilenet_v2", "squeezenet1_1", "convnext_tiny"])
@torch.no_grad()
def test_a_runtime_computes_what_the_fp32_model_does_at_any_batch_size(architecture: str, runtime: str) -> None:
    session = open_session(to_onnx(network(architecture), graph(architecture)), runtime, 1)
    for count in (1, 3):
        torch.testing.assert_close(
            session.run(images(count)), network(architecture)(images(count)), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.no_grad()
def test_linear_layers_that_are_stored_transposed_are_quantized_too(runtime: str) -> None:
    model = variant("convnext_tiny", "int4-weight-only")
    found = open_session(to_onnx(model, graph("convnext_tiny")), runtime, 1).run(images(2))
    assert snr_db(model(images(2)), found) > 35


class Reused(nn.Module):
    """A layer called twice, by two names, another that shares its weight, and what is computed from a parameter."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.twice, self.tied = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.tied.weight, self.again = self.twice.weight, self.twice
        self.gain, self.head = nn.Parameter(torch.rand(8) + 1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to logits [N, classes]."""
        x = self.first(x).relu() * (1 + self.gain.exp())[:, None, None]
        x = x + self.twice(x)
        x = x + self.again(x).relu()
        return self.head((x + 3 * self.tied(x)).mean((2, 3)))


def reused(num_classes: int) -> nn.Module:
    return Reused(num_classes)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", ["fp32", "7-bit-static", "7-bit-dynamic", "int4-weight-only"])
@torch.no_grad()
def test_layers_are_reused_and_weights_computed_as_in_pytorch(method: str, runtime: str) -> None:
    architecture = f"{__name__}:reused"
    model = network(architecture) if method == "fp32" else variant(architecture, method)
    exported = to_onnx(model, graph(architecture))
    names = [node.name for node in exported.graph.node if node.name]
    assert len(names) == len(set(names))
    for tune in (False, True):
        session = open_session(exported, runtime, 1, tune=tune)
        torch.testing.assert_close(session.run(images()), model(images()), rtol=1e-3, atol=1e-3)
    if (method, runtime) == ("7-bit-static", "onnxruntime"):  # here with float32 between the layers
        assert session.integer_layers == {"twice", "tied", "head"}


@pytest.mark.parametrize(
    ("method", "saturates", "wanted"),
    [
        ("int8-static", True, "saturate"),
        ("int8-static", False, "side of a half"),
        ("7-bit-static", True, "side of a half"),
        ("int8-weight-only", True, r"logits lie \S+ apart in the median, those of all images \S+$"),
    ],
)
@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_a_runtime_that_predicts_otherwise_is_told_with_the_cause(
    method: str, saturates: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "int8_sums_saturate", lambda: saturates)
    monkeypatch.setattr(check, "WANTED_AGREEMENT", 101)
    pixels = torch.randint(256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    split = Split(torch.zeros(4, dtype=torch.int64), ("a", "b"), SIZE, pixels)
    seen = P.Preprocessing(image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    made = copy.deepcopy(variant(PERCEPTRON, method))
    remarks = check.check(made, to_onnx(made, graph(PERCEPTRON)), split, seen)["remarks"]
    assert any(re.search(wanted, remark) for remark in remarks if remark.startswith("onnxruntime"))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("saturates", [True, False])
def test_a_layer_is_real_in_int8_where_its_sums_do_not_saturate(
    saturates: bool, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lowering, sessions):
        monkeypatch.setattr(module, "int8_sums_saturate", lambda: saturates)
    exact = not saturates or runtime == "onnxruntime"  # which multiplies uint8 by uint8 then
    real = {"int8-static": exact, "saturation-free": True, "7-bit-static": True, "int4-static": False}
    for method, wanted in real.items():
        made = variant(PERCEPTRON, method)
        found = executables.open_executable(made, to_onnx(made, graph(PERCEPTRON)), runtime)
        assert {bits.real for bits in found.layers.values()} == {wanted}, method
        stated = 4 if method == "int4-static" else 8  # 7 bits are multiplied as 8
        assert {bits.weight for bits in found.layers.values()} == {stated}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_weights_of_7_bits_or_limited_never_saturate(
    kind: str, saturates: bool, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "int8_sums_saturate", lambda: saturates)
    model = copy.deepcopy(network(PERCEPTRON))
    for layer in (model[1], model[3]):  # type: ignore[index]
        layer.weight.abs_().clamp_(min=0.9 * float(layer.weight.max()))
    x = 1 + images().abs()
    statistics = collect(model, [(x, torch.zeros(8))], bins=64)
    for bits, limited in ((7, False), (8, True), (8, False)):
        keys = {"kind": kind, "weight_bits": bits, "saturation_free": limited}
        made = POST_TRAINING[kind](model, statistics, (P.Static if kind == "static" else P.Dynamic)(**keys))
        exported = to_onnx(made, graph(PERCEPTRON))
        safe = bits == 7 or limited
        assert tuning.may_saturate(exported) != safe
        if safe or (runtime == "onnxruntime" and saturates):  # on this CPU others may saturate or not
            found = open_session(exported, runtime, 1)
            torch.testing.assert_close(found.run(x), made(x), rtol=1e-2, atol=1e-2)
            assert found.integer_layers == ({"1", "3"} if kind == "static" or runtime == "onnxruntime" else set())


@pytest.mark.parametrize("method", ["int8-static", "int8-dynamic"])
@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_onnx_runtime_says_which_layers_it_computes_in_int8(method: str) -> None:
    model = variant("squeezenet1_1", method)
    session = open_session(to_onnx(model, graph("squeezenet1_1")), "onnxruntime", 1)
    layers = set(quantized_layers(model.network))
    assert session.integer_layers & layers
    assert not open_session(to_onnx(network("squeezenet1_1"), graph("squeezenet1_1")), "onnxruntime", 1).integer_layers


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", ["mobilenet_v2", PERCEPTRON])
def test_every_layer_of_a_static_model_runs_in_int8(architecture: str, runtime: str) -> None:
    model = variant(architecture, "int8-static")
    session = open_session(to_onnx(model, graph(architecture)), runtime, 1)
    assert session.integer_layers >= set(quantized_layers(model.network))


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_a_linear_layer_between_others_runs_in_int8_without_tuning(tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    content = to_onnx(variant(PERCEPTRON, "int8-static"), graph(PERCEPTRON)).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    assert "QGemm" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


@pytest.mark.skipif(why_missing("openvino") is not None, reason="no openvino")
@torch.no_grad()
def test_a_long_sum_is_computed_in_parts_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model = variant(PERCEPTRON, "7-bit-static")
    exported = to_onnx(model, graph(PERCEPTRON))
    whole = open_session(exported, "openvino", 1)
    monkeypatch.setattr(tuning, "LONGEST_SUM", 1000)
    parts = open_session(exported, "openvino", 1)
    for count in (1, 8, 3):
        assert snr_db(model(images(count)), parts.run(images(count))) > 50
        torch.testing.assert_close(parts.run(images(count)), whole.run(images(count)), rtol=1e-4, atol=1e-4)
    assert parts.integer_layers == whole.integer_layers
    counts = Counter(node.op_type for node in tuning.tuned(exported, "openvino", 8).graph.node)
    assert counts["Gemm"] == 5 and counts["Sum"] == 1


@pytest.mark.parametrize("method", ["int8-static", "int4-static", "int4-weight-only"])
def test_a_file_is_as_small_as_the_variants_own(method: str, tmp_path: Path) -> None:
    model, own, path = variant("mobilenet_v2", method), tmp_path / "x.pth", tmp_path / "x.onnx"
    save_variant(own, model, {"architecture": "mobilenet_v2", "classes": CLASSES, "preprocessing": {}}, "x")
    save_onnx(path, to_onnx(model, graph("mobilenet_v2")))
    assert path.stat().st_size < 1.03 * own.stat().st_size


def test_the_nodes_of_layers_have_their_names() -> None:
    model = variant("mobilenet_v2", "int8-static")
    names = {node.name for node in to_onnx(model, graph("mobilenet_v2")).graph.node}
    assert names >= set(quantized_layers(model.network))


def test_a_graph_is_small_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    save_graph(path, graph("mobilenet_v2"))
    assert path.stat().st_size < 30_000
    assert load_graph(path) == graph("mobilenet_v2")


@pytest.mark.parametrize(("size", "poolings"), [(448, 1), (224, 0)])
def test_pooling_over_single_pixels_is_left_out(size: int, poolings: int) -> None:
    """VGG's pooling to 7 x 7 does nothing to an image of 224 pixels."""
    nodes = network_graph("vgg11", CLASSES, size).graph.node
    assert sum(node.op_type == "AveragePool" for node in nodes) == poolings
    outputs = {INPUT} | {name for node in nodes for name in node.output}
    assert all(node.input[0] in outputs for node in nodes if node.op_type in ("Conv", "MaxPool", "Reshape"))


def test_the_graph_itself_is_not_changed() -> None:
    before = graph("mobilenet_v2").SerializeToString(deterministic=True)
    to_onnx(variant("mobilenet_v2", "int8-static"), graph("mobilenet_v2"))
    assert graph("mobilenet_v2").SerializeToString(deterministic=True) == before


def test_int4_codes_are_those_of_the_layer() -> None:
    model = variant("squeezenet1_1", "int4-static")
    exported = to_onnx(model, graph("squeezenet1_1"))
    stored: dict[str, Any] = {tensor.name: tensor for tensor in exported.graph.initializer}
    for name, layer in quantized_layers(model.network).items():
        codes = onnx.numpy_helper.to_array(stored[f"{name}.weight.codes"]).astype(np.int8)
        np.testing.assert_array_equal(codes, layer.weight_codes().numpy())


@pytest.mark.parametrize("runtime", RUNTIMES)
@torch.no_grad()
def test_a_range_found_at_run_time_is_that_of_the_whole_batch(runtime: str) -> None:
    made = variant(PERCEPTRON, "7-bit-dynamic")
    x = torch.cat([images(), 8 * images()])
    found = open_session(to_onnx(made, graph(PERCEPTRON)), runtime, 1).run(x)
    assert snr_db(made(x)[:8], found[:8]) > snr_db(made(x[:8]), found[:8]) + 10
