"""Every method of the repository's params on a small network: layers counted, stored packed, loaded bit-identical."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize, trained_recipe_of
from quantstudy.params import Method, Static, WeightOnly, load_params
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.variant import Variant, load_variant, save_variant
from tests.methods.conftest import FP32

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture(scope="module")
def calibration(network: nn.Module, images: Tensor) -> Calibration:
    return Calibration(network, [images], bins=512)


def make(method: str, network: nn.Module, calibration: Calibration) -> Variant:
    row = PARAMS.method(method)
    if not row.trains:
        return quantize(network, calibration, row)
    recipe = trained_recipe_of(row)
    return recipe.finish(recipe.prepare(network, calibration, row), network, row)


COMPOSITIONS = [
    Static(kind="static", weight_bits=4, equalize=True, rounding="gptq", bias_correction=True),
    Static(kind="static", weight_bits=4, edge_bits=8, activation_bits=4, finetune=True, steps=5),
]


@pytest.mark.parametrize(
    "method", [*PARAMS.ptq, *PARAMS.qat, COMPOSITIONS[0], pytest.param(COMPOSITIONS[1], marks=pytest.mark.slow)]
)
def test_a_saved_variant_loads_to_bit_identical_logits(
    method: str | Static, network: nn.Module, calibration: Calibration, images: Tensor, tmp_path: Path
) -> None:
    if isinstance(method, str):
        variant = make(method, network, calibration).eval()
    else:
        variant = quantize(network, calibration, method).eval()
    path = tmp_path / "variant.pth"
    save_variant(path, variant, FP32, "variant")
    torch.load(path, weights_only=True)
    with torch.no_grad():
        logits = variant(images)
        assert torch.isfinite(logits).all()
        assert torch.equal(load_variant(path)(images), logits)


def test_edge_bits_are_of_the_first_and_last_layer(network: nn.Module, calibration: Calibration) -> None:
    settings = Static(kind="static", weight_bits=2, activation_bits=4, edge_bits=8, fragile_bits=None)
    layers = list(quantized_layers(quantize(network, calibration, settings).network).values())
    bits = [(layer.scheme.weight.bits, layer.scheme.activation.bits) for layer in layers]
    assert bits == [(8, 8), *[(2, 4)] * 51, (8, 8)]
    whole = quantized_layers(make("clip_int8", network, calibration).network)
    clipped = quantized_layers(make("clip_int8_p95", network, calibration).network)
    assert all(clipped[name].activation.scale <= layer.activation.scale for name, layer in whole.items())
    assert any(clipped[name].activation.scale < layer.activation.scale for name, layer in whole.items())


@pytest.mark.parametrize("method", ["int8_dynamic", "int8_static", "int8_weight_only", "int4_weight_only", "qat_int4"])
def test_a_uniform_method_quantizes_every_layer(method: str, network: nn.Module, calibration: Calibration) -> None:
    variant = make(method, network, calibration)
    assert len(quantized_layers(variant)) == len(quantizable_layers(network)) == 53
    assert not quantizable_layers(variant)


def test_mixed_layers_and_two_codes_to_a_byte(network: nn.Module, calibration: Calibration, tmp_path: Path) -> None:
    simple = make("mixed_simple", network, calibration)
    assert list(quantized_layers(simple.network)) == ["classifier.1"]
    half = quantized_layers(make("mixed_variance", network, calibration).network)
    layers: dict[str, Any] = quantizable_layers(network)
    assert len(half) == round(0.5 * len(layers))
    worst_chosen = max(float(layers[name].weight.var()) for name in half)
    best_left = min(float(layer.weight.var()) for name, layer in layers.items() if name not in half)
    assert worst_chosen <= best_left
    variant = make("int4_weight_only", network, calibration)
    path = tmp_path / "variant.pth"
    save_variant(path, variant, FP32, "int4_weight_only")
    layers = quantized_layers(variant)
    weights = sum(layer.shape.numel() for layer in layers.values())
    assert sum(layer.packed.numel() for layer in layers.values()) == pytest.approx(weights / 2, abs=len(layers))
    assert all(layer.weight_scale.dtype == torch.bfloat16 for layer in layers.values())
    assert path.stat().st_size < 0.75 * weights


@pytest.mark.parametrize(
    "settings",
    [
        WeightOnly(kind="weight_only", weight_bits=4, weight_range="mse", bias_correction=True),
        WeightOnly(kind="weight_only", weight_bits=4, group_size=32, rounding="gptq", bias_correction=True),
        Static(kind="static", weight_bits=4, rounding="gptq"),
        pytest.param(Static(kind="static", weight_bits=4, rounding="brecq", steps=20), marks=pytest.mark.slow),
        Static(kind="static", weight_bits=4, equalize=True, bias_correction=True),
        pytest.param(
            WeightOnly(kind="weight_only", weight_bits=3, group_size=32, finetune=True, steps=60),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Static(kind="static", weight_bits=4, activation_bits=4, activation_range="mse", finetune=True, steps=60),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mse-bias", "gptq-bias", "static-gptq", "brecq", "equalized", "finetuned", "finetuned-a4"],
)
def test_what_goes_beyond_rounding_brings_the_logits_closer(settings: Any, network: nn.Module, images: Tensor) -> None:
    calibration = Calibration(network, [images], bins=64)
    off = {"equalize": False, "weight_range": "minmax", "rounding": "nearest", "bias_correction": False}
    plain = settings.model_copy(update={**off, "finetune": False, "activation_range": "minmax"})
    errors = []
    for row in (settings, plain):
        variant = quantize(network, calibration, row)
        with torch.no_grad():
            errors.append(float((variant(images) - network(images)).norm()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"kind": "qat_static", "gain_correction": True}, "kind qat_static takes no equalize, weight_range, rounding"),
        ({"kind": "qat_lsq", "finetune": True}, "kind qat_lsq takes no equalize, rounding, gain_correction"),
        ({"kind": "qat_joint", "clip_percentile": 99.9}, "clip_percentile cuts the range minmax, not mse"),
        ({"kind": "qat_joint", "learning_rate": None}, "learning_rate"),
    ],
    ids=["static", "lsq", "joint-clipped", "joint-rate"],
)
def test_a_key_that_a_method_does_not_take_is_refused(row: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        TypeAdapter(Method).validate_python(row | {"weight_bits": 4})
