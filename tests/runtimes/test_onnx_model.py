import copy
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.errors import UserError
from quantstudy.measure import agreement
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.network.architectures import build
from quantstudy.network.attention import Product, operands
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.graph import put
from quantstudy.quantization.layers import ActivationQuantizer, quantized_layers
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import Variant, save_variant
from quantstudy.runtimes import executables, lowering, onnx_tuning
from quantstudy.runtimes.onnx_graph import INPUT, graph_of, load_graph, network_graph
from quantstudy.runtimes.onnx_model import save_onnx, to_onnx
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import Session, open_session, why_missing
from tests.runtimes.variants import METHODS, quantized

SIZE, CLASSES = 32, 10
PERCEPTRON = f"{__name__}:perceptron"
WIDE = f"{__name__}:wide"
RUNTIMES = [
    pytest.param(runtime, marks=pytest.mark.skipif(why_missing(runtime) is not None, reason=f"no {runtime}"))
    for runtime in ("onnxruntime", "openvino")
]


def perceptron(num_classes: int) -> nn.Module:
    """Two linear layers, 3072 and 32 inputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 32), nn.ReLU(), nn.Linear(32, num_classes))


def wide(num_classes: int) -> nn.Module:
    """Linear layers so large that OpenVINO gains from quantizing their inputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 512), nn.ReLU(), nn.Linear(512, num_classes))


@functools.cache
def graph(architecture: str) -> onnx.ModelProto:
    return network_graph(architecture, CLASSES, SIZE)


@functools.cache
def network(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(architecture, CLASSES)
    model(torch.randn(16, 3, SIZE, SIZE))  # gives the BatchNorms statistics
    return fold_batchnorm(model)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@functools.cache
def variant(architecture: str, method: str) -> Variant:
    return METHODS[method](network(architecture), images())


def session(architecture: str, model: nn.Module, runtime: str, *, plain: bool = False) -> Session:
    exported = to_onnx(model, graph(architecture)) if plain else exported_model(model, graph(architecture), runtime)
    return open_session(exported, runtime, 1)


def snr_db(wanted: Tensor, found: Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (wanted - found).norm().clamp_min(1e-12)))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", [*METHODS, pytest.param("transposed", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_runtime_computes_what_the_variant_does(method: str, runtime: str) -> None:
    stored = ("convnext_tiny", "int4-weight-only") if method == "transposed" else ("mobilenet_v2", method)
    model = variant(*stored)
    found = session(stored[0], model, runtime).run(images())
    weight_only = not any(layer.scheme.activation.mode != "none" for layer in quantized_layers(model).values())
    assert snr_db(model(images()), found) > (35 if weight_only else 15)  # codes at a half fall either way


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "architecture", ["mobilenet_v2", "squeezenet1_1", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_runtime_computes_what_the_fp32_model_does_at_any_batch_size(architecture: str, runtime: str) -> None:
    run = session(architecture, network(architecture), runtime).run
    for count in (1, 3):
        torch.testing.assert_close(run(images(count)), network(architecture)(images(count)), rtol=1e-3, atol=1e-4)


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
    for plain in (True, False):
        opened = session(architecture, model, runtime, plain=plain)
        torch.testing.assert_close(opened.run(images()), model(images()), rtol=1e-3, atol=1e-3)
    if (method, runtime) == ("7-bit-static", "onnxruntime"):  # here with float32 between the layers
        assert opened.integer_layers == {"twice", "tied", "head"}


WEIGHTS = [WeightScheme(8), WeightScheme(8, 16), WeightScheme(4, 16), WeightScheme(8, 32)]


class EveryKind(nn.Module):
    """Every kind of layer, an input that two layers read, and a product of two activations.

    The layers' rows have 27, 27, 32, 16 and 384 weights.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.beside = nn.Conv2d(3, 16, 3, stride=4), nn.Conv2d(3, 16, 3, stride=4)
        self.grouped, self.turned = nn.Conv2d(16, 8, 2, groups=2), nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.product, self.head = Product(), nn.Linear(6 * 8 * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to logits [N, classes]."""
        x = self.turned(self.grouped(self.first(x).relu() - self.beside(x)).relu())
        return self.head((self.product(x, x.transpose(-2, -1)) + x).flatten(1))


def every_kind(num_classes: int) -> nn.Module:
    return EveryKind(num_classes)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: f"{weight.bits}-{weight.group_size}")
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@torch.no_grad()
def test_a_range_found_at_run_time_has_the_bits_of_its_scheme(bits: int, weight: WeightScheme, runtime: str) -> None:
    architecture, scheme = f"{__name__}:every_kind", ActivationScheme("dynamic", bits)
    model = quantized(network(architecture), images(), weight, scheme)
    put(model.network, {name: ActivationQuantizer(scheme) for name in operands(model.network)})
    opened = session(architecture, model, runtime)
    x = torch.cat([images(16), images(16).abs() + 1, -images(16).abs() - 1, torch.zeros(2, 3, SIZE, SIZE)])
    each = [snr_db(model(pair), opened.run(pair)) for pair in x.split(2)]
    assert np.median(each) > 60  # codes at a half fall either way


