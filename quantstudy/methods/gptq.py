"""GPTQ: round weights one column after another, and let the remaining columns make up for the error.

Frantar, Ashkboos, Hoefler and Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers*, ICLR 2023, algorithm 1. A layer's output error on calibration inputs is tr(dW H dWᵀ) with H = E[x xᵀ].
After column i is rounded, the remaining columns move by -(error / U[i, i]) U[i, i:]. U is the upper Cholesky factor of
the inverse of H, damped by 20 % of its mean diagonal. The paper's 1 % learns a few hundred images by heart: with 250
images, MobileNetV2 at 224 px with weights of four bits was 0.6 dB further from fp32 on other images. Columns are
rounded by falling H[i, i], as `--act-order` of the authors' code does.

Here a convolution is a linear layer over patches. Each of its groups has its own H, and all groups are rounded at once.
The scales are chosen before, from the weight alone, so the codes are stored like any other method's. A row longer than
`moments.BLOCK` is a sequence of blocks without correlation between them. Where pairs of codes must not saturate, the
first code of a pair leaves room for the second weight in its current state, and the second code takes the room that is
left; then columns keep the weight's own order.

The scale of least squared error is not the best one for few bits: it ignores that the columns make up for each other.
So a row of at most `SEARCHED_BITS` bits whose `weight_range` is mse is rounded at multiples of its scales too, and the
multiple of the least output error is kept. A layer of more than `LARGE` weights is rounded once: VGG-11's first linear
layer, of 100 million, takes a minute each time.
"""

import hashlib

import torch
from torch import Tensor

from quantstudy.methods.moments import Moments
from quantstudy.methods.trainable import LARGE
from quantstudy.quantization.saturation import bounds_beside, round_pairs
from quantstudy.quantization.schemes import WeightScheme

DAMPING = 0.2
KEPT = 4
"""The schemes of a layer whose codes are kept, one byte a weight: a search goes back and forth between few."""
MULTIPLES = (0.7, 0.78, 0.85, 0.92, 1.08, 1.17, 1.27, 1.4)
SEARCHED_BITS = 4
_LAZY = 128
"""After this many columns, the rest of the row is updated at once (section 3.3, step 2 of the paper)."""


