"""GPTQ: round weights one column after another, and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers*, ICLR 2023, algorithm 1. A layer's output error on calibration inputs is tr(dW H dWᵀ) with H = E[x xᵀ];
after column i is rounded, the others move by -(error / U[i, i]) U[i, i:], U the upper Cholesky factor of the inverse of
H, damped by 1 % of its mean diagonal. The order of the columns is the weight's own.

Here a convolution is a linear layer over patches, each group of it with its own H, all groups at once; the scales are
chosen before, from the weight alone, so that the codes are stored like any other method's; a row longer than
`moments.BLOCK` is a sequence of blocks without correlation between them.
"""

import torch
from torch import Tensor

from quantstudy.methods.moments import Moments
from quantstudy.quantization.schemes import WeightScheme

DAMPING = 0.01
_LAZY = 128
"""Columns after which the rest of the row is updated at once (section 3.3, step 2 of the paper)."""


@torch.no_grad()
def gptq_codes(weight: Tensor, scale: Tensor, scheme: WeightScheme, moments: Moments) -> Tensor:
    """Return int8 codes of `weight`'s shape that keep the layer's output on the calibration inputs.

    Args:
        weight: float32 [O, ...], a Conv2d's or Linear's.
        scale: float32 [O, scale groups], from `scheme`.
        scheme: bits and group size.
        moments: those of the layer's input, of as many groups as the layer has.
    """
    groups = moments.mean.shape[0]
    rows = weight.float().flatten(1)
    step = scale.repeat_interleave(scheme.grouped(weight).shape[2], dim=1)[:, : rows.shape[1]]
    rows, step = (value.unflatten(0, (groups, -1)).clone() for value in (rows, step))  # [groups, O / groups, K]
    codes = torch.empty_like(rows)
    start = 0
    for second in moments.second:
        columns = slice(start, start + second.shape[1])
        codes[:, :, columns] = _round_block(rows[:, :, columns], step[:, :, columns], scheme, second)
        start = columns.stop
    return codes.flatten(0, 1).to(torch.int8).view(weight.shape)


def _round_block(rows: Tensor, step: Tensor, scheme: WeightScheme, second: Tensor) -> Tensor:
    factor = _inverse_factor(second)
    rows, codes = rows.clone(), torch.empty_like(rows)
    width = rows.shape[2]
    for begin in range(0, width, _LAZY):
        end = min(begin + _LAZY, width)
        errors = torch.empty_like(rows[:, :, begin:end])
        for i in range(begin, end):
            column = rows[:, :, i]
            codes[:, :, i] = (column / step[:, :, i]).round_().clamp_(scheme.lowest, scheme.highest)
            error = (column - codes[:, :, i] * step[:, :, i]) / factor[:, None, i, i]
            errors[:, :, i - begin] = error
            rows[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
        rows[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return codes


def _inverse_factor(second: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of `second` [groups, k, k], damped until it has one."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    damping = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(1e-8)
    for _ in range(6):
        damped = second + torch.diag_embed(damping.expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return upper
        damping = 10 * damping
    raise RuntimeError("the second moments of a layer's input have no Cholesky factor")
