"""What a post-training method does beyond rounding each weight to the nearest code, in one fixed order.

1. `equalize`: cross-layer equalization, then absorption of high biases (`methods.equalization`);
2. the ranges: `weight_range`, and for static activations `activation_range` on histograms of the equalized network;
3. `rounding`: nearest, `gptq`, or learned: `adaround` by the layer, `brecq` by the block (`methods.reconstruction`);
4. `gain_correction` (`methods.gain_correction`);
5. `bias_correction` (`methods.bias_correction`);
6. `finetune`: all of it at once on the calibration images, without labels (`methods.joint`).
"""

from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.methods.bias_correction import correct_biases, correct_biases_analytically
from quantstudy.methods.equalization import absorb_high_biases, equalize
from quantstudy.methods.gain_correction import correct_gains
from quantstudy.methods.gptq import gptq_codes
from quantstudy.methods.joint import finetune_jointly
from quantstudy.methods.moments import input_moments
from quantstudy.methods.reconstruction import Effort, reconstruct
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import collect


def prepared(model: nn.Module, calibration: dict[str, Any], settings: P.Scheme) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that is quantized, and its calibration: both as given unless the settings equalize."""
    if not settings.equalize:
        return model, calibration
    model = equalize(model)
    absorb_high_biases(model, calibration["images"])
    bins = len(next(iter(calibration["layers"].values()))["counts"]) if "layers" in calibration else 2048
    batches = [(images, torch.empty(0)) for images in calibration["images"]]
    return model, calibration | {"layers": collect(model, batches, bins)["layers"]}


@torch.no_grad()
def freeze(model: nn.Module, network: nn.Module, calibration: dict[str, Any], settings: P.Rounding) -> None:
    """Round the weights of `network`, a copy of `model` with quantized layers, for good, as the settings say.

    Who makes several variants of one model can put their `moments` into `calibration` once.
    """
    if settings.rounding in ("adaround", "brecq"):
        images = torch.cat(calibration["images"])
        reconstruct(model, network, images, Effort(seconds=settings.seconds), block=settings.rounding == "brecq")
    layers: dict[str, Any] = quantized_layers(network)
    waiting = {name: layer for name, layer in layers.items() if not layer.frozen}
    seen = set(layers) if settings.gain_correction else set(waiting) if settings.rounding != "nearest" else set()
    moments = calibration.get("moments") or (input_moments(model, calibration["images"], names=seen) if seen else {})
    for name, layer in waiting.items():
        if settings.rounding == "nearest":
            layer.freeze()
        else:
            scheme, weight = layer.scheme.weight, layer.weight.detach()
            scale = scheme.choose_scale(weight)
            layer.set_codes(gptq_codes(weight, scale, scheme, moments[name]), scale)
    if settings.gain_correction:
        correct_gains(model, network, moments)
    if settings.bias_correction == "analytic":
        correct_biases_analytically(model, network, calibration["image_size"])
    elif settings.bias_correction:
        correct_biases(model, network, torch.cat(calibration["images"]))
    if settings.finetune:
        finetune_jointly(model, network, calibration["images"], settings.seconds)