def gptq(weight: Tensor, scheme: WeightScheme, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return int8 codes of `weight`'s shape and their scale; each weight is rounded once in each scheme."""
    digest = hashlib.sha256(weight.cpu().contiguous().numpy().data).digest()
    rounded = moments.rounded
    if (scheme, digest) not in rounded:
        rounded[scheme, digest] = _best(weight, scheme, moments)
        if len(rounded) > KEPT:
            del rounded[next(iter(rounded))]
    codes, scale = rounded[scheme, digest]
    return codes.clone(), scale.clone()


@torch.no_grad()
def _best(weight: Tensor, scheme: WeightScheme, moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of the multiple of the least output error, for each row by itself."""
    scale = scheme.choose_scale(weight)
    codes = gptq_codes(weight, scale, scheme, moments)
    if scheme.bits > SEARCHED_BITS or scheme.weight_range != "mse" or weight.numel() > LARGE:
        return codes, scale
    best, least = scale.clone(), output_errors(weight, scheme.dequantize(codes, scale), moments)
    for multiple in MULTIPLES:
        other_scale = scheme.rounded(multiple * scale)
        other = gptq_codes(weight, other_scale, scheme, moments)
        errors = output_errors(weight, scheme.dequantize(other, other_scale), moments)
        better = errors < least
        codes[better], best[better], least = other[better], other_scale[better], torch.minimum(errors, least)
    return codes, best


def output_errors(weight: Tensor, rounded: Tensor, moments: Moments) -> Tensor:
    """Return each output's mean squared error on the calibration inputs, float32 [O]; both weights are [O, ...]."""
    error = (rounded - weight).float().flatten(1).unflatten(0, (len(moments.mean), -1))  # [groups, O / groups, K]
    parts = error.split([second.shape[1] for second in moments.second], dim=2)
    squares = ((part @ second).mul_(part).sum(2) for part, second in zip(parts, moments.second, strict=True))
    return sum(squares, torch.zeros(())).flatten()


@torch.no_grad()
def gptq_codes(weight: Tensor, scale: Tensor, scheme: WeightScheme, moments: Moments) -> Tensor:
    """Return int8 codes of `weight`'s shape that keep the layer's output on the calibration inputs.

    Args:
        weight: float32 [O, ...], of a convolution or a linear layer.
        scale: float32 [O, scale groups], from `scheme`.
        scheme: bits and group size.
        moments: the moments of the layer's input, with as many groups as the layer has.
    """
    groups = moments.mean.shape[0]
    rows, step = weight.float().flatten(1), scheme.spread(scale, weight.shape)
    rows, step = (value.unflatten(0, (groups, -1)).clone() for value in (rows, step))  # [groups, O / groups, K]
    codes = torch.empty_like(rows)
    area = weight.shape[2:].numel() if scheme.limit == "pairs" else None
    start = 0
    for order, factor in _factors(moments, ordered=area is None):
        columns = slice(start, start + factor.shape[1])
        start = columns.stop
        if order is None:
            _round_block(rows, step, codes, scheme, factor, columns, area)
            continue
        index = order[:, None, :].expand_as(rows[:, :, columns])
        part, steps = (value[:, :, columns].gather(2, index) for value in (rows, step))
        rounded = torch.empty_like(part)
        _round_block(part, steps, rounded, scheme, factor, slice(0, factor.shape[1]), None)
        codes[:, :, columns].scatter_(2, index, rounded)
    return codes.flatten(0, 1).to(torch.int8).view(weight.shape)


def _round_block(
    rows: Tensor, step: Tensor, codes: Tensor, scheme: WeightScheme, factor: Tensor, columns: slice, area: int | None
) -> None:
    """Round `columns` of `rows` [groups, O / groups, K] into `codes`; `rows` change. Pairs are `area` apart."""
    block = rows[:, :, columns]
    width = block.shape[2]
    for begin in range(0, width, _LAZY):
        end = min(begin + _LAZY, width)
        errors = torch.empty_like(block[:, :, begin:end])
        for i in range(begin, end):
            column = columns.start + i
            code = _round_column(rows, step, codes, scheme, column, area)
            codes[:, :, column] = code
            error = (block[:, :, i] - code * step[:, :, column]) / factor[:, None, i, i]
            errors[:, :, i - begin] = error
            block[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
        block[:, :, end:] -= errors @ factor[:, begin:end, end:]


def _round_column(
    rows: Tensor, step: Tensor, codes: Tensor, scheme: WeightScheme, column: int, area: int | None
) -> Tensor:
    if area is not None and not column // area % 2:
        pair = torch.stack([rows[:, :, column].flatten(), rows[:, :, column + area].flatten()], dim=1)
        return round_pairs(pair, step[:, :, column].flatten(), torch.Size([1, 2]))[:, 0].view(rows.shape[:2])
    code = (rows[:, :, column] / step[:, :, column]).round_().clamp_(scheme.lowest, scheme.highest)
    if area is None:
        return code
    low, high = bounds_beside(codes[:, :, column - area])
    return code.maximum(low).minimum(high)


def _factors(moments: Moments, *, ordered: bool) -> list[tuple[Tensor | None, Tensor]]:
    """Return for each block the factor U, and if `ordered`, before it the order of its columns, int64 [groups, k]."""
    if ordered not in moments.factors:
        moments.factors[ordered] = [
            _ordered_factor(second) if ordered else (None, _inverse_factor(second)) for second in moments.second
        ]
    return moments.factors[ordered]


def _ordered_factor(second: Tensor) -> tuple[Tensor, Tensor]:
    order = second.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    turned = torch.stack([part[by][:, by] for part, by in zip(second, order, strict=True)])
    return order, _inverse_factor(turned)


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