@pytest.mark.parametrize(
    ("method", "saturates", "wanted"),
    [
        ("int8-static", True, "saturate"),
        ("saturation-free", False, "side of a half"),
        ("7-bit-static", True, "side of a half"),
        ("int8-weight-only", True, r"logits lie \S+ apart in the median, those of all images \S+$"),
    ],
)
@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_other_predictions_are_told(method: str, saturates: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "int8_sums_saturate", lambda: saturates)
    monkeypatch.setattr(agreement, "WANTED_AGREEMENT", 101)
    pixels = torch.randint(256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    seen = P.Preprocessing(image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    split = Split(torch.zeros(4, dtype=torch.int64), ("a", "b"), seen, pixels)
    made = copy.deepcopy(variant(PERCEPTRON, method))
    plain, timed = to_onnx(made, graph(PERCEPTRON)), exported_model(made, graph(PERCEPTRON), "onnxruntime")
    facts = agreement.check(made, plain, {"onnxruntime": timed}, split, seen)
    assert any(re.search(wanted, remark) for remark in facts["remarks"] if "as exported" in remark)
    is_tuned = method != "int8-weight-only"
    assert facts["exported"] == {"onnxruntime": "tuned for onnxruntime" if is_tuned else "as exported"}
    assert list(facts["agreement"]) == ["onnxruntime"] and bool(facts["agreement_as_exported"]) == is_tuned


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("saturates", [True, False])
def test_a_layer_is_real_where_its_sums_are_exact(
    saturates: bool, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lowering, onnx_tuning):
        monkeypatch.setattr(module, "int8_sums_saturate", lambda: saturates)
    exact = not saturates or runtime == "onnxruntime"  # which multiplies uint8 by uint8 then
    real = {"int8-static": exact, "saturation-free": True, "7-bit-static": True, "int4-static": False}
    for method, wanted in real.items():
        made = variant(PERCEPTRON, method)
        exported = exported_model(made, graph(PERCEPTRON), runtime)
        found = executables.open_executable(made, exported, runtime)
        assert set(found.layers.values()) == {wanted}, method


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_limited_weights_never_saturate(
    kind: str, saturates: bool, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_tuning, "int8_sums_saturate", lambda: saturates)
    model = copy.deepcopy(network(PERCEPTRON))
    for layer in (model[1], model[3]):  # type: ignore[index]
        layer.weight.abs_().clamp_(min=0.9 * float(layer.weight.max()))
    x = 1 + images().abs()
    limited = {"static": "saturation-free", "dynamic": "saturation-free-dynamic"}[kind]
    for method, safe in ((f"7-bit-{kind}", True), (limited, True), (f"int8-{kind}", False)):
        made = METHODS[method](model, x)
        exported = exported_model(made, graph(PERCEPTRON), runtime)
        assert onnx_tuning.may_saturate(to_onnx(made, graph(PERCEPTRON))) != safe
        if safe or (runtime == "onnxruntime" and saturates):  # on this CPU others may saturate or not
            found = open_session(exported, runtime, 1)
            torch.testing.assert_close(found.run(x), made(x), rtol=1e-2, atol=1e-2)
            assert found.integer_layers == ({"1", "3"} if kind == "static" or runtime == "onnxruntime" else set())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("architecture", ["mobilenet_v2", PERCEPTRON])
def test_every_layer_of_a_static_model_runs_in_int8(architecture: str, runtime: str) -> None:
    model = variant(architecture, "int8-static")
    assert session(architecture, model, runtime).integer_layers >= set(quantized_layers(model.network))
    assert not session(architecture, network(architecture), runtime).integer_layers


@pytest.mark.parametrize("method", ["int8-static", "int4-static", "int4-weight-only"])
def test_a_file_is_as_small_as_the_variants_own(method: str, tmp_path: Path) -> None:
    model, own, path = variant("mobilenet_v2", method), tmp_path / "x.pth", tmp_path / "x.onnx"
    save_variant(own, model, {"architecture": "mobilenet_v2", "classes": CLASSES, "preprocessing": {}}, "x")
    save_onnx(path, to_onnx(model, graph("mobilenet_v2")))
    assert path.stat().st_size < 1.03 * own.stat().st_size


def test_a_graph_is_small_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    save_onnx(path, graph("mobilenet_v2"))
    assert path.stat().st_size < 30_000
    assert load_graph(path) == graph("mobilenet_v2")
    before = graph("mobilenet_v2").SerializeToString(deterministic=True)
    to_onnx(variant("mobilenet_v2", "int8-static"), graph("mobilenet_v2"))
    assert graph("mobilenet_v2").SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("size", "poolings"), [pytest.param(448, 1, marks=pytest.mark.slow), (224, 0)])
def test_pooling_over_single_pixels_is_left_out(size: int, poolings: int) -> None:
    """VGG's pooling to 7 x 7 does nothing to an image of 224 pixels."""
    nodes = network_graph("vgg11", CLASSES, size).graph.node
    assert sum(node.op_type == "AveragePool" for node in nodes) == poolings
    outputs = {INPUT} | {name for node in nodes for name in node.output}
    assert all(node.input[0] in outputs for node in nodes if node.op_type in ("Conv", "MaxPool", "Reshape"))


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
    found = session(PERCEPTRON, made, runtime).run(x)
    assert snr_db(made(x)[:8], found[:8]) > snr_db(made(x[:8]), found[:8]) + 10


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_runtime_quantizes_no_input_that_the_file_leaves_in_float(runtime: str, bits: int) -> None:
    network = build(WIDE, CLASSES).eval()
    images = torch.randn(8, 3, SIZE, SIZE)
    variant = quantize(network, Calibration(network, [images]), P.WeightOnly(kind="weight_only", weight_bits=bits))
    session = open_session(to_onnx(variant, graph(WIDE)), runtime, 1)
    assert sqnr_db(variant(images).detach().numpy(), session.run(images).numpy()) > 100


class Shared(nn.Module):
    """Calls one linear layer on tokens, then on their mean: two operators in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.both(self.stem(x).flatten(2).transpose(1, 2)).mean(1)))


def shared(num_classes: int) -> nn.Module:
    return Shared()


@torch.no_grad()
@pytest.mark.parametrize("method", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("runtime", RUNTIMES[:1])
def test_a_linear_layer_on_tokens_and_on_their_mean_keeps_its_bias(method: str, runtime: str) -> None:
    torch.manual_seed(0)
    name, images = f"{__name__}:shared", torch.randn(4, 3, SIZE, SIZE)
    variant = METHODS[method](fold_batchnorm(build(name, CLASSES).eval()), images)
    exported = to_onnx(variant, network_graph(name, CLASSES, SIZE))
    assert sqnr_db(variant(images).numpy(), open_session(exported, runtime, 1).run(images).numpy()) > 25


def test_an_operator_that_onnx_lacks_is_named_in_one_line() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"export: .*rrelu") as raised:
        graph_of(model.eval(), (3, SIZE, SIZE))
    assert str(raised.value).isprintable()
