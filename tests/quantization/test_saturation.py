"""Codes that never saturate: by their definition, near the weights, and exact on every runtime that is here."""

import itertools
import math

import numpy as np
import onnx.parser
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantstudy.methods.gptq import gptq_codes
from quantstudy.methods.moments import input_moments
from quantstudy.quantization.saturation import bounds_beside, limit_of, may_saturate, round_pairs
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.runtimes.kernels import Int8Conv2d, Int8Linear, StaticActivation, int8_kernels_available
from quantstudy.runtimes.onnx_tuning import may_saturate as file_may_saturate
from quantstudy.runtimes.sessions import why_missing

LAYERS: dict[str, nn.Conv2d | nn.Linear] = {
    "dense": nn.Conv2d(64, 32, 3, padding=1),
    "pointwise": nn.Conv2d(18, 24, 1),
    "strided": nn.Conv2d(16, 64, 4, stride=4),
    "first": nn.Conv2d(3, 32, 3, stride=2, padding=1),
    "depthwise": nn.Conv2d(96, 96, 3, padding=1, groups=96),
    "multiplier": nn.Conv2d(32, 64, 3, padding=1, groups=32),
    "two-channels": nn.Conv2d(64, 64, 3, padding=1, groups=32),
    "grouped": nn.Conv2d(128, 128, 3, padding=1, groups=4),
    "linear": nn.Linear(130, 33),
    "odd": nn.Linear(33, 10),
}
SIGNS = (1.0, -1.0)


def groups_of(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def hard_weight(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Rows of many large weights of one sign."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight.shape, generator=generator)
    return weight + torch.randint(-1, 2, (len(weight),), generator=generator).view(-1, *[1] * (weight.ndim - 1))


def worst_pair(codes: Tensor) -> int:
    """The largest sum of products of two neighbours with inputs of 0 or 255, one by one."""
    rows = codes.int().transpose(0, 1)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    return max(int((255 * (a * i + b * j)).abs().max()) for a, b in pairs for i, j in [(1, 0), (0, 1), (1, 1)])


def limited(name: str) -> tuple[nn.Conv2d | nn.Linear, Tensor]:
    layer = LAYERS[name]
    scheme, weight = WeightScheme(8, limit=limit_of(layer)), hard_weight(layer)
    return layer, scheme.quantize(weight, scheme.choose_scale(weight))


@pytest.mark.parametrize("name", LAYERS)
def test_limited_codes_never_saturate(name: str) -> None:
    layer, codes = limited(name)
    assert not may_saturate(codes, groups_of(layer))
    if limit_of(layer) == "pairs":
        assert 255 * 100 < worst_pair(codes) < 2**15
    plain = WeightScheme(8)
    free = plain.quantize(hard_weight(layer), plain.choose_scale(hard_weight(layer)))
    assert may_saturate(free, groups_of(layer)) == (name != "depthwise")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-128, 127), st.integers(-128, 127)), min_size=1, max_size=8), st.integers(0, 255))
def test_what_may_saturate_is_what_does(pairs: list[tuple[int, int]], highest: int) -> None:
    codes = torch.tensor(pairs, dtype=torch.int8).view(1, -1)
    ends = itertools.product((0, highest), repeat=2)
    sums = [a * x + b * y for (a, b), (x, y) in itertools.product(pairs, list(ends))]
    wrong = any(abs(total) > 2**15 - 1 for total in sums)
    assert may_saturate(codes, highest=highest) == wrong


@settings(max_examples=300, deadline=None)
@given(st.floats(-128, 127, width=32), st.floats(-128, 127, width=32))
def test_a_pair_is_cut_no_more_than_it_must(first: float, second: float) -> None:
    codes = round_pairs(torch.tensor([[first, second]]), torch.ones(1), torch.Size([1, 2]))[0]
    a, b = codes.tolist()
    excess = max(0.0, abs(first) + abs(second) - 128) if first * second > 0 else 0.0
    assert min(a, b) >= -128 and max(a, b) <= 127 and (a * b <= 0 or abs(a + b) <= 128)
    assert abs(a - first) <= excess / 2 + 1 and abs(b - second) <= excess / 2 + 1
    if excess == 0 and abs(a + b) < 128:
        assert (a, b) == (round(first), round(second))
    low, high = bounds_beside(torch.tensor(a))
    assert low <= b <= high


