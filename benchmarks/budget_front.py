"""Accuracy against size for budgets from 2 to 8 bits: `python -m benchmarks.budget_front --study mobilenetv2_digits`.

All points have the rounding and the corrections of one method of kind mixed_budget, and keep the other parameters in
16-bit floats. Only the choice of bits differs: within a budget (at the size of each uniform width, and half-way between
two), uniform, by the rule of linear layers, or by the rule of lowest variance with more and more layers in int4. Sizes
are file sizes. Accuracy is measured with the stored weights in float32 arithmetic, which is faster on a CPU without
16-bit matrix instructions. Run the stage `sensitivity` first: its calibration images choose the bits, the test images
only report.
"""

import argparse
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split, load_split
from quantstudy.errors import run_stage, unknown
from quantstudy.files import read_json, write_json
from quantstudy.machine.device import DTYPES, set_up
from quantstudy.measure.statistics import mcnemar_exact_p, wilson_interval
from quantstudy.methods.allocation import HALF, Allocation
from quantstudy.methods.budget import allocations_within, divergence_from, mean_bits, mixed
from quantstudy.methods.calibration import Calibration, load_calibration
from quantstudy.methods.sensitivity import Row, Table, quantized_table
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import cast, save_variant
from quantstudy.report.front import plot_budget_front

UNIFORM = range(2, 9)
INT4 = 4
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The shares of layers in int4 at which the rule of lowest variance is drawn; `compare` picks one of matching size."""
EAGER_BATCH = 64


@dataclass(frozen=True)
class Front:
    """What all points share: the fp32 model, its layers at every width, the test images."""

    model: nn.Module
    settings: P.MixedBudget
    rows: Sequence[Row]
    table: Table
    divergence: Callable[[Allocation], float]
    calibration: Calibration
    checkpoint: dict[str, Any]
    test: Split
    preprocessing: P.Preprocessing

    @functools.cached_property
    def layers(self) -> dict[str, Any]:
        """The layers that can be quantized, by name."""
        return dict(self.calibration.replaceable)

    def mean_bits(self, bits: Allocation) -> float:
        """Return the stored bits per weight, scales included."""
        return mean_bits(self.layers, bits, self.settings.group_size)

    def uniform(self, width: int) -> Allocation:
        """Return every layer at one width."""
        return dict.fromkeys(self.layers, width)

    def budget(self, size: float) -> Allocation:
        """Return the bits that `mixed_budget` chooses for a size, in bits per weight."""
        settings = self.settings.model_copy(update={"mean_bits": size, "bit_operations": None})
        return min(allocations_within(self.layers, self.rows, settings), key=self.divergence)

    def by_variance(self, count: int) -> Allocation:
        """Return the `count` layers of lowest weight variance in int4, the rest at 16 bits."""
        order = sorted(self.layers, key=lambda name: float(self.layers[name].weight.var()))
        return self.uniform(HALF) | dict.fromkeys(order[:count], INT4)

    def linear(self, width: int) -> Allocation:
        """Return the linear layers at one width, the rest at 16 bits."""
        return {name: width if isinstance(layer, nn.Linear) else HALF for name, layer in self.layers.items()}

    def points(self) -> Iterator[tuple[str, str, Allocation]]:
        """Yield series, label and bits of every point."""
        sizes = [self.mean_bits(self.uniform(width)) for width in UNIFORM]
        for width, size in zip(UNIFORM, sizes, strict=True):
            yield "uniform", f"W{width}", self.uniform(width)
            yield "mixed_budget", f"as W{width}", self.budget(size)
        for low, high in itertools.pairwise(sizes):
            yield "mixed_budget", "half-way", self.budget((low + high) / 2)
        for share in SHARES:
            yield "mixed_variance", f"{share:.0%}", self.by_variance(max(round(share * len(self.layers)), 1))
        for width in UNIFORM:
            yield "mixed_linear", f"W{width}", self.linear(width)

    def measure(self, series: str, label: str, bits: Allocation) -> tuple[Row, np.ndarray]:
        """Return the row of a point and its logits on the test images."""
        variant = mixed(self.model, self.table, bits, self.calibration, self.settings)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "variant.pth"
            save_variant(path, variant, self.checkpoint, series)
            size = path.stat().st_size
        logits = self.logits(cast(variant.network, torch.float32))
        counts = {str(width): list(bits.values()).count(width) for width in sorted(set(bits.values()))}
        row = {"series": series, "label": label, "mean_bits": self.mean_bits(bits), "size_mb": size / 1e6}
        return row | accuracy(logits, self.test) | {"layers_by_bits": counts}, logits

    def logits(self, model: nn.Module) -> np.ndarray:
        """Return a model's logits on the test images."""
        return run_on_split(model, self.test, self.preprocessing, EAGER_BATCH, torch.device("cpu"), torch.channels_last)


