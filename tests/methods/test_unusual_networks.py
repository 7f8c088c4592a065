"""Methods on networks that write to their images, call a layer twice, define layers in another order, and the like."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet, swin_t

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.methods.blocks import _in_turns, _rows, find_units, fisher_information
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.post_training import freeze
from quantstudy.methods.recipes import quantize, trained_recipe_of
from quantstudy.methods.sensitivity import measure_layers, quantized_table
from quantstudy.methods.trainable import split
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.graph import capture
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.schemes import WeightScheme

GPTQ = {"rounding": "gptq", "gain_correction": True, "bias_correction": True}
ROWS: dict[str, P.MethodRow] = {
    "weights": P.WeightOnly(kind="weight_only", weight_bits=3, **GPTQ),
    "equalized": P.Static(kind="static", weight_bits=8, equalize=True),
    "inputs": P.Static(kind="static", weight_bits=8, activation_bits=4, activation_range="mse"),
    "adaround": P.WeightOnly(kind="weight_only", weight_bits=3, rounding="adaround", steps=5, fragile_bits=None),
    "brecq": P.Static(kind="static", weight_bits=3, activation_bits=4, rounding="brecq", steps=5, fragile_bits=None),
    "finetuned": P.WeightOnly(kind="weight_only", weight_bits=3, finetune=True, steps=5),
}


class Own(nn.Module):
    """Two convolutions and a head; `run` computes what the head reads."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.run(self, x).mean((2, 3)))
        return found


