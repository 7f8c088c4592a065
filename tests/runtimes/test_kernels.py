"""The int8 kernels against their definition: a float operator on dequantized inputs and weights."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization.layers import LayerScheme, QuantConv2d
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.runtimes.kernels import (
    Activation,
    DynamicActivation,
    Int8Conv2d,
    Int8Linear,
    StaticActivation,
    int8_kernels_available,
)
from quantstudy.runtimes.lowering import runs_in_int8
from quantstudy.runtimes.onednn_geometry import is_right
from quantstudy.runtimes.uint8 import CodeMaxPool2d, choose_dynamic_qparams, quantize_to_uint8

needs_kernels = pytest.mark.skipif(not int8_kernels_available("cpu"), reason="no int8 kernels here")
EPS = torch.finfo(torch.float32).eps

GEOMETRIES = {
    "dense": ((8, 12), {"kernel": (3, 3), "padding": 1}),
    "pointwise": ((16, 24), {"kernel": (1, 1)}),
    "strided": ((8, 12), {"kernel": (3, 3), "padding": 1, "stride": 2}),
    "depthwise": ((16, 16), {"kernel": (3, 3), "padding": 1, "groups": 16}),
    "depthwise-strided": ((10, 10), {"kernel": (3, 3), "padding": 1, "stride": (2, 1), "groups": 10}),
    "depth-multiplier": ((6, 12), {"kernel": (3, 3), "padding": 1, "groups": 6}),
    "grouped": ((16, 32), {"kernel": (3, 3), "groups": 4}),
    "dilated": ((8, 8), {"kernel": (3, 3), "padding": 2, "dilation": 2}),
    "first-layer": ((3, 16), {"kernel": (7, 7), "padding": 3, "stride": 2}),
    "one-channel": ((1, 5), {"kernel": (3, 3), "padding": 1}),
    "wide-kernel": ((4, 6), {"kernel": (1, 5), "padding": (0, 2)}),
    "multiplier-33": ((2, 66), {"kernel": (3, 3), "padding": 1, "groups": 2}),
    "same": ((8, 8), {"kernel": (3, 3), "padding": "same"}),
    "valid": ((8, 8), {"kernel": (3, 3), "padding": "valid"}),
}
WRONG = {
    "wide-padding": ((3, 5), {"kernel": (2, 1), "padding": (1, 2)}),
    "padding-beyond-the-kernel": ((8, 8), {"kernel": (3, 3), "padding": 5, "dilation": (1, 2)}),
    "multiplier-uneven-stride": ((8, 16), {"kernel": (1, 9), "stride": (1, 2), "groups": 8}),
    "one-channel-uneven-stride": ((1, 5), {"kernel": (1, 1), "stride": (1, 2)}),
    "same-even": ((8, 8), {"kernel": (4, 2), "padding": "same", "dilation": (1, 3)}),
}
"""Geometries that oneDNN's operator gets wrong, in some sizes at least."""
ACTIVATIONS: dict[str, Activation] = {
    "static": StaticActivation(0.03, 97),
    "static-after-relu": StaticActivation(0.02, 0),
    "static-all-negative": StaticActivation(0.02, 255),
    "static-4bit": StaticActivation(0.3, 7, highest=15),
    "dynamic": DynamicActivation(),
    "dynamic-4bit": DynamicActivation(highest=15),
}


def dynamic_qparams(x: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / highest).clamp(min=EPS)
    return scale, (-low / scale).round().clamp(0, highest)


def reference_input(x: Tensor, activation: Activation) -> Tensor:
    """The input as the layer sees it, in separate steps: codes, and back to float."""
    if isinstance(activation, StaticActivation):
        scale, zero_point = torch.tensor(activation.scale), torch.tensor(activation.zero_point)
    else:
        scale, zero_point = dynamic_qparams(x, activation.highest)
    codes = (torch.round(x * (1 / scale)) + zero_point).clamp(0, activation.highest)
    return (codes - zero_point) * scale