def accuracy(logits: np.ndarray, test: Split) -> Row:
    """Return top-1 in percent and the ends of its 95 % Wilson interval."""
    correct = int((logits.argmax(1) == test.labels.numpy()).sum())
    low, high = wilson_interval(correct, len(test))
    return {"top1": 100 * correct / len(test), "top1_low": low, "top1_high": high, "images": len(test)}


def compare(front: Front, size: float, label: str) -> Row:
    """Return mixed_budget at a size, compared with uniform W4, lowest variance at the nearest size, and linear W4."""
    labels = front.test.labels.numpy()
    own, logits = front.measure("mixed_budget", label, front.budget(size))
    by_variance = [front.by_variance(count) for count in range(1, len(front.layers))]
    others = (
        ("uniform", "W4", front.uniform(INT4)),
        ("mixed_variance", "nearest size", min(by_variance, key=lambda bits: abs(front.mean_bits(bits) - size))),
        ("mixed_linear", "W4", front.linear(INT4)),
    )
    rows = []
    for series, name, bits in others:
        row, found = front.measure(series, name, bits)
        p = mcnemar_exact_p(logits.argmax(1) == labels, found.argmax(1) == labels)
        rows.append(row | {"top1_less": own["top1"] - row["top1"], "p": p})
    return own | {"against": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/<study>/budget_front.{json,png}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    parser.add_argument("--method", default="mixed_budget", help="the method whose rounding is used")
    arguments = parser.parse_args(argv)
    name, params = arguments.study, P.load_params()
    study, settings = params.study(name), params.method(arguments.method)
    if not settings.needs_sensitivity:
        raise unknown("--method", arguments.method, [m for m, row in params.methods.items() if row.needs_sensitivity])
    set_up(study.seed)

    fp32 = layout.model(name, "fp32")
    model, preprocessing = load_fp32(fp32), load_preprocessing(fp32)
    rows = read_json(layout.sensitivity(name, "json"))
    widths = sorted({*UNIFORM} | {row["bits"] for row in rows if row["bits"] < HALF})
    calibration = load_calibration(name, study, model, preprocessing, observed=False)
    table, _ = quantized_table(model, calibration, settings, widths)
    divergence = divergence_from(model, table, calibration.images, DTYPES[settings.dtype])
    test = load_split(layout.split(name, "test"))
    front = Front(model, settings, rows, table, divergence, calibration, load_checkpoint(fp32), test, preprocessing)

    reference = front.logits(model)
    drawn = [{"series": "fp32", "label": "fp32", "size_mb": fp32.stat().st_size / 1e6} | accuracy(reference, test)]
    for point in front.points():
        row, logits = front.measure(*point)
        drawn.append(row | {"sqnr_db": sqnr_db(reference, logits)})
        print(f"{row['series']:<14} {row['label']:<9} {row['size_mb']:8.3f} MB  top-1 {row['top1']:.2f} %", flush=True)
    own = [compare(front, front.mean_bits(front.uniform(INT4)), "the size of uniform W4")]
    if settings.mean_bits is not None:
        own.append(compare(front, settings.mean_bits, f"{settings.mean_bits:g} bits a weight"))
    write_json(layout.budget_front(name, "json"), {"method": arguments.method, "rows": drawn, "comparison": own})
    plot_budget_front(layout.budget_front(name, "png"), name, drawn)
    for row in own:
        print(f"mixed_budget, {row['label']}: {row['size_mb']:.3f} MB, top-1 {row['top1']:.2f} %")
        for other in row["against"]:
            print(f"  {other['series']}, {other['size_mb']:.3f} MB: {other['top1']:.2f} %, p = {other['p']:.3g}")


if __name__ == "__main__":
    run_stage(main)
