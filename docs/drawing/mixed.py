"""The figure of mixed precision."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from docs.drawing.tiny import Example, figure
from quantstudy import params as P
from quantstudy.methods.allocation import HALF, Allocation
from quantstudy.methods.budget import allocations_within, divergence_from, mean_bits, mixed
from quantstudy.methods.sensitivity import measure_layers, quantized_table
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.report import style

WIDTHS = [2, 3, 4, 6, 8, HALF]
BUDGETS = (3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0)
SHOWN = 4.0
INT4 = 4


def mixed_precision(example: Example) -> Figure:
    """Draw the bits that a budget gives each layer, and the SQNR of each choice of bits over its size."""
    layers: dict[str, Any] = quantizable_layers(example.model)
    batches = list(zip(example.calibration.images, example.train[1].split(64), strict=False))
    macs = dict.fromkeys(layers, 0)  # these budgets limit the size only
    rows = measure_layers(example.model, example.calibration, batches, P.Sensitivity(bits=WIDTHS), macs)
    table, _ = quantized_table(example.model, example.calibration, _budget(SHOWN), WIDTHS[:-1])
    divergence = divergence_from(example.model, table, example.calibration.images)

    def choose(size: float) -> Allocation:
        return min(allocations_within(layers, rows, _budget(size)), key=divergence)

    def ratio(bits: Allocation) -> float:
        return example.sqnr_db(mixed(example.model, table, bits, example.calibration, _budget(SHOWN)))

    chosen = {size: choose(size) for size in BUDGETS}
    by_variance = sorted(layers, key=lambda name: float(layers[name].weight.var()))
    series: dict[str, tuple[str, str, list[Allocation]]] = {
        "mixed_budget": (style.VERMILLION, "o", list(chosen.values())),
        "uniform": (style.BLUE, "s", [dict.fromkeys(layers, width) for width in WIDTHS[:-1]]),
        "mixed_variance": (style.ORANGE, "^", [_int4(layers, by_variance[:n]) for n in range(1, len(layers))]),
        "mixed_linear": (style.PURPLE, "D", [_int4(layers, [n for n in layers if isinstance(layers[n], nn.Linear)])]),
    }
    drawn, (left, right) = figure(1, 2, width_ratios=(2, 3))
    left.barh(list(layers)[::-1], [chosen[SHOWN][name] for name in layers][::-1], color=style.VERMILLION)
    left.set(xlabel="bits", title=f"{SHOWN:g} bits a weight")
    for name, (colour, marker, allocations) in series.items():
        points = sorted((mean_bits(layers, bits, None), ratio(bits)) for bits in allocations)
        right.plot(*zip(*points, strict=True), marker=marker, ms=5, lw=1, color=colour, label=name)
    right.set(xlabel="stored bits a weight", ylabel="SQNR of the logits, dB", title="Error by size")
    right.legend()
    return drawn


def _budget(mean_bits: float) -> P.MixedBudget:
    return P.MixedBudget(kind="mixed_budget", mean_bits=mean_bits)


def _int4(layers: Mapping[str, Any], chosen: list[str]) -> Allocation:
    return dict.fromkeys(layers, HALF) | dict.fromkeys(chosen, INT4)