class ByKeyword(Own):
    """Calls the head by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(input=self.run(self, x).mean((2, 3)))
        return found


def body(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.second(F.relu(m.first(x))))


def made(run: Callable[[Any, Tensor], Tensor] = body, **layers: nn.Module) -> Own:
    torch.manual_seed(0)
    own = {"first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 8, 3)} | layers
    return Own(run, **own).eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))


# A network that writes to its images


def written(m: Any, x: Tensor) -> Tensor:
    return body(m, x.sub_(0.5).div_(2.0))


def copied(m: Any, x: Tensor) -> Tensor:
    return body(m, (x - 0.5) / 2.0)


@pytest.mark.parametrize("name", ROWS)
def test_a_network_that_writes_to_its_images_is_quantized_like_one_that_does_not(name: str, images: Tensor) -> None:
    before, found = images.clone(), []
    for run in (written, copied):
        network = made(run)
        found.append(quantize(network, Calibration(network, list(images.split(8))), ROWS[name]))
        assert torch.equal(images, before)
    layers = [quantized_layers(variant.network) for variant in found]
    for layer, other in zip(*(each.values() for each in layers), strict=True):
        assert torch.equal(layer.dequantized(), other.dequantized()) and torch.equal(layer.bias, other.bias)
        assert layer.scheme == other.scheme and layer.activation.scale == other.activation.scale
    assert found[0].skipped.keys() == found[1].skipped.keys()


def test_its_sensitivity_is_that_of_one_that_does_not(images: Tensor) -> None:
    batches = [(part, torch.full((8,), -1)) for part in images.split(8)]
    macs = dict.fromkeys(("first", "second", "head"), 1)
    rows = [
        measure_layers(
            network, Calibration(network, [x for x, _ in batches]), batches, P.Sensitivity(bits=[2, 8]), macs
        )
        for network in (made(written), made(copied))
    ]
    assert rows[0] == rows[1]


# Layers that are called several times, in another order, or from outside the modules


def test_the_bias_of_a_layer_that_is_called_twice_corrects_the_mean_of_its_calls(images: Tensor) -> None:
    network = made(lambda m, x: torch.cat([m.first(x)[:, :4], -m.first(-2 * x)[:, :4]], 1), first=nn.Conv2d(3, 8, 3))
    network.second = nn.Identity()
    row = P.WeightOnly(kind="weight_only", weight_bits=2, bias_correction=True, fragile_bits=None)
    variant = quantize(network, Calibration(network, [images]), row)
    errors = []
    for model in (network, variant.network):
        seen: list[Tensor] = []
        hook = model.get_submodule("first").register_forward_hook(
            lambda m, x, y, seen=seen: seen.append(y.mean((0, 2, 3)))
        )
        with torch.no_grad():
            model(images.clone())
        hook.remove()
        errors.append(torch.stack(seen))
    assert len(errors[0]) == 2
    assert (errors[1] - errors[0]).mean(0).abs().max() < 1e-5
    assert (errors[1] - errors[0]).abs().max() > 1e-3, "each call alone has an error"


def test_layers_learn_their_rounding_in_the_order_in_which_they_run(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Own(body, second=nn.Conv2d(8, 8, 3), first=nn.Conv2d(3, 8, 3)).eval().requires_grad_(False)
    assert [name for name, _ in network.named_children()] == ["second", "first", "head"]
    units, _ = find_units(low(network, images), images)
    assert list(units) == ["first", "second", "head"]
    learned: list[str] = []
    monkeypatch.setattr(
        "quantstudy.methods.reconstruction.cached", lambda a, b, name, *_: learned.append(name) or (images, images)
    )
    monkeypatch.setattr("quantstudy.methods.reconstruction._learn", lambda layer, *_: layer.freeze() or (0.0, 0.0))
    quantize(network, Calibration(network, [images]), ROWS["adaround"])
    assert learned == ["first", "second", "head"]


@pytest.mark.parametrize("name", ["adaround", "brecq", "finetuned"])
def test_a_layer_that_is_called_by_keyword_is_learned(name: str, images: Tensor) -> None:
    network = made(lambda m, x: F.relu(m.second(input=F.relu(m.first(input=x)))))
    network.__class__ = ByKeyword
    variant = quantize(network, Calibration(network, [images]), ROWS[name])
    assert not variant.skipped and len(quantized_layers(variant.network)) == 3


def test_learned_scales_refuse_what_the_other_methods_refuse(images: Tensor) -> None:
    row = P.QatLsq(kind="qat_lsq", weight_bits=8)
    for other in (lambda m, x: body(m, x).neg(), lambda m, x: m.first(x)):
        network = made(lambda m, x, other=other: body(m, x) if isinstance(m.first, nn.Conv2d) else other(m, x))
        with pytest.raises(UserError, match="asks for a layer's class"):
            trained_recipe_of(row).prepare(network, Calibration(network, [images]), row)


def test_learned_scales_leave_a_layer_of_a_list_with_its_batchnorm(images: Tensor) -> None:
    row = P.QatLsq(kind="qat_lsq", weight_bits=8)
    network = made(lambda m, x: F.relu(m.norm(m.hidden[0](F.relu(m.first(x))))), norm=nn.BatchNorm2d(8))
    network.hidden = [network.second]
    network.norm.running_mean.uniform_(-1, 1)
    calibration = Calibration(network, [images])
    recipe = trained_recipe_of(row)
    variant = recipe.finish(recipe.prepare(network, calibration, row), network, row).eval()
    with torch.no_grad():
        wanted, found = network(images), variant(images)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert set(quantized_layers(variant.network)) == {"first", "head"}
    assert "second" in variant.skipped["quantization"]


def test_learned_activations_start_at_the_percentile(images: Tensor) -> None:
    network = made()
    scales = []
    for percentile in (None, 90.0):
        row = P.QatLsq(kind="qat_lsq", weight_bits=8, activation_range="minmax", clip_percentile=percentile)
        variant = trained_recipe_of(row).prepare(network, Calibration(network, [images]), row)
        scales.append(float(quantized_layers(variant.network)["second"].activation.learned.scale.detach()))
    assert scales[1] < 0.8 * scales[0]


# Budgets


def sensitive(network: nn.Module, images: Tensor, row: P.MixedBudget) -> Calibration:
    batches = [(images, torch.full((len(images),), -1))]
    plain = Calibration(network, [images])
    settings = P.Sensitivity(bits=[2, 4, 8], group_size=row.group_size)
    macs = {name: layer.weight.numel() for name, layer in plain.replaceable.items()}
    rows = measure_layers(network, plain, batches, settings, macs)
    return Calibration(network, [images], sensitivity=lambda: rows)


def test_a_budget_reports_what_could_not_be_done_and_counts_stored_bytes(images: Tensor) -> None:
    network = made(second=nn.ConvTranspose2d(8, 64, 2, bias=False), run=lambda m, x: m.last(body(m, x)))
    network.last = nn.Conv2d(64, 8, 1)
    row = P.MixedBudget(kind="mixed_budget", mean_bits=6.0, group_size=64, **GPTQ)
    calibration = sensitive(network, images, row)
    variant = quantize(network, calibration, row)
    assert {"rounding", "gain_correction"} <= variant.skipped.keys() and "second" in variant.skipped["rounding"]
    layer = quantized_layers(variant.network)["second"]
    measured = next(
        item
        for item in calibration.sensitivity
        if item["layer"] == "second" and item["bits"] == layer.scheme.weight.bits
    )
    assert measured["bytes"] == layer.packed.nbytes + layer.weight_scale.nbytes


def test_a_budget_keeps_the_biases_that_brecq_has_learned(images: Tensor) -> None:
    network = made()
    row = P.MixedBudget(kind="mixed_budget", mean_bits=4.5, rounding="brecq", steps=20, dtype="bfloat16")
    table, _ = quantized_table(network, Calibration(network, [images]), row, [2, 4, 8])
    variant = quantize(network, sensitive(network, images, row), row)
    for name, layer in quantized_layers(variant.network).items():
        learned = table[layer.scheme.weight.bits][name].bias
        assert torch.equal(layer.bias, learned.to(layer.bias.dtype)) and not torch.equal(
            learned, network.get_submodule(name).bias
        )


# The widths of the first and last layer


@pytest.mark.parametrize("edges", [4, 5, 6])
def test_layers_of_other_widths_keep_the_edges_at_theirs(edges: int, images: Tensor) -> None:
    network = made()
    own = Calibration(network, [images])
    row = P.Static(
        kind="static", weight_bits=3, activation_bits=3, edge_bits=edges, fragile_share=0.0, fragile_operations=0.0
    )
    layers = quantized_layers(quantize(network, own, row).network)
    for name in ("first", "head"):
        assert layers[name].scheme.weight.bits >= edges and layers[name].scheme.activation.bits >= edges
    assert layers["second"].scheme.activation.bits >= 3


# Units of block-wise reconstruction


def low(network: nn.Module, images: Tensor, freezes: bool = True) -> nn.Module:
    found = copy.deepcopy(network)
    names = capture(network, images).plain
    quantize_layers(found, dict.fromkeys(names, LayerScheme(WeightScheme(4))))
    if freezes:
        freeze(network, found, Calibration(network, [images]), P.WeightOnly(kind="weight_only", weight_bits=4))
    return found


def test_a_unit_takes_one_tensor_to_one(images: Tensor) -> None:
    torch.manual_seed(0)
    network = fold_batchnorm(DenseNet(4, (2, 1), 8, num_classes=5).eval())
    x = torch.randn(32, 3, 32, 32)
    units, left = find_units(low(network, x), x)
    names = set(quantized_layers(low(network, x)))
    assert not left and {"features.denseblock1.denselayer1.conv1", "features.transition1.conv"} <= set(units)
    assert all(any(name == unit or name.startswith(f"{unit}.") for unit in units) for name in names)
    row = P.WeightOnly(kind="weight_only", weight_bits=4, rounding="brecq", steps=2, fragile_bits=None)
    assert "brecq" not in quantize(network, Calibration(network, [x]), row).skipped


class Wrapped(nn.Module):
    """A layer, which may be another module's too, and one of its own."""

    def __init__(self, layer: nn.Module, own: bool) -> None:
        super().__init__()
        self.layer, self.own = layer, nn.Conv2d(8, 8, 1) if own else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.relu(self.own(F.relu(self.layer(x))))
        return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_layer_of_two_modules_is_trained_once_or_named(own: bool, calls: int, images: Tensor) -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    wraps = [Wrapped(shared, own) for _ in range(2)]
    network = made(lambda m, x: m.b(m.a(m.first(x))) if calls == 2 else m.b(m.first(x)), a=wraps[0], b=wraps[1])
    network.second = nn.Identity()
    network.again = nn.Sequential(network.first, network.head)
    variant = quantize(network, Calibration(network, [images]), ROWS["brecq"])
    units, left = find_units(variant.network, images)
    if calls == 2:
        assert variant.skipped["brecq"] == left == {"a.layer": "is called 2 times"}
        assert set(units) == {"first", "head", *(["a.own", "b.own"] if own else [])}
    else:
        assert "brecq" not in variant.skipped and set(units) >= {"first", "head"} and not left


