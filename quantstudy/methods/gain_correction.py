"""Gain correction: rounding makes a layer's outputs smaller, and its scales make up for that.

Where codes are clipped, a rounded weight is smaller than the weight that it stands for. A range of least squared error
leaves the least error, but most of that error lies along the weight itself. Rounding errors point anywhere and partly
cancel from layer to layer; a lost gain multiplies. Banner, Nahshan and Soudry, *Post-training 4-bit quantization of
convolutional networks for rapid-deployment*, NeurIPS 2019, restore the norm of each channel's weights. Here the output
counts. The gain of a channel is the slope of its quantized output y' on fp32's y over the calibration images,
cov(y, y') / var(y) = w C w' / w C w, with C the covariance of the layer's inputs. The channel's scales are divided by
the gain. Noise in y' does not change this slope. The scale of least squared error, the slope of y on y', would shrink
the outputs further.
"""

import torch
from torch import Tensor, nn

from quantstudy.methods.moments import Moments
from quantstudy.quantization.layers import quantized_layers

LEAST, MOST = 0.5, 2.0
"""Gains are clamped to these bounds: beyond them rounding has broken the channel."""
CONSTANT = 1e-5
"""Below this share of sum(w^2 E[x^2]), the variance of an output counts as zero: in float32 it would be noise."""


@torch.no_grad()
def correct_gains(model: nn.Module, network: nn.Module, moments: dict[str, Moments]) -> None:
    """Divide the scales of each quantized layer of `network`, all frozen, by its channels' gains, in place.

    Args:
        model: the fp32 network.
        network: a copy of it with quantized layers.
        moments: the moments of the layers' inputs in `model`; a layer without moments is skipped.
    """
    for name, layer in quantized_layers(network).items():
        if name not in moments:
            continue
        weight = model.get_submodule(name).weight
        gain = output_gain(weight, layer.dequantized(), moments[name]).clamp(LEAST, MOST)  # type: ignore[arg-type]
        layer.set_codes(layer.weight_codes(), layer.weight_scale.float() / gain[:, None])


def output_gain(weight: Tensor, rounded: Tensor, moments: Moments) -> Tensor:
    """Return the slope of each channel's output with weight `rounded` on its output with `weight`, float32 [O].

    Both weights are float32 [O, ...]. The slope is 1 where the output with `weight` is constant, or where the slope is
    not positive: there is nothing to scale. Inputs in different blocks of `moments` count as uncorrelated.
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
