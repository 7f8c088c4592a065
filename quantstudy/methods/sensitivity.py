"""What it costs to quantize one layer alone, at each number of bits.

For each layer and width, only that layer's weights are quantized. The network's logits are compared with fp32's on
calibration images.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.methods.allocation import HALF, stored_bits
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.fragile import exchanged
from quantstudy.methods.trainable import split
from quantstudy.methods.uniform import rounded_alone
from quantstudy.network.graph import out_channels_first
from quantstudy.quantization.layers import LayerScheme
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import Skipped, merged

Row = dict[str, Any]
COLUMNS = (
    *("layer", "bits", "weights", "macs", "bytes", "sqnr_db", "loss_increase", "kl_divergence", "top1_drop", "images"),
)
Table = dict[int, dict[str, nn.Module]]
"""Quantized layers by bits, then by name."""
Layers = Mapping[str, Any]
"""The Conv2d and Linear of a network that can be quantized, by name."""


def quantized_table(
    model: nn.Module, calibration: Calibration, settings: P.Rounding, widths: Sequence[int]
) -> tuple[Table, Skipped]:
    """Return each layer of `model` rounded alone (`uniform.rounded_alone`) at each of `widths`, all below 16.

    The second value says what could not be done at one width at least: technique -> layer -> reason.
    """
    table, skipped = Table(), Skipped()
    if settings.finetune:  # it judges on images that the table must not have seen
        calibration = calibration.first(split(sum(map(len, calibration.images)))[0])
    for bits in widths:
        scheme = LayerScheme(WeightScheme(bits, settings.group_size, settings.weight_range))
        schemes = dict.fromkeys(calibration.replaceable, scheme)
        table[bits], left = rounded_alone(model, calibration, settings, schemes)
        skipped = merged(skipped, left)
    return table, skipped


def stored_shape(layer: Any) -> torch.Size:
    """Return the shape in which the codes of a layer are stored, [O, I / groups, ...]."""
    return out_channels_first(layer, layer.weight).shape


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    calibration: Calibration,
    batches: Sequence[tuple[Tensor, Tensor]],
    settings: P.Sensitivity,
    macs: Mapping[str, int],
) -> list[Row]:
    """Return one row per layer and width, in the order of execution.

    A row has the `layer`, the `bits`, the number of `weights`, `macs` per image, and the `bytes` stored at that width,
    scales included. On a number of `images` it has `sqnr_db` of the logits, `loss_increase` (cross-entropy, nats),
    `kl_divergence` of the predicted distribution from fp32's (nats) and `top1_drop` (percentage points).

    Args:
        model: fp32, BatchNorm folded, eval mode; it stays untouched.
        calibration: the calibration of `model`.
        batches: calibration images float32 [N, C, H, W] and labels int64 [N]; a label of -1 is unknown, and the class
            that `model` predicts takes its place.
        settings: the widths, and how weights are rounded.
        macs: multiply-accumulates per image of every layer.
    """
    layers = calibration.replaceable
    images, labels = [images for images, _ in batches], torch.cat([labels for _, labels in batches])
    reference = torch.cat([model(batch.clone()) for batch in images])
    labels = torch.where(labels < 0, reference.argmax(1), labels)
    table, _ = quantized_table(model, calibration, settings, [bits for bits in settings.bits if bits < HALF])
    rows = []
    for name, bits in itertools.product(layers, settings.bits):
        weight = layers[name].weight
        with exchanged(layers[name], table[bits][name] if bits < HALF else None):
            logits = torch.cat([model(batch.clone()) for batch in images])
        if not logits.isfinite().all():
            raise UserError(
                f"sensitivity: the logits are not finite with {name} at {bits} bits; take its width out of bits"
            )
        row = {"layer": name, "bits": bits, "weights": weight.numel(), "macs": macs[name]}
        row["bytes"] = stored_bits(stored_shape(layers[name]), bits, settings.group_size) // 8
        rows.append(row | _compare(reference, logits, labels))
    return rows


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the predictions of `logits` from those of `reference`, in nats."""
    log_p, log_q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


def _compare(reference: Tensor, logits: Tensor, labels: Tensor) -> Row:
    log_p, log_q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    right, right_now = ((x.argmax(1) == labels).float().mean().item() for x in (reference, logits))
    return {
        "sqnr_db": sqnr_db(np.asarray(reference), np.asarray(logits)),
        "loss_increase": float(F.nll_loss(log_q, labels) - F.nll_loss(log_p, labels)),
        "kl_divergence": divergence(reference, logits),
        "top1_drop": 100 * (right - right_now),
        "images": len(labels),
    }
