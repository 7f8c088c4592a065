"""Figures of how numbers are rounded: weights, activations, schemes, 16-bit types."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.drawing.tiny import Example, figure
from quantstudy import params as P
from quantstudy.methods.recipes import quantize
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.ranges import activation_range, squared_error
from quantstudy.quantization.saturation import LARGEST_PAIR, limit_of
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme
from quantstudy.report import style

LAYER = "3.body.6"
"""The layer whose weight and input are shown: the projection that ends the inverted residual."""
SHARES = torch.linspace(1.0, 0.3, 71)
PERCENTILE = 99.0


def rounding(example: Example) -> Figure:
    """Draw the weights of one channel on a grid of 3 bits, and their error at each scale."""
    weight = example.model.get_submodule(LAYER).weight[:1].detach()  # type: ignore[operator,union-attr,index]
    drawn, (left, right) = figure(1, 2)
    values = weight.flatten()
    for how, colour, marker in (("minmax", style.BLUE, "o"), ("mse", style.VERMILLION, "s")):
        scheme = WeightScheme(3, weight_range=how)  # type: ignore[arg-type]
        scale = scheme.choose_scale(weight)
        line = torch.linspace(float(values.min()), float(values.max()), 800).view(1, -1)
        left.plot(line[0], scheme.dequantize(scheme.quantize(line, scale), scale)[0], color=colour, lw=1)
        rounded = scheme.dequantize(scheme.quantize(weight, scale), scale).flatten()
        left.plot(values, rounded, marker, color=colour, ms=4, label=f"{how}, scale {float(scale):.3f}")
    left.set(xlabel="weight", ylabel="rounded weight", title="One channel at 3 bits")
    left.legend(loc="upper left")
    for bits, colour, marker in ((4, style.GREEN, "^"), (3, style.BLUE, "o"), (2, style.VERMILLION, "s")):
        errors = [_weight_error(weight, WeightScheme(bits), float(share)) for share in SHARES]
        right.plot(SHARES, errors, color=colour, label=f"{bits} bits")
        best = int(np.argmin(errors))
        right.plot(SHARES[best], errors[best], marker, color=colour)
    right.set(xlabel="scale, as a share of the one that clips nothing", ylabel="squared error", yscale="log")
    right.set_title("The least error clips a little")
    right.legend()
    return drawn


def _weight_error(weight: Tensor, scheme: WeightScheme, share: float) -> float:
    scale = scheme.choose_scale(weight) * share
    return float((scheme.dequantize(scheme.quantize(weight, scale), scale) - weight).square().mean())


def ranges(example: Example) -> Figure:
    """Draw the histogram of a layer's input, and below it the range that each rule chooses at 4 bits."""
    statistics = example.calibration.statistics[LAYER]
    edges, counts = statistics["edges"].double(), statistics["counts"]
    centers, scheme = (edges[1:] + edges[:-1]) / 2, ActivationScheme("static", 4)
    rules: dict[str, tuple[Any, float | None]] = {
        "entropy": ("entropy", None),
        "mse": ("mse", None),
        f"percentile {PERCENTILE:g}": ("minmax", PERCENTILE),
        "moving average": ("moving_average", None),
        "min-max": ("minmax", None),
    }
    drawn, (upper, lower) = figure(2, 1, height=3.6, sharex=True, height_ratios=(3, 2))
    coarse = counts.view(-1, 16).sum(1)
    upper.stairs(coarse, edges[::16], fill=True, color=style.SKY)
    upper.set(yscale="log", ylabel="values", title="The input of one layer, and the ranges chosen for 4 bits")
    for place, (how, percentile) in enumerate(rules.values()):
        low, high = activation_range(statistics, scheme, how, percentile)
        low, high = min(low, 0.0), max(high, 0.0)
        error = squared_error(centers, counts, (low, high), scheme)
        lower.plot([low, high], [place, place], color=style.BLUE, lw=2)
        lower.plot(np.linspace(low, high, scheme.highest + 1), [place] * (scheme.highest + 1), "|", color=style.BLUE)
        lower.text(high, place, f"  squared error {error:.4f}", va="center", fontsize=8, color=style.INK)
    lower.set_yticks(range(len(rules)), list(rules))
    lower.set(ylim=(-0.6, len(rules) - 0.4), xlabel="value; each tick is a code", xlim=(None, 1.3 * statistics["max"]))
    lower.grid(False)
    return drawn


