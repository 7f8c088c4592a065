"""The kernels for CPUs without VNNI against sums in float64; they run on any x86 CPU with AVX2."""

import pytest
import torch
from torch import Tensor, nn

from quantstudy.runtimes import avx2, kernels
from quantstudy.runtimes.avx2 import Convolution3x3, Ending, FloatProduct, Product

needs_avx2 = pytest.mark.skipif(not avx2.compiled(), reason="no AVX2 or no compiler")
SIZES = [  # images, inputs, outputs, height, width: tiles of 2x2 and of 3x3, whole and not
    (1, 3, 64, 20, 22),
    (2, 16, 16, 7, 9),
    (1, 17, 20, 5, 5),
    (3, 64, 33, 6, 1),
    (2, 512, 64, 15, 15),
    (1, 200, 48, 8, 8),
    (1, 1, 1, 1, 1),
]


def codes_of(shape: tuple[int, ...], kind: str) -> Tensor:
    """uint8 codes, channels_last if they are images."""
    images = torch.full(shape, 255) if kind == "largest" else torch.randint(0, 256, shape)
    codes = images.to(torch.uint8)
    return codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes


def weights_of(shape: tuple[int, ...], kind: str) -> Tensor:
    """int8 codes; where they are the largest, the first output's are all positive, the second's all negative."""
    if kind == "random":
        return torch.randint(-128, 128, shape).to(torch.int8)
    weights = torch.where(torch.rand(shape) < 0.5, 127, -128).to(torch.int8)
    weights[:1], weights[1:2] = 127, -128
    return weights


def convolved(codes: Tensor, weights: Tensor, zero_point: int) -> Tensor:
    """The exact sums."""
    padded = nn.functional.pad(codes.double(), [1, 1, 1, 1], value=zero_point)
    return nn.functional.conv2d(padded, weights.double())


@needs_avx2
@pytest.mark.parametrize("kind", ["random", "largest"])
@pytest.mark.parametrize("zero_point", [0, 7, 255])
@pytest.mark.parametrize("size", SIZES)
def test_convolution_is_exact(size: tuple[int, ...], zero_point: int, kind: str) -> None:
    torch.manual_seed(0)
    n, inputs, outputs, h, w = size
    codes, weights = codes_of((n, inputs, h, w), kind), weights_of((outputs, inputs, 3, 3), kind)
    y = Convolution3x3(weights)(codes, zero_point, torch.ones(outputs), torch.zeros(outputs), Ending())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, convolved(codes, weights, zero_point).float())


@needs_avx2
@pytest.mark.parametrize("side", [2, 3])
def test_both_tiles_are_exact_at_the_most_channels(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx2, "_TRANSFORMS", {side: avx2._TRANSFORMS[side]})
    inputs = avx2._MOST_CHANNELS
    codes, weights = codes_of((1, inputs, 7, 6), "largest"), weights_of((2, inputs, 3, 3), "largest")
    y = Convolution3x3(weights)(codes, 255, torch.ones(2), torch.zeros(2), Ending())
    assert torch.equal(y, convolved(codes, weights, 255).float())


@needs_avx2
@pytest.mark.parametrize("kind", ["random", "largest"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 5, 3), (7, 4097, 40), (50, 8193, 16), (97, 64, 17)])
def test_product_is_exact(rows: int, inputs: int, outputs: int, kind: str) -> None:
    torch.manual_seed(0)
    codes, weights = codes_of((rows, inputs), kind), weights_of((outputs, inputs), kind)
    y = Product(weights)(codes, torch.ones(outputs), torch.zeros(outputs), Ending())
    assert torch.equal(y, (codes.double() @ weights.double().T).float())


@needs_avx2
@pytest.mark.parametrize("grid", [None, (0.37, 0), (0.37, 91), (1e-9, 3)])
@pytest.mark.parametrize("limits", [(-torch.inf, torch.inf), (0.0, torch.inf), (0.0, 6.0)])
def test_scale_bias_limits_and_codes(limits: tuple[float, float], grid: tuple[float, int] | None) -> None:
    torch.manual_seed(0)
    codes, weights = codes_of((2, 32, 9, 9), "random"), weights_of((24, 32, 3, 3), "random")
    scale, bias = torch.rand(24) * 1e-4, torch.randn(24)
    ending = Ending(*limits, grid)
    y = Convolution3x3(weights)(codes, 5, scale, bias, ending)
    rows = Product(weights.flatten(1))(codes.flatten(1)[:, : 32 * 9].contiguous(), scale, bias, ending)
    sums = (convolved(codes, weights, 5), codes.flatten(1)[:, : 32 * 9].double() @ weights.flatten(1).double().T)
    for found, exact, shape in ((y, sums[0], (24, 1, 1)), (rows, sums[1], (24,))):
        expected = (exact.float() * scale.view(shape) + bias.view(shape)).clamp(*limits)
        if grid is None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        else:
            assert found.dtype == torch.uint8
            steps = (torch.round(expected.double() / grid[0]) + grid[1]).clamp(0, 255)
            assert (found.double() - steps).abs().max() <= 1
            assert (found == steps).float().mean() > 0.999


