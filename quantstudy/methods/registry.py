"""The methods: a `kind` in `params.yaml` picks a registered function.

A function takes the fp32 model (BatchNorm folded, eval mode), the calibration statistics (with the `image_size`, and
the calibration `images`, in batches, where the settings need them) and the method's row of the params, and returns a
`Variant`. The functions named in `POST_TRAINING` return it finished; those in `TRAINED` return it ready to be trained,
and `finish` turns it into what is stored. A new method is a class of its row in `params.py`, a function here and a row
in `params.yaml`.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.errors import unknown
from quantstudy.machine.device import DTYPES
from quantstudy.methods.joint import settle, thaw
from quantstudy.methods.lsq import freeze_learned, learnable
from quantstudy.methods.post_training import freeze, prepared
from quantstudy.network.models import conv_norm_pairs
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers, run_watched
from quantstudy.quantization.ranges import activation_range
from quantstudy.quantization.saturation import limit_of
from quantstudy.quantization.schemes import ActivationScheme, Mode, WeightScheme
from quantstudy.quantization.variant import Variant, cast

Calibration = dict[str, Any]
Function = Callable[[nn.Module, Calibration, Any], Variant]


def cast_to(model: nn.Module, calibration: Calibration, settings: P.Cast | P.QatCast) -> Variant:
    """Cast every parameter to a 16-bit float type; arithmetic runs in it too."""
    return cast(model, DTYPES[settings.dtype])


def weight_only(model: nn.Module, calibration: Calibration, settings: P.WeightOnly) -> Variant:
    """Integer weights in every layer; activations stay float32."""
    return _finished(model, _quantized(model, settings, replaceable(model, calibration)), calibration, settings)


def dynamic(model: nn.Module, calibration: Calibration, settings: P.Dynamic) -> Variant:
    """Integer weights and activations; the activation range is the batch's own, found at run time."""
    variant = _quantized(model, settings, replaceable(model, calibration), "dynamic")
    return _finished(model, variant, calibration, settings)


def static(model: nn.Module, calibration: Calibration, settings: P.Static) -> Variant:
    """Integer weights and activations; the activation range comes from calibration."""
    return _finished(model, trainable_static(model, calibration, settings), calibration, settings)


def mixed_linear(model: nn.Module, calibration: Calibration, settings: P.MixedLinear) -> Variant:
    """Linear layers in integers, everything else in a 16-bit float type (the notebook's simple rule)."""
    chosen = [name for name, layer in replaceable(model, calibration).items() if isinstance(layer, nn.Linear)]
    variant = _finished(model, _quantized(model, settings, chosen), calibration, settings)
    return cast(variant.network, DTYPES[settings.dtype])


def mixed_variance(model: nn.Module, calibration: Calibration, settings: P.MixedVariance) -> Variant:
    """The `fraction` of layers (at least one) with the lowest weight variance in integers, the rest in 16 bits."""
    layers = replaceable(model, calibration)
    by_variance = sorted(layers, key=lambda name: float(layers[name].weight.var()))
    chosen = by_variance[: max(round(settings.fraction * len(layers)), 1)]
    variant = _finished(model, _quantized(model, settings, chosen), calibration, settings)
    return cast(variant.network, DTYPES[settings.dtype])


def trainable_static(model: nn.Module, calibration: Calibration, settings: P.Static) -> Variant:
    """Build the static scheme with float weights that are rounded in each forward pass (Jacob et al. 2018)."""
    variant = _quantized(model, settings, replaceable(model, calibration), "static")
    for name, layer in quantized_layers(variant.network).items():
        scheme, statistics = layer.scheme.activation, calibration["layers"][name]
        bounds = activation_range(statistics, scheme, settings.activation_range, settings.clip_percentile)
        layer.activation.scale, layer.activation.zero_point = scheme.choose_qparams(*bounds)
    return variant


def trainable_steps(model: nn.Module, calibration: Calibration, settings: P.QatLsq) -> Variant:
    """Build the static scheme with learned scales; `model` has its BatchNorm, which training keeps (`methods.lsq`)."""
    schemes = _schemes(model, settings, replaceable(model, calibration), "static")
    return Variant(learnable(model, calibration["layers"], schemes, settings.activation_range))