def random_layer(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    most = 64 if int8_sums_saturate() else 128  # what the kernels take here
    codes = torch.randint(-most, most, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 0.001
    return codes, scale, torch.randn(shape[0], generator=generator)


def assert_similar(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


def conv_pair(geometry: str, activation: Activation, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The kernel's output and the reference's."""
    (inputs, outputs), settings_ = GEOMETRIES[geometry]
    rest: dict[str, Any] = {key: value for key, value in settings_.items() if key != "kernel"}
    codes, scale, bias = random_layer((outputs, inputs // rest.get("groups", 1), *settings_["kernel"]))  # type: ignore[misc]
    expected = F.conv2d(reference_input(x, activation), codes * scale.view(-1, 1, 1, 1), bias, **rest)
    return Int8Conv2d(codes, scale, bias, activation, **rest, **options)(x), expected


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_equals_simulation(geometry: str, activation: Activation) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, GEOMETRIES[geometry][0][0], 11, 9)
    actual, expected = conv_pair(geometry, activation, x)
    assert_similar(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("geometry", WRONG)
def test_a_convolution_that_comes_out_wrong_is_refused_and_simulated(geometry: str) -> None:
    (inputs, outputs), keys = WRONG[geometry]
    rest: dict[str, Any] = {key: value for key, value in keys.items() if key != "kernel"}
    convolution = torch.nn.Conv2d(inputs, outputs, keys["kernel"], **rest)  # type: ignore[arg-type]
    codes, scale, bias = random_layer(tuple(convolution.weight.shape))
    with pytest.raises(ValueError, match="kernel"):
        Int8Conv2d(codes, scale, bias, DynamicActivation(), **rest)
    layer = QuantConv2d(convolution, LayerScheme(WeightScheme(7), ActivationScheme("dynamic", 8)))
    layer.freeze()
    assert not runs_in_int8(layer)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_convolution_equals_simulation(data: st.DataObject) -> None:
    whole = data.draw
    groups, size = whole(st.integers(1, 4)), whole(st.integers(5, 9))
    inputs, outputs = groups * whole(st.integers(1, 5)), groups * whole(st.integers(1, 5))
    rest: dict[str, Any] = {
        "stride": whole(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": whole(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "dilation": whole(st.integers(1, 2)),
        "groups": groups,
    }
    kernel = (whole(st.integers(1, 3)), whole(st.integers(1, 3)))
    assume(is_right(torch.Size((outputs, inputs // groups, *kernel)), **rest))
    activation = whole(st.sampled_from([StaticActivation(0.03, whole(st.integers(0, 255))), DynamicActivation()]))
    codes, scale, bias = random_layer((outputs, inputs // groups, *kernel), seed=whole(st.integers(0, 99)))
    x = torch.randn(whole(st.integers(1, 3)), inputs, size, size, generator=torch.Generator().manual_seed(3))
    expected = F.conv2d(reference_input(x, activation), codes * scale.view(-1, 1, 1, 1), bias, **rest)
    assert_similar(Int8Conv2d(codes, scale, bias, activation, **rest)(x), expected)


@needs_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4, 32), (1, 32), (2, 5, 32), (32,)], ids=["2-D", "one row", "3-D", "1-D"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_linear_equals_simulation(shape: tuple[int, ...], activation: Activation, with_bias: bool) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape)
    codes, scale, bias = random_layer((10, 32))
    used = bias if with_bias else None
    expected = F.linear(reference_input(x, activation), codes * scale.view(-1, 1), used)
    assert_similar(Int8Linear(codes, scale, used, activation)(x), expected)


@needs_kernels
@pytest.mark.parametrize("post_op", ["relu", "relu6"])
@pytest.mark.parametrize("activation", [ACTIVATIONS["static"], ACTIVATIONS["dynamic"]], ids=["static", "dynamic"])
def test_post_op_is_applied(post_op: Any, activation: Activation) -> None:
    function = F.relu if post_op == "relu" else F.relu6
    x = torch.randn(2, 8, 6, 6)
    actual, expected = conv_pair("dense", activation, x, post_op=post_op)
    assert_similar(actual, function(expected))
    codes, scale, bias = random_layer((10, 32))
    rows = torch.randn(3, 32)
    expected = function(F.linear(reference_input(rows, activation), codes * scale.view(-1, 1), bias))
    assert_similar(Int8Linear(codes, scale, bias, activation, post_op=post_op)(rows), expected)


@needs_kernels
@pytest.mark.parametrize("activation", [ACTIVATIONS["static"], ACTIVATIONS["dynamic"]], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 8, 5, 5),
        torch.full((2, 8, 5, 5), 1.7),
        torch.full((2, 8, 5, 5), -1.7),
        torch.randn(1, 8, 5, 5),
        torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 16, 5, 5)[:, ::2],
        torch.randn(5, 5, 8, 2).permute(3, 2, 0, 1),
        torch.randn(1, 8, 5, 5).expand(3, 8, 5, 5),
    ],
    ids=["zero", "constant", "negative", "batch-1", "channels-last", "sliced", "permuted", "expanded"],
)
def test_odd_inputs(x: Tensor, activation: Activation) -> None:
    assert_similar(*conv_pair("dense", activation, x))


@needs_kernels
def test_sums_do_not_saturate_and_only_dynamic_follows_the_batch() -> None:
    codes = torch.full((4, 64, 3, 3), -128, dtype=torch.int8)
    if int8_sums_saturate():
        with pytest.raises(RuntimeError, match="saturate"):
            Int8Conv2d(codes, torch.ones(4), None, StaticActivation(1.0, 0))
        codes[:, ::2] = 0
    layer = Int8Conv2d(codes, torch.ones(4), None, StaticActivation(1.0, 0))
    assert (layer(torch.full((1, 64, 3, 3), 255.0)) == 255 * codes[0].sum()).all()
    codes, scale, _ = random_layer((12, 8, 3, 3))
    x = torch.randn(2, 8, 7, 7)
    dynamic = Int8Conv2d(codes, scale, None, DynamicActivation())
    static = Int8Conv2d(codes, scale, None, StaticActivation(0.03, 128))
    torch.testing.assert_close(dynamic(1024 * x), 1024 * dynamic(x))
    assert not torch.allclose(static(1024 * x), 1024 * static(x), rtol=0.5)


@needs_kernels
def test_copies_share_the_weight_not_a_number_stays_and_output_of_fewer_bits_is_refused() -> None:
    codes, scale, bias = random_layer((10, 32))
    layer, x = Int8Linear(codes, scale, bias, DynamicActivation()), torch.randn(4, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and not layer.state_dict()
    x[1, 3] = float("nan")
    assert layer(x).isnan().all()
    with pytest.raises(ValueError, match=r"output\.highest is 15"):
        Int8Linear(codes, scale, bias, DynamicActivation(), output=StaticActivation(0.1, 0, highest=15))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.sampled_from([15, 255]))
def test_dynamic_arithmetic_is_float32(seed: int, factor: float, highest: int) -> None:
    x = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * factor
    scale, zero_point = dynamic_qparams(x, highest)
    assert choose_dynamic_qparams(x, highest) == (scale.item(), zero_point.item())


@pytest.mark.parametrize("zero_point", [0, 97, 255])
def test_quantize_rounds_half_to_even_and_clamps(zero_point: int) -> None:
    x = torch.arange(-700, 700).float().mul(0.25).view(2, 7, 10, 10).to(memory_format=torch.channels_last)
    codes = quantize_to_uint8(x, 0.5, zero_point)
    assert codes.dtype == torch.uint8 and codes.stride() == x.stride()
    assert torch.equal(codes, (torch.round(x / 0.5) + zero_point).clamp(0, 255).to(torch.uint8))


@needs_kernels
@pytest.mark.parametrize("geometry", ["dense", "pointwise", "depthwise"])
@pytest.mark.parametrize("post_op", ["none", "relu", "relu6"])
def test_output_codes_are_the_codes_of_the_output(geometry: str, post_op: Any) -> None:
    output = StaticActivation(0.02, 40)
    x = torch.randn(2, GEOMETRIES[geometry][0][0], 9, 9, generator=torch.Generator().manual_seed(4))
    values, _ = conv_pair(geometry, ACTIVATIONS["static"], x, post_op=post_op)
    codes, _ = conv_pair(geometry, ACTIVATIONS["static"], x, post_op=post_op, output=output)
    expected = quantize_to_uint8(values, output.scale, output.zero_point)
    difference = (codes.int() - expected.int()).abs()
    assert codes.dtype == torch.uint8 and codes.is_contiguous(memory_format=torch.channels_last)
    assert difference.max() <= 1 and difference.float().mean() < 1e-3


@needs_kernels
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 8, 1, 1), (12, 8)], ids=["conv", "pointwise", "linear"])
def test_codes_are_taken_as_input(shape: tuple[int, ...]) -> None:
    grid = StaticActivation(0.03, 97)
    codes, scale, bias = random_layer(shape)
    layer = (Int8Conv2d if len(shape) == 4 else Int8Linear)(codes, scale, bias, grid)
    x = torch.randn(2, 8, 6, 6) if len(shape) == 4 else torch.randn(2, 8)
    assert torch.equal(layer(quantize_to_uint8(x, grid.scale, grid.zero_point)), layer(x))


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (2, 3), "ceil_mode": True}],
)
@pytest.mark.parametrize("batch", [0, 2])
def test_pooling_codes_equals_pooling_values(options: dict[str, Any], batch: int) -> None:
    pool = torch.nn.MaxPool2d(**options)
    codes = torch.randint(0, 256, (batch, 40, 9, 11), dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert torch.equal(CodeMaxPool2d(pool)(codes).float(), pool(codes.float()))
    assert torch.equal(CodeMaxPool2d(pool)(codes.float()), pool(codes.float()))


def test_kernels_are_refused_elsewhere() -> None:
    assert not int8_kernels_available("cuda") and not int8_kernels_available("meta")


@pytest.mark.skipif(int8_sums_saturate(), reason="this CPU has no VNNI")
def test_a_cpu_held_below_vnni_is_found_out() -> None:
    code = "from quantstudy.runtimes.kernels import int8_kernels_available as a; print(a('cpu'))"
    environment = {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
