"""The steps of a post-training method beyond rounding each weight to the nearest code, in a fixed order.

1. `equalize`: cross-layer equalization, then absorption of high biases (`methods.equalization`);
2. the ranges: `weight_range`, and for static activations `activation_range` on histograms of the equalized network;
3. `rounding`: `nearest`, `gptq`, or learned by `adaround` (`methods.reconstruction`); `brecq` begins with `gptq`;
4. `gain_correction` (`methods.gain_correction`);
5. `bias_correction` (`methods.bias_correction`);
6. rounding `brecq`: train weights, scales and biases, one block after another (`methods.blocks`);
7. `finetune`: train all of them at once (`methods.joint`). Steps 6 and 7 need no labels.
"""

import copy

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.methods.bias_correction import correct_biases
from quantstudy.methods.blocks import reconstruct_blocks
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.equalization import TOLERANCE, absorb_high_biases, equalize, find_pairs
from quantstudy.methods.gain_correction import correct_gains
from quantstudy.methods.gptq import gptq
from quantstudy.methods.joint import finetune_jointly
from quantstudy.methods.reconstruction import Limits, reconstruct
from quantstudy.methods.trainable import split
from quantstudy.network.graph import relative_error, run_in_eval
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.variant import Skipped, merged


@torch.no_grad()
def equalized(model: nn.Module, calibration: Calibration, row: P.Scheme) -> tuple[nn.Module, Calibration, Skipped]:
    """Return the network to quantize, its calibration, and what could not be equalized.

    After each step, the output for the first calibration images is compared with the original one; the step is undone
    if they differ.
    """
    if not row.equalize:
        return model, calibration, {}
    images = calibration.images
    if not find_pairs(calibration.graph):
        reason = calibration.graph.problem or "no two layers that only each other read"
        return model, calibration, {"equalize": {"": reason}}
    wanted, found = run_in_eval(model, images[0]), equalize(model, images[0])
    if (error := relative_error(wanted, run_in_eval(found, images[0]))) > TOLERANCE:
        return model, calibration, {"equalize": {"": f"undone: the output would differ by {error:.2g} of its norm"}}
    absorbed = copy.deepcopy(found)
    absorb_high_biases(absorbed, images)
    if (error := relative_error(wanted, run_in_eval(absorbed, images[0]))) > TOLERANCE:
        reason = f"undone: the output would differ by {error:.2g} of its norm"
        return found, calibration.of(found), {"absorption of high biases": {"": reason}}
    return absorbed, calibration.of(absorbed), {}


@torch.no_grad()
def freeze(model: nn.Module, network: nn.Module, calibration: Calibration, row: P.Rounding) -> Skipped:
    """Round the weights of `network`, a copy of `model` with quantized layers, for good, as the row says.

    Returns:
        What could not be done: technique -> layer -> reason.
    """
    skipped: Skipped = {}
    every = calibration
    if row.finetune or row.rounding == "brecq":  # no code may be chosen on the images that judge these two
        calibration = every.first(split(sum(map(len, every.images)))[0])
    if row.rounding == "adaround":
        given = (torch.cat(calibration.images), Limits(steps=row.steps), calibration.graph.order)
        skipped["adaround"] = reconstruct(model, network, *given)
    layers = quantized_layers(network)
    waiting = {name: layer for name, layer in layers.items() if not layer.frozen}
    if row.rounding == "nearest":
        for layer in waiting.values():
            layer.freeze()
    else:
        moments = calibration.moments(layers if row.gain_correction else waiting)
        missing = (name for name in waiting if name not in moments)
        skipped["rounding"] = dict.fromkeys(missing, "a transposed convolution: its weights are rounded to nearest")
        for name, layer in waiting.items():
            if name not in moments:
                layer.freeze()
                continue
            layer.set_codes(*gptq(layer.weight.detach(), layer.scheme.weight, moments[name]))
    if row.gain_correction:
        moments = calibration.moments(layers)
        missing = (name for name in layers if name not in moments)
        skipped["gain_correction"] = dict.fromkeys(missing, "a transposed convolution: its scales stay")
        correct_gains(model, network, moments)
    if row.bias_correction:
        skipped["bias_correction"] = correct_biases(model, network, torch.cat(calibration.images))
    if row.rounding == "brecq":
        skipped["brecq"] = reconstruct_blocks(model, network, torch.cat(every.images), row.steps)
    if row.finetune:
        head = calibration.graph.head()
        skipped["finetune"] = finetune_jointly(model, network, every.images, row.steps, row.finetune_augmentation, head)
    return merged(skipped)
