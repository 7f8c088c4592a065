"""Gain correction: what rounding takes from the size of a layer's outputs, its scales give back.

A rounded weight is smaller than the weight it stands for wherever codes are clipped: ranges of the least squared error
leave the least error behind and the most of it along the weight itself. Errors of rounding point anywhere and partly
cancel from layer to layer; a lost gain multiplies. Banner, Nahshan and Soudry, *Post-training 4-bit quantization of
convolutional networks for rapid-deployment*, NeurIPS 2019, bring the norm of each channel's weights back. Here it is
the output that counts: the gain of a channel is the slope of its quantized output y' on fp32's y over the calibration
images, cov(y, y') / var(y) = w C w' / w C w with C the covariance of the layer's inputs, and the channel's scales are
divided by it. Noise in y' does not change this slope, while the scale of least squared error, the slope of y on y',
shrinks the outputs further.
"""

import torch
from torch import Tensor, nn

from quantstudy.methods.moments import Moments
from quantstudy.quantization.layers import quantized_layers

LEAST, MOST = 0.5, 2.0
"""Gains beyond these are of channels that rounding has broken; they are corrected no further."""
CONSTANT = 1e-5
"""The share of sum(w^2 E[x^2]) below which the variance of an output counts as none: in float32 it would be noise."""


@torch.no_grad()
def correct_gains(model: nn.Module, network: nn.Module, moments: dict[str, Moments]) -> None:
    """Divide the scales of each quantized layer of `network`, all frozen, by its channels' gains, in place.

    Args:
        model: the fp32 network.
        network: a copy of it with quantized layers.
        moments: those of the layers' inputs in `model`; a layer without is left.
    """
    for name, layer in quantized_layers(network).items():
        if name not in moments:
            continue
        weight = model.get_submodule(name).weight
        gain = output_gain(weight, layer.dequantized(), moments[name]).clamp(LEAST, MOST)  # type: ignore[arg-type]
        layer.set_codes(layer.weight_codes(), layer.weight_scale.float() / gain[:, None])


def output_gain(weight: Tensor, rounded: Tensor, moments: Moments) -> Tensor:
    """Return the slope of each output channel with weight `rounded` on that with `weight`, both float32 [O, ...]: [O].

    It is 1 where the output of `weight` is constant, or where the slope falls: there is nothing to scale. Inputs in
    different blocks of `moments` count as uncorrelated.
    """
    groups = moments.mean.shape[0]
    before, after = (w.float().flatten(1).unflatten(0, (groups, -1)) for w in (weight, rounded))  # [groups, O / g, K]
    common, variance, power = torch.zeros(3, *before.shape[:2]).unbind()
    start = 0
    for second in moments.second:
        columns = slice(start, start + second.shape[1])
        mean = moments.mean[:, columns]
        part = before[:, :, columns]
        response = part @ (second - mean[:, :, None] * mean[:, None, :])
        common = common + (response * after[:, :, columns]).sum(2)
        variance = variance + (response * part).sum(2)
        power = power + (part.square() * second.diagonal(dim1=-2, dim2=-1)[:, None, :]).sum(2)
        start = columns.stop
    slope = common / variance
    return torch.where((variance > CONSTANT * power) & (slope > 0), slope, 1.0).flatten()
