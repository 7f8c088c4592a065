"""A lowered network against the simulated one it came from: same numbers, same layers counted, source untouched."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.schemes import ActivationScheme, Mode, WeightScheme
from quantstudy.runtimes import lowering
from quantstudy.runtimes.kernels import Int8Conv2d, StaticActivation, int8_kernels_available
from quantstudy.runtimes.lowering import Kernel, fuse, lower_int8, use_kernels
from quantstudy.runtimes.uint8 import CodeMaxPool2d
from tests.runtimes.variants import quantized

pytestmark = pytest.mark.skipif(not int8_kernels_available("cpu"), reason="no int8 kernels here")
INT8 = WeightScheme(8, limit="codes" if int8_sums_saturate() else "none")


class Residual(nn.Module):
    """A block whose output is read by a sum and by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.relu(self.first(x)))


def plain_network() -> nn.Module:
    """As VGG: ReLU and pooling between convolutions, a flattening, Dropout between linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 40, 3, padding=1), nn.Identity(), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(40, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)),
    )


def mobile_network() -> nn.Module:
    """As MobileNetV2: pointwise and depthwise convolutions, ReLU6, a sum, average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6(), Residual(), nn.Conv2d(8, 24, 1), nn.ReLU6()),
        *(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU6(), nn.Conv2d(24, 12, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"plain": plain_network, "mobile": mobile_network}


def count_kernels(network: nn.Module) -> int:
    return sum(isinstance(module, Kernel) for module in network.modules())


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def network_of(kind: str, mode: Mode, bits: int = 8, weight: WeightScheme = INT8) -> nn.Module:
    torch.manual_seed(0)
    return quantized(NETWORKS[kind](), images(), weight, ActivationScheme(mode, bits)).network


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("mode", "bits"), [("static", 8), ("dynamic", 8), ("static", 4)])
@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_lowered_equals_simulated(kind: str, mode: Mode, bits: int, count: int) -> None:
    model = network_of(kind, mode, bits)
    lowered = lower_int8(model, images())
    assert count_kernels(lowered) == len(quantized_layers(model)) and not quantized_layers(lowered)
    actual = lowered(images(count))
    assert actual.shape == (count, 10)
    if count:
        expected = model(images(count))
        step = float(expected.abs().max()) / 2 ** (bits - 1)
        assert (actual - expected).abs().max() < step


@torch.no_grad()
def test_a_static_network_passes_codes_a_sum_reads_float_and_a_dynamic_network_fuses_only_the_relu() -> None:
    lowered = lower_int8(network_of("plain", "static"), images())
    assert not any(isinstance(module, nn.ReLU) for module in lowered.modules())
    found = [module for module in lowered.modules() if hasattr(module, "post_op")]
    assert sorted(kernel.post_op for kernel in found) == ["none", "relu", "relu", "relu"]
    grids = {kernel.activation for kernel in found}
    assert {kernel.output for kernel in found} - {None} == grids - {lowered.get_submodule("0").activation}
    assert sum(isinstance(module, CodeMaxPool2d) for module in lowered.modules()) == 2
    lowered = lower_int8(network_of("mobile", "static"), images())
    first, inner = lowered.get_submodule("0"), lowered.get_submodule("2.first")
    assert isinstance(first, Int8Conv2d) and first.output is None and first.post_op == "relu6"
    assert isinstance(inner, Int8Conv2d) and isinstance(inner.output, StaticActivation) and inner.post_op == "relu"
    lowered = lower_int8(network_of("plain", "dynamic"), images())
    kernels = [module for module in lowered.modules() if hasattr(module, "post_op")]
    assert [kernel.post_op for kernel in kernels] == ["relu", "relu", "relu", "none"]
    assert all(kernel.output is None for kernel in kernels)


@torch.no_grad()
def test_source_stays_as_it_was_and_what_is_lowered_can_be_copied() -> None:
    model = network_of("mobile", "static")
    names, expected = [name for name, _ in model.named_modules()], model(images())
    lowered = lower_int8(model, images())
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(images()), expected)
    assert torch.equal(copy.deepcopy(lowered)(images()), lowered(images()))
    with pytest.raises(RuntimeError, match="eval"):
        lower_int8(copy.deepcopy(model).train(), images())


