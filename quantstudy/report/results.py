"""The results of a study, one per variant, read from its metrics files in the order of `params.yaml`.

The variants come from the lists in `params.yaml`, never from the files that happen to exist. So a variant that you
remove from the lists does not stay in a report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.measure.statistics import wilson_interval
from quantstudy.params import METHOD_ROWS, MethodRow, Params

METRIC_KEYS = (
    *("top1", "top5", "top1_ci95", "top1_drop", "top1_drop_p", "images", "agreement", "sqnr_db"),
    *("size_mb", "compression", "weight_bits", "layers_quantized", "layers_quantizable", "gmacs", "tbops"),
    *("latency_ms_b1", "latency_ms_b16", "speedup_b1", "speedup_b16", "kernel_real", "peak_memory_mb", "seed"),
    *("validation_images", "validation_top1", "validation_drop", "validation_drop_ci95"),
)
"""The keys of a metrics file, in the order of the tables."""

NEVER_NULL = ("top1", "top1_ci95", "images", "size_mb")
"""The metrics that every table and plot needs."""

MOST_NAMES = 12
"""The number of layers that a remark names before it counts the rest; `details/<variant>.json` names all."""

PLOTS = ("scaling_law_plot", "accuracy_vs_size_plot", "accuracy_vs_latency_plot", "training_curves")
"""The pictures that the stage `plots` writes for each study."""

Group = Literal["baseline", "ptq", "outlier", "qat"]
Family = Literal["fp32", "16-bit float", "INT8", "INT8 clipped", "uniform INT4", "INT4 clipped", "mixed", "other"]


@dataclass(frozen=True)
class Result:
    """One variant and its measurements."""

    variant: str
    group: Group
    """`outlier` is a static method whose row sets `clip_percentile`, even to null: a row of the outlier study."""
    family: Family
    """How the variant is drawn; a method that trains belongs to the family of its scheme."""
    kind: str
    widths: str
    """Bits of weights and activations, e.g. `4/8`; `8/-` leaves the activations in float32."""
    bits: int
    """Bits of the weights: the variant's place on the scaling law. If the layers differ, the stored mean, rounded."""
    metrics: dict[str, float | None]
    details: dict[str, Any]
    row: MethodRow | None = None
    """The row of the method that made it; None for fp32."""

    def __getitem__(self, key: str) -> float | None:
        """Return a metric; None when it does not exist on this machine."""
        return self.metrics[key]

    def value(self, key: str) -> float:
        """Return a metric of `NEVER_NULL`."""
        found = self.metrics[key]
        assert found is not None
        return found

    @property
    def simulated(self) -> bool:
        """Whether its arithmetic runs in another type than the stated one; its latency then says nothing."""
        return self.metrics["kernel_real"] == 0

    @property
    def busy(self) -> list[int]:
        """The batch sizes that were timed while the machine was busy; their latency says nothing."""
        return self.details.get("busy", [])

    def comparable(self, key: str) -> bool:
        """Whether the metric `key` can be compared; a latency needs a real kernel and a machine that was not busy."""
        _, latency, size = key.partition("latency_ms_b")
        return not latency or not (self.simulated or int(size) in self.busy)

    @property
    def interval(self) -> dict[str, float]:
        """Top-1, half the width of its 95 % Wilson interval, and that interval's ends; top-1 is not its middle."""
        top1, images = self.value("top1"), round(self.value("images"))
        low, high = wilson_interval(round(top1 * images / 100), images)
        ends = {"top1_low": min(low, top1), "top1_high": max(high, top1)}  # at 0 and 100 % they may be rounded
        return {"top1": top1, "top1_ci95": self.value("top1_ci95")} | ends


def load_results(params: Params, study: str) -> list[Result]:
    """Read the metrics and details of every variant of `params`, in order.

    Raises:
        UserError: a metrics file is missing, is not JSON, or lacks a key.
    """
    return [_load(params, study, variant) for variant in params.variants]


