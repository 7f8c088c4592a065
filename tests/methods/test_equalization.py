import onnx
import pytest
import torch
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.equalization import Pair, absorb_high_biases, equalize, find_pairs
from quantstudy.methods.recipes import quantize
from quantstudy.methods.uniform import output_error
from quantstudy.network.architectures import build
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.graph import capture
from quantstudy.network.padding import SamePadding
from quantstudy.params import Static
from quantstudy.quantization.layers import ChannelReLU
from quantstudy.runtimes.onnx_model import to_onnx


def chain(activation: nn.Module) -> nn.Module:
    """A dense, a depthwise and a grouped convolution, pooling, and a linear layer behind a flattened image."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3, groups=8), type(activation)())
    more = (nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 9, 5))
    return nn.Sequential(*layers, *more).eval()


def uneven(model: nn.Module) -> nn.Module:
    """Give the channels of every layer very different ranges, and the activations values beyond 6."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            size = torch.logspace(-1, 1.5, len(layer.weight))[torch.randperm(len(layer.weight))]
            layer.weight.data.mul_(size.view(-1, 1, 1, 1))
    return model


@pytest.fixture(params=[nn.ReLU, nn.ReLU6], ids=["relu", "relu6"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return uneven(chain(request.param()))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_same_function(found: nn.Module, wanted: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        y, other = wanted(images), found(images)
    assert float((other - y).norm() / y.norm()) < 1e-4


def test_the_function_stays_and_ranges_are_equal(network: nn.Module, images: Tensor) -> None:
    found = equalize(network)
    assert_same_function(found, network, images)
    first, second = found[0].weight.flatten(1).abs().amax(1), found[2].weight.flatten(1).abs().amax(1)
    torch.testing.assert_close(first, second, rtol=1e-2, atol=0)
    assert (network[0].weight.flatten(1).abs().amax(1) / network[2].weight.flatten(1).abs().amax(1)).max() > 1.5


def test_mobilenet_keeps_its_function_and_is_not_exported_without_its_bounds() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    model = build("mobilenet_v2", 10).train()
    with torch.no_grad():
        for _ in range(10):
            model(images)
    folded = fold_batchnorm(model)
    found = equalize(folded)
    assert_same_function(found, folded, images)
    bounded = sum(isinstance(module, ChannelReLU) for module in found.modules())
    assert bounded == sum(isinstance(module, nn.ReLU6) for module in folded.modules()) == 35
    with pytest.raises(UserError, match=r"equalize: the bounds per channel of \S+ have no place"):
        to_onnx(found, onnx.ModelProto())


def test_pairs_end_where_a_value_is_read_twice() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(torch.relu(self.b(y))) + y

    images = torch.randn(2, 4, 5, 5)
    assert find_pairs(capture(Residual(), images)) == [Pair("b", "c", None, 0, True, True)]

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert find_pairs(capture(Branch(), images)) == []


@pytest.mark.parametrize("bound", [None, 20.5])
@torch.no_grad()
def test_absorbing_biases_that_the_activation_stays_above_keeps_the_function(
    bound: float | None, images: Tensor
) -> None:
    torch.manual_seed(0)
    relu = nn.ReLU() if bound is None else ChannelReLU(torch.full((6,), bound))
    network = nn.Sequential(nn.Conv2d(3, 6, 1), relu, nn.Conv2d(6, 4, 1, groups=2)).eval()
    network[0].bias[:3] = 20.0
    before, wanted = network[0].bias.clone(), network(images)
    absorb_high_biases(network, [images])
    assert (network[0].bias[:3] < before[:3] - 10).all()
    torch.testing.assert_close(network[0].bias[3:], before[3:])
    assert float((network(images) - wanted).norm() / wanted.norm()) < 1e-3


def test_equalization_that_would_hurt_is_undone(network: nn.Module, images: Tensor) -> None:
    calibration = Calibration(network, [images], bins=512)
    rows = [Static(kind="static", weight_bits=8, bias_correction=True, equalize=way) for way in (False, True)]
    plain, variant = (quantize(network, calibration, row) for row in rows)
    errors = [output_error(network, model, [images]) for model in (plain, variant)]
    assert errors[1] <= errors[0]
    undone = "undone: on calibration images" in variant.skipped.get("equalize", {}).get("", "")
    assert undone == torch.equal(plain(images), variant(images))


def test_equalization_that_helps_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        factors = torch.logspace(-2, 2, 32)
        model[1].weight.mul_(factors[:, None])
        model[1].bias.mul_(factors)
        model[3].weight.div_(factors)
    images = torch.randn(64, 1, 4, 8)
    calibration = Calibration(model, [images], bins=512)
    rows = [Static(kind="static", weight_bits=8, equalize=way) for way in (False, True)]
    plain, variant = (output_error(model, quantize(model, calibration, row), [images]) for row in rows)
    assert variant < 0.1 * plain


def test_pairs_reach_over_padding_by_which_nothing_is_absorbed() -> None:
    pads = (nn.ZeroPad2d((0, 1, 0, 1)), SamePadding([3, 3], [2, 2], [1, 1]), nn.ConstantPad2d(1, 1.0))
    for pad, expected in zip(pads, (True, True, False), strict=True):
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), pad, nn.Conv2d(8, 8, 3, stride=2))
        found = find_pairs(capture(network, torch.randn(2, 3, 8, 8)))
        assert found == [Pair("0", "3", None, 0, True, False)] * expected