@pytest.mark.parametrize("mode", ["none", "dynamic"])
@torch.no_grad()
def test_layers_without_a_kernel_stay_simulated(mode: Mode) -> None:
    model = network_of("plain", mode, weight=WeightScheme(4, group_size=16))
    lowered = lower_int8(model, images())
    assert count_kernels(lowered) == 0 and len(quantized_layers(lowered)) == 4
    torch.testing.assert_close(lowered(images()), model(images()))


@torch.no_grad()
def test_a_layer_called_twice_keeps_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(self.conv(x)))

    torch.manual_seed(0)
    model = quantized(Twice(), images(), INT8, ActivationScheme("static", 8)).network
    torch.testing.assert_close(lower_int8(model, images())(images()), model(images()), atol=0.02, rtol=0)


class WidePool(nn.MaxPool2d):
    """A pool of its own, one call of the graph, that needs floating point."""

    captured_whole = True

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.sqrt())


def hooked(module: nn.Module) -> nn.Module:
    """Add a hook that needs floating point."""
    module.register_forward_hook(lambda module, inputs, output: output.to(torch.float32).clamp(max=0.5))
    return module


class Between(nn.Module):
    """A module between two convolutions, which codes would pass."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.relu, self.between = nn.Conv2d(3, 8, 3), nn.ReLU(), between
        self.second, self.last, self.head = nn.Conv2d(8, 8, 1), nn.ReLU(), nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.relu(self.first(x)))
        x = x[0] if isinstance(x, tuple) else x
        return self.head(self.last(self.second(x)).flatten(1))


@pytest.mark.parametrize("behind_relu", [True, False])
@pytest.mark.parametrize(
    ("between", "passes_codes"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(2, return_indices=True), False),
        (WidePool(2), False),
        (nn.Identity(), True),
        *((hooked(module), False) for module in (nn.MaxPool2d(2), nn.Identity(), nn.Dropout(), nn.ReLU())),
    ],
    ids=["pool", "indices", "own-pool", "identity", "hooked-pool", "hooked-identity", "hooked-dropout", "hooked-relu"],
)
@torch.no_grad()
def test_codes_pass_only_modules_that_compute_what_their_class_does(
    between: nn.Module, passes_codes: bool, behind_relu: bool
) -> None:
    torch.manual_seed(0)
    network = Between(copy.deepcopy(between)).eval()
    if not behind_relu and not isinstance(between, WidePool):
        network.relu = nn.Identity()  # type: ignore[assignment]
    network(images())
    model = quantized(network, images(), INT8, ActivationScheme("static", 8)).network
    lowered: Any = lower_int8(model, images())
    expected = model(images())
    assert (lowered(images()) - expected).norm() < 0.02 * expected.norm()
    assert lowered.second.post_op == "relu", "nothing is fused"
    assert (lowered.first.output is not None) == passes_codes


@torch.no_grad()
def test_a_network_that_fails_when_fused_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no codes")

    network = network_of("plain", "static")
    use_kernels(network)
    modules, expected = dict(network.named_modules()), network(images())
    fusions = lowering._fusions
    monkeypatch.setattr(lowering, "_fusions", lambda graph: fusions(graph) | {"11": Failing()})
    fuse(network, images())
    assert dict(network.named_modules()) == modules
    assert torch.equal(network(images()), expected)


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "squeezenet1_1"])
@torch.no_grad()
def test_torchvision_classifiers_are_lowered_whole(architecture: str) -> None:
    from quantstudy.network.architectures import build
    from quantstudy.network.folding import fold_batchnorm

    torch.manual_seed(0)
    model = fold_batchnorm(build(architecture, 10).eval())
    scheme = LayerScheme(INT8, ActivationScheme("static", 8))
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for layer in quantize_layers(model, dict.fromkeys(layers, scheme)).values():
        layer.activation.scale, layer.activation.zero_point = 0.03, 128
        layer.freeze()
    x = torch.randn(2, 3, 32, 32)
    lowered = lower_int8(model.eval(), x)
    assert count_kernels(lowered) == len(layers) > 10
    assert sum(kernel.output is not None for kernel in lowered.modules() if isinstance(kernel, Kernel)) > 1
    assert lowered(x).shape == (2, 10)