@needs_avx2
def test_not_a_number_stays_one() -> None:
    convolution = Convolution3x3(weights_of((16, 32, 3, 3), "random"))
    y = convolution(
        codes_of((1, 32, 4, 4), "random"), 0, torch.full((16,), torch.nan), torch.zeros(16), Ending(0.0, 6.0)
    )
    assert y.isnan().all()


@needs_avx2
@pytest.mark.parametrize(("inputs", "scales", "biases"), [(31, 16, 16), (32, 15, 16), (32, 16, 3)])
def test_what_does_not_fit_the_weights_is_refused(inputs: int, scales: int, biases: int) -> None:
    weights = weights_of((16, 32, 3, 3), "random")
    scale, bias = torch.ones(scales), torch.zeros(biases)
    complaint = f"{inputs} input channels, {scales} scales and {biases} biases, the weights are"
    with pytest.raises(RuntimeError, match=complaint):
        Convolution3x3(weights)(codes_of((1, inputs, 4, 4), "random"), 0, scale, bias, Ending())
    with pytest.raises(RuntimeError, match=complaint):
        Product(weights[:, :, 0, 0])(codes_of((1, inputs), "random"), scale, bias, Ending())
    with pytest.raises(RuntimeError, match="contiguous"):
        Product(weights[:, :, 0, 0])(codes_of((1, 32), "random"), torch.ones(32)[::2], torch.zeros(16), Ending())


@needs_avx2
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 10), (5, 16), (40, 33), (0, 16)])
def test_float_product_is_right(rows: int, outputs: int, bits: int, groups: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, 6000)).to(torch.int8)
    scale, bias, x = torch.rand(outputs, groups), torch.randn(outputs), torch.randn(rows, 6000)
    weight = codes.double() * scale.double().repeat_interleave(6000 // groups, dim=1)
    found = FloatProduct(codes, scale, bits)(x, bias)
    exact = x.double() @ weight.T + bias
    assert found.shape == exact.shape
    assert not rows or (found - exact).abs().max() < 2e-6 * exact.abs().max()


@needs_avx2
def test_float_product_refuses_what_does_not_fit() -> None:
    product = FloatProduct(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 1), 8)
    for x, bias in ((torch.ones(1, 31), torch.ones(16)), (torch.ones(1, 32), torch.ones(15))):
        with pytest.raises(RuntimeError, match="the weight is"):
            product(x, bias)


@needs_avx2
@pytest.mark.skipif(not kernels.int8_kernels_available(), reason="no int8 kernels here")
@pytest.mark.parametrize("layout", ["one of a batch", "without a batch", "cut out"])
def test_images_that_lie_otherwise_in_memory(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx2, "available", lambda: True)
    torch.manual_seed(0)
    weights, bias = torch.randint(-64, 65, (32, 32, 3, 3)).to(torch.int8), torch.randn(64)[::2]
    layer = kernels.Int8Conv2d(weights, torch.full((32,), 1e-3), bias, kernels.DynamicActivation(), padding=1)
    network = nn.Sequential(layer, layer)
    batch = torch.randn(3, 32, 30, 20).contiguous(memory_format=torch.channels_last)
    expected = network(batch[1:2].contiguous())
    if layout == "one of a batch":
        found = network(batch[1][None])
    elif layout == "without a batch":
        found = network(batch[1])[None]
    else:
        found = network(nn.functional.pad(batch, [1, 2, 3, 4])[1:2, :, 3:33, 1:21])
    torch.testing.assert_close(found, expected)
    simulated = nn.functional.conv2d(batch[1:2], weights * 1e-3, bias, padding=1)
    assert (layer(batch[1])[None] - simulated).abs().max() < 0.02 * simulated.abs().max()


@needs_avx2
@pytest.mark.skipif(not kernels.int8_kernels_available(), reason="no int8 kernels here")
@pytest.mark.parametrize(
    "activation", [kernels.StaticActivation(0.02, 0), kernels.StaticActivation(0.02, 91), kernels.DynamicActivation()]
)
def test_layers_use_them_and_compute_the_same(activation: kernels.Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights, scale, bias = torch.randint(-64, 65, (40, 32, 3, 3)).to(torch.int8), torch.rand(40) * 0.01, torch.randn(40)
    x = torch.randn(2, 32, 12, 12)
    found = {}
    for here in (True, False):
        monkeypatch.setattr(avx2, "available", lambda here=here: here)
        layer = kernels.Int8Conv2d(weights, scale, bias, activation, padding=1, post_op="relu")
        linear = kernels.Int8Linear(weights.flatten(1), scale, bias, activation)
        assert (layer._winograd is not None) == (linear._few_rows is not None) == here
        found[here] = layer(x), linear(x.flatten(1)[:, : 32 * 9])
    for own, onednn in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(own, onednn, rtol=1e-5, atol=1e-4)