def _load(params: Params, study: str, variant: str) -> Result:
    path, details = layout.metrics(study, variant), layout.details(study, variant)
    metrics = read_json(path)
    for key in METRIC_KEYS:
        if not isinstance(metrics, dict) or key not in metrics:
            raise UserError(f"{path}: has no key {key!r}; run evaluate for {variant} again")
        if not isinstance(metrics[key], int | float | None):
            raise UserError(f"{path}: {key} is {metrics[key]!r:.40}, no number; run evaluate for {variant} again")
        if key in NEVER_NULL and metrics[key] is None:
            raise UserError(f"{path}: {key} is null; run evaluate for {variant} again")
    top1, images = metrics["top1"], metrics["images"]
    if not (images >= 1 and 0 <= top1 <= 100):
        raise UserError(f"{path}: {top1:g} % of {images:g} images is no accuracy; run evaluate for {variant} again")
    measured = (metrics, read_json(details) if details.is_file() else {})
    if not isinstance(measured[1], dict) or measured[1].get("variant", variant) != variant:
        raise UserError(f"{details}: not the details of {variant}; run evaluate for it again")
    if variant == "fp32":
        return Result(variant, "baseline", "fp32", "fp32", "32/32", 32, *measured)
    row = _row(params, variant, measured[1].get("method"))
    bits = round(metrics["weight_bits"] or 0) if row.bits is None else row.bits
    group: Group = "qat" if row.trains else "outlier" if row.clips else "ptq"
    return Result(variant, group, _family(row, group), row.kind, row.widths, bits, *measured, row)


def _row(params: Params, variant: str, said: Any) -> MethodRow:
    """Return the row that made a variant, from its details or, without them, from the params."""
    if said is None:
        return params.method(variant)  # type: ignore[no-any-return]
    try:
        return METHOD_ROWS[said["kind"]].model_validate(said)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{variant}: its details name no method that there is; run evaluate for it again") from None


def _family(row: MethodRow, group: Group) -> Family:
    if row.is_mixed:
        return "mixed"
    if row.bits in (7, 8):
        return "INT8 clipped" if group == "outlier" else "INT8"
    if row.bits == 4:
        return "INT4 clipped" if group == "outlier" else "uniform INT4"
    return "16-bit float" if row.bits == 16 else "other"


def remarks(results: Sequence[Result]) -> list[str]:
    """Return what a reader must know besides the numbers: each remark once, then one per technique that was left out.

    `details["skipped"]` has the layers that a technique was not applied to, with the reason: technique -> layer -> why.
    """
    texts = dict.fromkeys(remark for result in results for remark in result.details.get("remarks", []))
    skipped: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for technique, layers in result.details.get("skipped", {}).items():
            for reason in dict.fromkeys(layers.values()):
                names = [name or "the whole network" for name in layers if layers[name] == reason]
                more = f" and {len(names) - MOST_NAMES} more layers" if len(names) > MOST_NAMES else ""
                what = f"{', '.join(names[:MOST_NAMES])}{more}: {reason}"
                skipped.setdefault(technique, {}).setdefault(what, []).append(result.variant)
    for technique, left in skipped.items():
        parts = (f"{what} ({', '.join(variants)})" for what, variants in left.items())
        texts[f"{technique} was not applied everywhere. " + "; ".join(parts) + "."] = None
    return list(texts)


def pictures(params: Params, study: str) -> tuple[list[Path], list[Path]]:
    """Return the pictures that show a study's present fp32 model, and those that an older model left behind."""
    current = {layout.report(study) / f"{name}.png" for name in PLOTS}
    if study in params.budget.studies:
        current.add(layout.sensitivity(study, "png"))
    front = layout.budget_front(study, "json")
    if front.is_file() and _is_of(read_json(front), read_json(layout.metrics(study, "fp32"))):
        current.add(layout.budget_front(study, "png"))
    found = sorted(layout.report(study).glob("*.png"))
    return [path for path in found if path in current], [path for path in found if path not in current]


def _is_of(front: dict[str, Any], fp32: dict[str, float]) -> bool:
    rows = (row for row in front["rows"] if row["series"] == "fp32")
    return any(all(math.isclose(row[key], fp32[key]) for key in ("top1", "size_mb")) for row in rows)