def test_the_error_lies_between_those_of_8_and_of_7_bits() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))

    def error(scheme: WeightScheme) -> float:
        scale = scheme.choose_scale(weight)
        return float((scheme.dequantize(scheme.quantize(weight, scale), scale) - weight).square().sum())

    free, pairs, codes = (error(WeightScheme(8, limit=limit)) for limit in ("none", "pairs", "codes"))  # type: ignore[arg-type]
    assert free < pairs < 0.6 * codes
    assert error(WeightScheme(8, weight_range="mse", limit="pairs")) <= pairs


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "grouped", "linear", "first"])
def test_gptq_keeps_the_limit_and_loses_less_of_the_output(name: str) -> None:
    layer = LAYERS[name]
    weight = hard_weight(layer)
    generator = torch.Generator().manual_seed(2)
    size = (layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else (layer.in_features,)
    x = torch.randn(64, *size, generator=generator).relu() @ torch.rand(size[-1], size[-1], generator=generator)
    moments = input_moments(nn.Sequential(layer), [x])["0"]
    scheme = WeightScheme(8, limit=limit_of(layer))
    scale = scheme.choose_scale(weight)
    codes = gptq_codes(weight, scale, scheme, moments)
    assert not may_saturate(codes, groups_of(layer))

    def output_error(codes: Tensor) -> float:
        return float(exact(layer, scheme.dequantize(codes, scale) - weight, x).square().sum())

    assert output_error(codes) < 0.7 * output_error(scheme.quantize(weight, scale))


def as_onnx(layer: nn.Conv2d | nn.Linear, codes: Tensor, step: float) -> onnx.ModelProto:
    """The layer on images of integers from 0 to 255, its output quantized to steps of a power of two."""
    if isinstance(layer, nn.Conv2d):
        shape, pads = f"n, {layer.in_channels}, 8, 8", 2 * list(layer.padding)  # type: ignore[arg-type]
        operator = f"Conv<strides = {list(layer.stride)}, pads = {pads}, group = {layer.groups}>"
    else:
        shape, operator = f"n, {layer.in_features}", "Gemm<transB = 1>"
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 17]>
        layer (float[{shape}] x) => (float[] z) {{
            q = QuantizeLinear(x, one, zero)
            d = DequantizeLinear(q, one, zero)
            w = DequantizeLinear<axis = 0>(codes, scales)
            y = {operator}(d, w)
            r = QuantizeLinear(y, step, middle)
            z = DequantizeLinear(r, step, middle)
        }}
    """)
    constants = {"one": np.float32(1), "zero": np.uint8(0), "step": np.float32(step), "middle": np.uint8(128)}
    constants |= {"codes": codes.numpy(), "scales": np.ones(len(codes), np.float32)}
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model.graph.initializer.extend(tensors)
    return model


def large_inputs(layer: nn.Conv2d | nn.Linear) -> Tensor:
    size = (4, layer.in_channels, 8, 8) if isinstance(layer, nn.Conv2d) else (4, layer.in_features)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(0, 256, size, generator=generator).float()
    return torch.where(torch.rand(size, generator=generator) < 0.8, 255.0, noise)


def exact(layer: nn.Conv2d | nn.Linear, codes: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return nn.functional.conv2d(x.double(), codes.double(), None, *geometry)  # type: ignore[arg-type]
    return x.double() @ codes.double().T


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", LAYERS)
def test_runtimes_are_exact_as_exported(name: str, runtime: str) -> None:
    if why_missing(runtime):
        pytest.skip(f"no {runtime}")
    layer, codes = limited(name)
    x = large_inputs(layer)
    sums = exact(layer, codes, x)
    step = 2.0 ** math.ceil(math.log2(float(sums.abs().max()) / 127))  # nothing is clipped
    model = as_onnx(layer, codes, step)
    assert not file_may_saturate(model)
    if runtime == "onnxruntime":
        import onnxruntime

        found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})[0]
    else:
        import openvino

        compiled = openvino.Core().compile_model(openvino.Core().read_model(model.SerializeToString()), "CPU")
        found = compiled([x.numpy()])[0]
    assert torch.equal(torch.from_numpy(found).double(), (sums / step).round() * step)


@pytest.mark.skipif(not int8_kernels_available(), reason="no int8 kernels here")
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_exact(name: str) -> None:
    layer, codes = limited(name)
    x, scales, grid = large_inputs(layer), torch.ones(len(codes)), StaticActivation(1.0, 0)
    if isinstance(layer, nn.Conv2d):
        geometry = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        kernel: nn.Module = Int8Conv2d(codes, scales, None, grid, **geometry)  # type: ignore[arg-type]
    else:
        kernel = Int8Linear(codes, scales, None, grid)
    assert torch.equal(kernel(x).double(), exact(layer, codes, x))
