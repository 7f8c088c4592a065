"""The arithmetic: round trips, agreement with torch and torchao, the straight-through gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantstudy.quantization.schemes import ActivationScheme, WeightScheme

SHAPES = [(4, 3, 3, 3), (8, 1, 3, 3), (5, 32), (3, 33), (2, 70), (16, 16, 1, 1)]
SCHEMES = [WeightScheme(bits, group) for bits in (2, 3, 4, 5, 8) for group in (None, 8, 32)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_is_within_half_a_step(scheme: WeightScheme, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = scheme.choose_scale(weight)
    back = scheme.dequantize(scheme.quantize(weight, scale), scale)
    assert torch.equal(scheme.quantize(back, scale), scheme.quantize(weight, scale))
    steps = scheme.ungrouped(scale.unsqueeze(2).expand_as(scheme.grouped(weight)), weight.shape)
    # A 16-bit scale may be rounded down by 2^-9: the largest code then clips by that share of its value.
    slack = 1e-5 if scheme.group_size is None else 2**-8 * 2 ** (scheme.bits - 1)
    assert ((back - weight).abs() <= steps * (0.5 + slack)).all()


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 16, 32]),
    exponent=st.integers(-6, 6),
)
@settings(max_examples=60, deadline=None)
def test_codes_stay_in_range_and_shape(rows: int, columns: int, bits: int, group: int | None, exponent: int) -> None:
    scheme = WeightScheme(bits, group)
    weight = torch.randn(rows, columns) * 10.0**exponent
    codes = scheme.quantize(weight, scheme.choose_scale(weight))
    assert codes.shape == weight.shape and codes.dtype == torch.int8
    assert codes.min() >= scheme.lowest and codes.max() <= scheme.highest


def test_fake_quantize_equals_the_stored_weight_and_passes_the_gradient() -> None:
    scheme = WeightScheme(4)
    weight = torch.randn(6, 10, requires_grad=True)
    rounded = scheme.fake_quantize(weight)
    scale = scheme.choose_scale(weight)
    assert torch.equal(rounded.detach(), scheme.dequantize(scheme.quantize(weight, scale), scale))
    gradient = torch.randn_like(weight)
    rounded.backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_agree_with_torch_fake_quantize(bits: int) -> None:
    scheme = WeightScheme(bits)
    weight = torch.randn(7, 12)
    scale = scheme.choose_scale(weight)
    zeros = torch.zeros(7, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale.flatten(), zeros, 0, scheme.lowest, scheme.highest)
    torch.testing.assert_close(scheme.dequantize(scheme.quantize(weight, scale), scale), expected)


@pytest.mark.parametrize("low, high", [(0.0, 6.0), (-1.0, 3.0), (2.0, 5.0), (-4.0, -1.0), (0.0, 0.0)])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_grid_holds_zero_and_the_range(low: float, high: float, bits: int) -> None:
    scheme = ActivationScheme("static", bits)
    scale, zero_point = scheme.choose_qparams(low, high)
    assert 0 <= zero_point <= scheme.highest
    assert (0 - zero_point) * scale <= min(low, 0) + scale / 2
    assert (scheme.highest - zero_point) * scale >= max(high, 0) - scale / 2


def test_scales_and_the_activation_grid_agree_with_torchao() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(5, 64)
    for scheme in (WeightScheme(8), WeightScheme(4), WeightScheme(4, 32)):
        block = (1, scheme.group_size or 64)
        grid = (block, torch.int8, scheme.lowest, scheme.highest)
        kind = primitives.MappingType.SYMMETRIC_NO_CLIPPING_ERR
        expected, _ = primitives.choose_qparams_affine(weight, kind, *grid, scale_dtype=torch.float32)
        found = scheme.choose_scale(weight)
        torch.testing.assert_close(found, expected.view_as(found), rtol=2**-8 if scheme.group_size else 1e-6, atol=0)
    values = torch.randn(100)
    low, high = (float(bound) for bound in torch.aminmax(values))
    kind = primitives.MappingType.ASYMMETRIC
    scale, zero_point = primitives.choose_qparams_affine(values, kind, (100,), torch.uint8, 0, 255)
    found = ActivationScheme("static", 8).choose_qparams(low, high)
    assert found[0] == pytest.approx(float(scale)) and found[1] == int(zero_point)
