"""What one layer costs, and the variant that is made from it, on a small network."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.methods.allocation import stored_bits
from quantstudy.methods.budget import LOSSES, allocations_within, divergence_from, mean_bits, mixed
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.post_training import freeze
from quantstudy.methods.sensitivity import measure_layers, quantized_table
from quantstudy.params import MixedBudget, Sensitivity
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.quantization.variant import cast, load_variant, save_variant
from tests.methods.conftest import FP32

Batches = list[tuple[Tensor, Tensor]]
WIDTHS = [2, 4, 8, 16]


class Residual(nn.Module):
    """Two paths that meet in place, as in a ResNet: what runs on one must not change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to logits [N, 4]."""
        y = self.second(self.relu(self.first(x)))
        y += self.shortcut(x)
        return self.head(self.relu(y).mean((2, 3)))


def calibrated(model: nn.Module, batches: Batches) -> Calibration:
    return Calibration(model, [images for images, _ in batches])


def settings_of(**keys: Any) -> Sensitivity:
    return Sensitivity(bits=WIDTHS, **keys)


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval().requires_grad_(False)


@pytest.fixture
def batches() -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(count, 3, 8, 8), torch.randint(0, 4, (count,))) for count in (6, 5)]


MACS = dict.fromkeys(("first", "second", "shortcut", "head"), 1)


def test_each_row_is_that_of_the_network_with_one_layer_replaced(residual: nn.Module, batches: Batches) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    settings, before = settings_of(group_size=8), copy.deepcopy(residual.state_dict())
    rows = measure_layers(residual, calibrated(residual, batches), batches, settings, MACS)
    table, _ = quantized_table(residual, calibrated(residual, batches), settings, WIDTHS[:-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in residual.state_dict().items())
    reference = residual(images)
    assert [(row["layer"], row["bits"]) for row in rows] == [(name, bits) for name in MACS for bits in WIDTHS]
    for row in rows[:3] + rows[8:11]:
        network = copy.deepcopy(residual)
        network.set_submodule(row["layer"], table[row["bits"]][row["layer"]])
        logits = network(images)
        sqnr = 20 * torch.log10(reference.norm() / (reference - logits).norm())
        assert row["sqnr_db"] == pytest.approx(float(sqnr), abs=1e-3)
        cross_entropy = nn.functional.cross_entropy
        loss = cross_entropy(logits, labels) - cross_entropy(reference, labels)
        assert row["loss_increase"] == pytest.approx(float(loss), abs=1e-5)
        right, right_now = ((x.argmax(1) == labels).float().mean() for x in (reference, logits))
        assert row["top1_drop"] == pytest.approx(float(100 * (right - right_now)), abs=1e-4)
        assert row["kl_divergence"] >= 0 and row["images"] == 11
        shape = residual.get_submodule(row["layer"]).weight.shape
        assert row["bytes"] == stored_bits(shape, row["bits"], 8) // 8 and row["weights"] == shape.numel()


def test_a_layer_whose_weights_are_on_the_grid_costs_nothing(residual: nn.Module, batches: Batches) -> None:
    """Weights that are codes of 2 bits times a power of two are exact at every width."""
    layer: Any = residual.second
    codes = torch.randint(-2, 2, layer.weight.shape).float()
    codes[:, 0, 0, 0] = -2  # the range is used, so that the scale is found again
    layer.weight = nn.Parameter(codes / 8, requires_grad=False)
    rows = measure_layers(residual, calibrated(residual, batches), batches, settings_of(), MACS)
    for row in (row for row in rows if row["layer"] == "second" and row["bits"] in (2, 16)):
        assert row["sqnr_db"] == 200 and row["loss_increase"] == row["kl_divergence"] == row["top1_drop"] == 0
        assert [loss(row) for loss in LOSSES.values()] == pytest.approx([1e-10, 1e-20, 0])


class Partly(nn.Module):
    """A convolution whose padding is not zeros and a layer that never runs, beside two that can be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.second, self.head, self.unused = nn.Conv2d(8, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, S, S] to logits [N, 4]."""
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


@torch.no_grad()
def test_layers_that_cannot_be_quantized_are_left_out(batches: Batches) -> None:
    torch.manual_seed(0)
    model = Partly().eval().requires_grad_(False)
    calibration = calibrated(model, batches)
    keys: dict[str, Any] = {"rounding": "gptq", "gain_correction": True, "bias_correction": True}
    macs = {"first": 1, "second": 1, "head": 1}
    rows = measure_layers(model, calibration, batches, settings_of(**keys), macs)
    assert {row["layer"] for row in rows} == {"second", "head"}
    settings = MixedBudget(kind="mixed_budget", mean_bits=8.0, dtype="bfloat16", **keys)
    layers = calibration.replaceable
    chosen = allocations_within(layers, rows, settings)[0]
    assert chosen.keys() == layers.keys() and mean_bits(layers, chosen, None) <= 8
    table, _ = quantized_table(model, calibration, settings, WIDTHS[:-1])
    variant = mixed(model, table, chosen, calibration, settings)
    assert set(quantized_layers(variant.network)) == {name for name, width in chosen.items() if width < 16}
    wide = dict.fromkeys(layers, 16)
    rounded = cast(cast(copy.deepcopy(model), torch.bfloat16).network, torch.float32)
    logits, found = (torch.cat([m(x) for x in calibration.images]).double() for m in (model, rounded))
    divergence = divergence_from(model, table, calibration.images, torch.bfloat16)(wide)
    p, q = logits.log_softmax(1), found.log_softmax(1)
    assert divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


@pytest.fixture(scope="module")
def rows(network: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    macs = dict.fromkeys(quantizable_layers(network), 100)
    batch = (images, torch.zeros(8, dtype=torch.int64))
    return measure_layers(network, Calibration(network, [images]), [batch], settings_of(group_size=32), macs)


@pytest.mark.parametrize("size", [3.0, 4.0, 6.5])
@torch.no_grad()
def test_the_file_keeps_the_budget_and_loads_to_identical_logits(
    size: float, network: nn.Module, images: Tensor, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = MixedBudget(kind="mixed_budget", mean_bits=size, group_size=32, bias_correction=True)
    bits = allocations_within(quantizable_layers(network), rows, settings)[0]
    calibration = Calibration(network, [images])
    table, _ = quantized_table(network, calibration, settings, WIDTHS[:-1])
    variant = mixed(network, table, bits, calibration, settings).eval()
    path = tmp_path / "variant.pth"
    save_variant(path, variant, FP32, "m")
    loaded = load_variant(path)
    assert torch.equal(loaded(images), variant(images))

    tensors = torch.load(path, weights_only=True)["state_dict"]
    kept = quantizable_layers(loaded.network)
    stored = sum(t.nbytes for name, t in tensors.items() if name.endswith((".packed", ".weight_scale")))
    stored += sum(tensors[f"{name}.weight"].nbytes for name in kept)
    weights = sum(layer.weight.numel() for layer in quantizable_layers(network).values())
    assert 0.99 * size < 8 * stored / weights <= size
    assert mean_bits(quantizable_layers(network), bits, 32) == pytest.approx(8 * stored / weights)
    assert {name for name, width in bits.items() if width == 16} == set(kept)
    assert all(tensors[f"{name}.weight"].dtype == torch.float16 for name in kept)
    found = {name: layer.scheme.weight.bits for name, layer in quantized_layers(loaded.network).items()}
    assert found == {name: width for name, width in bits.items() if width < 16}


def test_both_budgets_are_kept_by_every_allocation(network: nn.Module, rows: list[dict[str, Any]]) -> None:
    settings = MixedBudget(kind="mixed_budget", mean_bits=5.0, bit_operations=0.04, group_size=32)
    found = allocations_within(quantizable_layers(network), rows, settings)
    for bits in found:
        assert sum(bits.values()) * 16 <= 0.04 * len(bits) * 32 * 32  # every layer has the same MACs here
        assert mean_bits(quantizable_layers(network), bits, 32) <= 5.0
    of_size = settings.model_copy(update={"bit_operations": None})
    only_size = allocations_within(quantizable_layers(network), rows, of_size)
    assert max(sum(bits.values()) for bits in found) < sum(only_size[0].values())
    settings = MixedBudget(kind="mixed_budget", mean_bits=4.5, group_size=32)
    found = allocations_within(quantizable_layers(network), rows, settings)
    uniform = [next(iter(bits.values())) for bits in found if len(set(bits.values())) == 1]
    assert uniform == [2]  # scales of depthwise layers take half a bit and more: 4 bits are above the budget
    assert len(found) > 1 and all(bits not in found[:number] for number, bits in enumerate(found))
    settings = MixedBudget(kind="mixed_budget", mean_bits=5.0)
    with pytest.raises(UserError, match=r"sensitivity.json has 1 layers, not the model's 53"):
        allocations_within(quantizable_layers(network), rows[:4], settings)


@torch.no_grad()
def test_the_network_as_a_whole_decides(network: nn.Module, images: Tensor) -> None:
    """The divergence is that of the assembled network's predictions, and the least of all allocations'."""
    settings = MixedBudget(kind="mixed_budget", mean_bits=4.0)
    table, _ = quantized_table(network, Calibration(network, [images]), settings, [2, 8])
    layers = list(quantizable_layers(network))
    spoilt, good = dict.fromkeys(layers, 2), dict.fromkeys(layers, 8)
    divergence = divergence_from(network, table, [images[:5], images[5:]])
    assert min([spoilt, good, spoilt], key=divergence) == good
    variant = mixed(network, table, good, Calibration(network, [images]), settings)
    logits = network(images), cast(variant.network, torch.float32)(images)
    p, q = (x.double().softmax(1) for x in logits)
    assert divergence(good) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-2)
    assert divergence(spoilt) > divergence(good)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"weight_range": "mse"},
        {"rounding": "gptq", "gain_correction": True, "bias_correction": True},
    ],
)
@torch.no_grad()
def test_a_variant_of_the_table_is_the_one_made_whole(keys: dict[str, Any], network: nn.Module, images: Tensor) -> None:
    """Each layer's codes are found alone, the biases with all layers: as if the network had been rounded at once."""
    settings = MixedBudget(kind="mixed_budget", mean_bits=4.0, group_size=32, **keys)
    bits = {name: WIDTHS[index % 4] for index, name in enumerate(quantizable_layers(network))}
    calibration = Calibration(network, [images])
    table, _ = quantized_table(network, calibration, settings, WIDTHS[:-1])
    whole = copy.deepcopy(network)
    integer = {name: width for name, width in bits.items() if width < 16}
    weights = {name: WeightScheme(width, 32, settings.weight_range) for name, width in integer.items()}
    quantize_layers(whole, {name: LayerScheme(scheme) for name, scheme in weights.items()})
    freeze(network, whole, calibration, settings)
    before = [p.clone() for p in network.parameters()]
    for _ in range(2):  # the table is as it was
        found = mixed(network, table, bits, calibration, settings)
        assert torch.equal(found(images), cast(whole, torch.float16)(images))
    assert all(map(torch.equal, before, network.parameters()))


@torch.no_grad()
def test_a_layer_of_the_table_keeps_its_mean_output(network: nn.Module, images: Tensor) -> None:
    keys: dict[str, Any] = {"rounding": "gptq", "gain_correction": True, "bias_correction": True}
    settings = MixedBudget(kind="mixed_budget", mean_bits=4.0, **keys)
    table, _ = quantized_table(network, Calibration(network, [images]), settings, [3])
    for name in ("features.0.0", "features.3.conv.1.0", "features.18.0", "classifier.1"):
        means: list[Tensor] = []

        def watch(layer: nn.Module, x: Any, y: Tensor, to: list[Tensor] = means) -> None:
            to.append(y.mean((0, 2, 3)) if y.ndim == 4 else y.mean(0))

        changed = copy.deepcopy(network)
        changed.set_submodule(name, table[3][name])
        for model in (network, changed):
            handle = model.get_submodule(name).register_forward_hook(watch)
            model(images)
            handle.remove()
        torch.testing.assert_close(means[1], means[0], atol=1e-3 * float(means[0].abs().amax()), rtol=0, msg=name)
