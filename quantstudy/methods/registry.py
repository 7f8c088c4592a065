"""The methods: a `kind` in `params.yaml` picks a registered function.

A function takes the fp32 model (BatchNorm folded, eval mode), the calibration statistics (with the calibration
`images`, in batches, where the settings need them) and the method's row of the params, and returns a `Variant`. The
functions named in `POST_TRAINING` return it finished; those in `TRAINED` return it ready to be trained, and `finish`
turns it into what is stored. A new method is a class of its row in `params.py`, a function here and a row in
`params.yaml`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.device import DTYPES
from quantstudy.errors import unknown
from quantstudy.methods.gptq import gptq_codes
from quantstudy.methods.moments import input_moments
from quantstudy.quantization.layers import LayerScheme, QuantConv2d, quantize_layers, quantized_layers
from quantstudy.quantization.observers import activation_range, quantizable_layers
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
        bounds = activation_range(calibration["layers"][name], settings.clip_percentile)
        layer.activation.scale, layer.activation.zero_point = layer.scheme.activation.choose_qparams(*bounds)
    return variant


def trainable_float(model: nn.Module, calibration: Calibration, settings: P.QatCast) -> Variant:
    """Copy the fp32 model for mixed-precision fine-tuning."""
    return Variant(copy.deepcopy(model))


def finish(variant: Variant, settings: P.QatStatic | P.QatCast) -> Variant:
    """Freeze or cast a trained variant."""
    if isinstance(settings, P.QatCast):
        return cast(variant.network, DTYPES[settings.dtype])
    return _frozen(variant)


POST_TRAINING: dict[str, Function] = {
    "cast": cast_to,
    "weight_only": weight_only,
    "dynamic": dynamic,
    "static": static,
    "mixed_linear": mixed_linear,
    "mixed_variance": mixed_variance,
}
TRAINED: dict[str, Function] = {"qat_static": trainable_static, "qat_cast": trainable_float}


def settings_of(params: P.Params, method: str, functions: Mapping[str, Function]) -> Any:
    """Return the row of a method whose kind is one of `functions`; raise `UserError` for any other name."""
    settings = params.method(method)
    if settings.kind not in functions:
        raise unknown("method", method, [name for name, row in params.methods.items() if row.kind in functions])
    return settings


def replaceable(model: nn.Module, calibration: Calibration) -> dict[str, Any]:
    """Return the layers that a quantized one can take the place of, by name.

    Left are a layer that did not run on the calibration images, since another module reads its weight or nothing
    needs it, and a convolution whose padding is not zeros.
    """
    ran = calibration["layers"]
    return {
        name: layer
        for name, layer in quantizable_layers(model).items()
        if name in ran and getattr(layer, "padding_mode", "zeros") == "zeros"
    }


def _quantized(model: nn.Module, settings: P.Scheme, names: Any, mode: Mode = "none") -> Variant:
    bits = getattr(settings, "activation_bits", 32)
    weight = WeightScheme(settings.weight_bits, settings.group_size, settings.weight_range)
    scheme = LayerScheme(weight, ActivationScheme(mode, bits))
    network = copy.deepcopy(model)
    quantize_layers(network, dict.fromkeys(names, scheme))
    return Variant(network)


@torch.no_grad()
def _finished(model: nn.Module, variant: Variant, calibration: Calibration, settings: P.Scheme) -> Variant:
    """Freeze a variant as its settings say, `model` being what it was made from.

    Bias correction is Nagel et al. 2019 (*Data-Free Quantization Through Weight Equalization and Bias Correction*,
    section 4.2), with the mean input measured on calibration images: the mean error of a channel, (W_q - W) E[x], is
    taken from its bias. Inputs are the fp32 model's, padding included.
    """
    if not settings.needs_images:
        return _frozen(variant)
    moments = input_moments(model, calibration["images"], second=settings.rounding == "gptq")
    layers: dict[str, Any] = quantized_layers(variant.network)
    for name, layer in layers.items():
        scheme, weight = layer.scheme.weight, layer.weight.detach()
        if settings.rounding == "gptq":
            scale = scheme.choose_scale(weight)
            layer.set_codes(gptq_codes(weight, scale, scheme, moments[name]), scale)
        else:
            layer.freeze()
        # A linear layer without a bias keeps none: in an ONNX graph there is no place for it.
        if settings.bias_correction and (layer.bias is not None or isinstance(layer, QuantConv2d)):
            error = (scheme.dequantize(layer.weight_codes(), layer.weight_scale.float()) - weight).flatten(1)
            mean = moments[name].mean  # [groups, K]
            shift = (error.unflatten(0, (len(mean), -1)) * mean[:, None]).sum(2).flatten()
            layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias) - shift, requires_grad=False)
    return variant


@torch.no_grad()
def _frozen(variant: Variant) -> Variant:
    for layer in quantized_layers(variant.network).values():
        layer.freeze()
    return variant