class Twice(nn.Module):
    """Calls its only layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)).mean((2, 3))


@pytest.mark.parametrize("name", ["brecq", "finetuned", "adaround"])
@pytest.mark.parametrize("kind", ["no unit", "no gradients", "rows of several images"])
def test_what_cannot_be_learned_is_left_as_gptq_rounds_it(kind: str, name: str) -> None:
    images = torch.randn(100, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    network: nn.Module
    if kind == "no unit":
        torch.manual_seed(0)
        network = Twice().eval().requires_grad_(False)
    elif kind == "no gradients":
        network = made(lambda m, x: torch.no_grad()(body)(m, x))
    else:
        network = made(lambda m, x: m.rows(body(m, x).flatten(2).permute(2, 0, 1)).permute(1, 2, 0)[..., None])
        network.rows = nn.Linear(8, 8)
    variant = quantize(network, Calibration(network, list(images.split(64))), ROWS[name])
    assert variant(images).isfinite().all()
    if (kind, name) == ("rows of several images", "adaround"):
        assert variant.skipped["adaround"] == {"rows": "rows of its input belong to several images; rounded by GPTQ"}


def test_a_layer_that_is_called_twice_is_left_and_named(images: Tensor) -> None:
    network = made(lambda m, x: F.relu(m.second(F.relu(m.second(m.first(x))))))
    variant = quantize(network, Calibration(network, [images]), ROWS["brecq"])
    assert variant.skipped["brecq"] == {"second": "is called 2 times"}


@pytest.mark.parametrize("count", [24, 32])
@pytest.mark.parametrize("places", [4, 5])
def test_rows_that_belong_to_several_images_are_left_and_named(places: int, count: int) -> None:
    """Tokens come first, images second."""
    network = made(lambda m, x: m.tokens(m.first(x).flatten(2).permute(2, 0, 1)).permute(1, 2, 0)[..., None])
    network.tokens, network.second = nn.Linear(8, 8), nn.Identity()
    images = torch.randn(count, 3, places + 2, 3)
    variant = quantize(network, Calibration(network, [images]), ROWS["brecq"])
    assert variant.skipped["brecq"] == {"tokens": "rows of its input or output belong to several images"}


class Cut(nn.Module):
    """Cuts each image into four windows, and gives them to a layer; `joined` puts them together again."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined, self.layer = joined, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, side, _ = x.shape
        windows = x.reshape(count, channels, 2, side // 2, 2, side // 2).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        found: Tensor = self.layer(windows)
        return found.reshape(count, -1, side, side) if self.joined else found


@pytest.mark.parametrize("joined", [False, True])
def test_a_module_that_cuts_windows_is_a_unit_if_it_joins_them(joined: bool, images: Tensor) -> None:
    network = made(lambda m, x: m.cut(m.first(x)).reshape(len(x), 8, -1, 1), cut=Cut(joined))
    network.second = nn.Identity()
    units, left = find_units(low(network, images), images)
    assert not left and set(units) == {"first", "cut" if joined else "cut.layer", "head"}
    assert joined or units["cut.layer"].rows == 4
    assert "brecq" not in quantize(network, Calibration(network, [images]), ROWS["brecq"]).skipped


def test_the_channels_of_a_transformer_are_last() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    network = swin_t(num_classes=5).eval().requires_grad_(False)
    units, _ = find_units(low(network, x, freezes=False), x)
    axes = {name: unit.channels for name, unit in units.items()}
    assert axes["features.0.0"] == 1 and axes["features.1.0"] == -1
    found = fisher_information(network, x, axes)
    assert len(found["features.0.0"]) == len(found["features.1.0"]) == 96 and len(found["features.7.1"]) == 768


class Mixed(nn.Module):
    """A layer and a permutation, from channels that come first or last to channels that come first or last."""

    def __init__(self, layer: nn.Module, after: tuple[int, ...], before: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layer, self.after, self.before = layer, after, before

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.permute(self.before) if self.before else x).permute(self.after)
        return found


@pytest.mark.parametrize("side", [8, 10])
@pytest.mark.parametrize(
    ("block", "axis"),
    [
        (Mixed(nn.Linear(8, 8), (0, 3, 1, 2), (0, 2, 3, 1)), 1),
        (Mixed(nn.Conv2d(8, 8, 1), (0, 2, 3, 1)), -1),
        (Mixed(nn.Conv2d(8, 8, 1), (0, 1, 2, 3)), 1),
        (Mixed(nn.Linear(8, 8), (0, 1, 2, 3), (0, 2, 3, 1)), -1),
    ],
    ids=["linear, channels first", "convolution, channels last", "convolution", "linear"],
)
def test_the_channels_are_found_on_maps_as_wide_as_there_are_channels(block: Mixed, axis: int, side: int) -> None:
    network = made(lambda m, x: m.block(m.first(x)).flatten(1)[:, :8, None, None], block=block)
    network.second = nn.Identity()
    x = torch.randn(4, 3, side + 2, side + 2)
    units, _ = find_units(low(network, x, freezes=False), x)
    assert units["block"].channels == axis


def test_the_information_is_that_of_the_output_and_not_of_an_activation_in_place(images: Tensor) -> None:
    found = []
    for inplace in (False, True):
        network = made(lambda m, x: m.act(m.first(x)), act=nn.ReLU(inplace=inplace))
        network.second = nn.Identity()
        found.append(fisher_information(network, images, {"first": 1})["first"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("count", [8, 15, 16, 40, 256])
def test_what_judges_a_unit_trains_no_other_however_many_images_fit(count: int) -> None:
    images = torch.arange(count).float()[:, None, None, None]
    found, judges = _in_turns(images)
    train, judge = split(count)
    assert sorted(found.flatten().tolist()) == list(range(count))
    if train == count:
        assert bool(judges.all())
        return
    assert set(found[judges].flatten().tolist()) == set(range(train, count))
    for kept in range(16, count + 1):
        training, judging = _rows(judges, kept, 1)
        assert len(judging) >= max(1, round(kept * judge / count) - 1) and len(training) + len(judging) == kept
    training, judging = _rows(judges, 4 * count, 4)
    assert set((judging // 4).tolist()) == set(judges.nonzero().flatten().tolist())