def schemes(example: Example) -> Figure:
    """Draw the SQNR of the logits of each scheme over the number of bits."""
    drawn, axes = figure(1, 1)
    widths = range(2, 9)
    rows: dict[str, Any] = {
        "weights alone, by channel": lambda b: P.WeightOnly(kind="weight_only", weight_bits=b, fragile_bits=None),
        "weights alone, groups of 16": lambda b: P.WeightOnly(
            kind="weight_only", weight_bits=b, group_size=16, fragile_bits=None
        ),
        "static": lambda b: P.Static(kind="static", weight_bits=b, activation_bits=b, fragile_bits=None),
        "dynamic": lambda b: P.Dynamic(kind="dynamic", weight_bits=b, activation_bits=b, fragile_bits=None),
    }
    looks = ((style.BLUE, "o"), (style.GREEN, "^"), (style.VERMILLION, "s"), (style.PURPLE, "D"))
    for (name, row), (colour, marker) in zip(rows.items(), looks, strict=True):
        ratios = [example.sqnr_db(quantize(example.model, example.calibration, row(bits))) for bits in widths]
        axes.plot(widths, ratios, color=colour, marker=marker, ms=5, label=name)
    axes.set(xlabel="bits of weights, and of activations where they are quantized", ylabel="SQNR of the logits, dB")
    axes.set_title("About 6 dB a bit, rounded to nearest")
    axes.legend()
    return drawn


def casts(example: Example) -> Figure:
    """Draw the relative error of the two 16-bit types by magnitude, and where weights lie."""
    drawn, (upper, lower) = figure(2, 1, height=3.6, sharex=True, height_ratios=(2, 1))
    values = torch.logspace(-10, 6, 4001, dtype=torch.float64)
    for dtype, colour in ((torch.float16, style.BLUE), (torch.bfloat16, style.VERMILLION)):
        rounded = values.to(dtype).double()
        error = ((rounded - values).abs() / values).clamp_max(1.0)
        worst = error.view(-1)[:4000].view(-1, 20).amax(1)
        upper.plot(values[:4000:20], worst, color=colour, label=str(dtype).removeprefix("torch."))
    upper.set(xscale="log", yscale="log", ylabel="largest relative error")
    upper.set_title("float16 is finer, bfloat16 reaches further")
    upper.legend(loc="lower left")
    weights = torch.cat([p.flatten() for p in example.model.parameters()]).abs().numpy()
    lower.hist(weights, bins=np.logspace(-10, 6, 81).tolist(), color=style.SKY)
    lower.set(ylabel="parameters", xlabel="magnitude")
    return drawn


def saturation(example: Example) -> Figure:
    """Draw the codes of neighbours in one layer, free and limited, and the SQNR of every layer's weight by limit."""
    schemes = {
        "8 bits, may saturate": (WeightScheme(8), style.SKY, "o"),
        "8 bits, saturation-free": (WeightScheme(8, limit="pairs"), style.BLUE, "s"),
        "7 bits": (WeightScheme(8, limit="codes"), style.VERMILLION, "^"),
    }
    layers: dict[str, Any] = quantizable_layers(example.model)
    weights = {name: layer.weight.detach() for name, layer in layers.items() if limit_of(layer) == "pairs"}
    drawn, (left, right) = figure(1, 2)
    for sign in (1, -1):
        edge = sign * LARGEST_PAIR
        left.fill([0, edge, edge], [edge, 0, edge], color="#EEEEEE")
    for scheme, colour, marker in list(schemes.values())[:2]:
        codes = scheme.quantize(weights[LAYER], scheme.choose_scale(weights[LAYER])).flatten(1)
        left.plot(codes[:, ::2].flatten(), codes[:, 1::2].flatten(), marker, color=colour, ms=3, ls="none")
    left.set(xlabel="code of input channel 2k", ylabel="of 2k + 1", title="Grey: two products are too large")
    for place, weight in enumerate(weights.values()):
        for name, (scheme, colour, marker) in schemes.items():
            scale = scheme.choose_scale(weight)
            noise = scheme.dequantize(scheme.quantize(weight, scale), scale) - weight
            sqnr = 10 * float(torch.log10(weight.square().sum() / noise.square().sum()))
            right.plot(sqnr, place, marker, color=colour, label=name if not place else None)
    right.set_yticks(range(len(weights)), list(weights))
    right.set(xlabel="SQNR of the weight, dB", title="Each layer", ylim=(-0.5, len(weights) + 0.9))
    right.legend(loc="upper left", fontsize=8)
    return drawn