def trainable_jointly(model: nn.Module, calibration: Calibration, settings: P.QatJoint) -> Variant:
    """Quantize as the settings say after training, then let codes, scales and biases learn (`methods.joint`)."""
    model, calibration = prepared(model, calibration, settings)
    variant = static(model, calibration, settings)
    thaw(variant.network)
    return variant


def trainable_float(model: nn.Module, calibration: Calibration, settings: P.QatCast) -> Variant:
    """Copy the fp32 model for mixed-precision fine-tuning."""
    return Variant(copy.deepcopy(model))


def finish(variant: Variant, model: nn.Module, settings: Any) -> Variant:
    """Freeze or cast a trained variant; `model` is what it was made from."""
    if isinstance(settings, P.QatCast):
        return cast(variant.network, DTYPES[settings.dtype])
    if isinstance(settings, P.QatLsq):
        freeze_learned(variant.network, conv_norm_pairs(model))
        return variant
    if isinstance(settings, P.QatJoint):
        settle(variant.network)
        return variant
    return _frozen(variant)


POST_TRAINING: dict[str, Function] = {
    "cast": cast_to,
    "weight_only": weight_only,
    "dynamic": dynamic,
    "static": static,
    "mixed_linear": mixed_linear,
    "mixed_variance": mixed_variance,
}
TRAINED: dict[str, Function] = {
    "qat_static": trainable_static,
    "qat_lsq": trainable_steps,
    "qat_joint": trainable_jointly,
    "qat_cast": trainable_float,
}


def quantize(model: nn.Module, calibration: Calibration, settings: Any) -> Variant:
    """Quantize an fp32 model after training, as a method's row says."""
    if isinstance(settings, P.Scheme):
        model, calibration = prepared(model, calibration, settings)
    return POST_TRAINING[settings.kind](model, calibration, settings)


def settings_of(params: P.Params, method: str, kinds: Collection[str]) -> Any:
    """Return the row of a method whose kind is one of `kinds`; raise `UserError` for any other name."""
    settings = params.method(method)
    if settings.kind not in kinds:
        raise unknown("method", method, [name for name, row in params.methods.items() if row.kind in kinds])
    return settings


def replaceable(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """Return the layers that a quantized one can take the place of, by name.

    Left are a layer that did not run on the calibration images, since another module reads its weight or nothing
    needs it, and a convolution whose padding is not zeros. Without statistics and images, all are taken to have run.
    """
    layers = quantizable_layers(model)
    ran = calibration.get("layers", layers)
    if "layers" not in calibration and "images" in calibration:
        ran = set()
        run_watched(model, layers, [calibration["images"][0][:1]], lambda name, _: ran.add(name))
    return {
        name: layer
        for name, layer in layers.items()
        if name in ran and getattr(layer, "padding_mode", "zeros") == "zeros"
    }


def _quantized(model: nn.Module, settings: P.Scheme, names: Iterable[str], mode: Mode = "none") -> Variant:
    network = copy.deepcopy(model)
    quantize_layers(network, _schemes(model, settings, names, mode))
    return Variant(network)


def _schemes(model: nn.Module, settings: P.Scheme, names: Iterable[str], mode: Mode) -> dict[str, LayerScheme]:
    layers: dict[str, Any] = quantizable_layers(model)
    order = list(layers)

    def scheme(name: str) -> LayerScheme:
        least = settings.edge_bits if name in (order[0], order[-1]) else None
        bits, activation_bits = (max(b, least or 0) for b in (settings.weight_bits, _activation_bits(settings)))
        limited = bits == 8 and getattr(settings, "saturation_free", False)
        limit = limit_of(layers[name]) if limited else "none"
        weight = WeightScheme(bits, settings.group_size, settings.weight_range, limit)
        return LayerScheme(weight, ActivationScheme(mode, activation_bits))

    return {name: scheme(name) for name in names}


def _activation_bits(settings: P.Scheme) -> int:
    return int(getattr(settings, "activation_bits", 32))


def _finished(model: nn.Module, variant: Variant, calibration: Calibration, settings: P.Rounding) -> Variant:
    freeze(model, variant.network, calibration, settings)
    return variant


@torch.no_grad()
def _frozen(variant: Variant) -> Variant:
    for layer in quantized_layers(variant.network).values():
        layer.freeze()
    return variant
