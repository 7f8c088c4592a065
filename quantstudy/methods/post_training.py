"""What a post-training method does beyond rounding each weight to the nearest code, in one fixed order.

1. `equalize`: cross-layer equalization, then absorption of high biases (`methods.equalization`);
2. the ranges: `weight_range`, and for static activations `activation_range` on histograms of the equalized network;
3. `rounding`: nearest, `gptq`, or learned: `adaround` by the layer, `brecq` by the block (`methods.reconstruction`);
4. `bias_correction`;
5. `finetune`: all of it at once on the calibration images, without labels (`methods.joint`).

Bias correction follows Nagel et al. 2019 (*Data-Free Quantization Through Weight Equalization and Bias Correction*,
appendix D, the empirical kind): a layer's mean output per channel, in the quantized network up to there, is brought
back to that of the fp32 network on calibration images. One pass does it: each layer is corrected before the next one
sees its output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.methods.equalization import absorb_high_biases, equalize
from quantstudy.methods.gptq import gptq_codes
from quantstudy.methods.joint import finetune_jointly
from quantstudy.methods.moments import input_moments
from quantstudy.methods.reconstruction import Effort, reconstruct
from quantstudy.quantization.layers import QuantConv2d, quantized_layers
from quantstudy.quantization.observers import collect

_PIXELS = 64 * 224 * 224
"""Of images that bias correction looks at together, for the sake of memory."""


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
    waiting: dict[str, Any] = {name: layer for name, layer in quantized_layers(network).items() if not layer.frozen}
    if settings.rounding == "nearest":
        for layer in waiting.values():
            layer.freeze()
    elif waiting:
        moments = calibration.get("moments") or input_moments(model, calibration["images"], names=set(waiting))
        for name, layer in waiting.items():
            scheme, weight = layer.scheme.weight, layer.weight.detach()
            scale = scheme.choose_scale(weight)
            layer.set_codes(gptq_codes(weight, scale, scheme, moments[name]), scale)
    if settings.bias_correction:
        correct_biases(model, network, torch.cat(calibration["images"]))
    if settings.finetune:
        finetune_jointly(model, network, calibration["images"], settings.seconds)


@torch.no_grad()
def correct_biases(model: nn.Module, network: nn.Module, images: Tensor) -> None:
    """Add to the bias of each quantized layer what its mean output lacks, in place; `images` is [N, 3, S, S].

    A linear layer without a bias keeps none: in an ONNX graph there is no place for it.
    """
    images = images[: max(_PIXELS // images.shape[-1] ** 2, 1)]
    means: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(_: Any, inputs: Any, y: Tensor) -> None:
            means[name] = _mean(y)

        return hook

    def correct(name: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> Tensor:
            missing = means[name] - _mean(y)
            layer.bias = nn.Parameter((0 if layer.bias is None else layer.bias) + missing, requires_grad=False)
            return y + (missing.view(-1, 1, 1) if y.ndim == 4 else missing)

        return hook

    layers: dict[str, Any] = {
        name: layer
        for name, layer in quantized_layers(network).items()
        if layer.bias is not None or isinstance(layer, QuantConv2d)
    }
    handles = [model.get_submodule(name).register_forward_hook(remember(name)) for name in layers]
    try:
        model(images)
        handles += [layer.register_forward_hook(correct(name)) for name, layer in layers.items()]
        network(images)
    finally:
        for handle in handles:
            handle.remove()


def _mean(y: Tensor) -> Tensor:
    """Return the mean of a layer's output per channel: [N, C, H, W] or [..., C] to [C]."""
    return y.mean((0, 2, 3)) if y.ndim == 4 else y.flatten(0, -2).mean(0)
