"""The results of a study, one a variant, read from its metrics files in the order of `params.yaml`.

The variants come from the lists in `params.yaml` and never from the files that happen to lie there, so a removed
variant does not haunt a report.
"""

from dataclasses import dataclass
from typing import Any, Literal

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.params import BUDGET, Params

METRIC_KEYS = (
    "top1",
    "top5",
    "top1_ci95",
    "top1_drop",
    "top1_drop_p",
    "images",
    "agreement",
    "sqnr_db",
    "size_mb",
    "compression",
    "weight_bits",
    "layers_quantized",
    "layers_quantizable",
    "gmacs",
    "tbops",
    "latency_ms_b1",
    "latency_ms_b16",
    "speedup_b1",
    "speedup_b16",
    "kernel_real",
    "peak_memory_mb",
    "seed",
)
"""The keys of a metrics file, in the order of the tables."""

NEVER_NULL = ("top1", "top1_ci95", "images", "size_mb")
"""What no table or plot can do without."""

Group = Literal["baseline", "ptq", "outlier", "qat"]
Family = Literal["fp32", "16-bit float", "INT8", "INT8 clipped", "uniform INT4", "INT4 clipped", "mixed", "other"]


@dataclass(frozen=True)
class Result:
    """What one variant is and what was measured of it."""

    variant: str
    group: Group
    """`outlier` is a static method that says `clip_percentile`, if only null: a row of the outlier study."""
    family: Family
    """How the variant is drawn; a QAT method belongs to the family of its scheme."""
    kind: str
    widths: str
    """Bits of weights and activations, e.g. `4/8`; `8/-` leaves the activations in float32."""
    bits: int
    """Bits of the weights, the stored mean where each layer has its own: its place on the scaling law."""
    metrics: dict[str, float | None]
    details: dict[str, Any]

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
        """Whether its arithmetic runs in another type than the stated one, so that its latency says nothing."""
        return self.metrics["kernel_real"] == 0


def load_results(params: Params, study: str) -> list[Result]:
    """Read the metrics and details of every variant of `params`, in order.

    Raises:
        UserError: a metrics file is missing, is not JSON, or lacks a key.
    """
    return [_load(params, study, variant) for variant in params.variants]


def _load(params: Params, study: str, variant: str) -> Result:
    path = layout.metrics(study, variant)
    metrics = read_json(path)
    for key in METRIC_KEYS:
        if not isinstance(metrics, dict) or key not in metrics:
            raise UserError(f"{path}: has no key {key!r}; run evaluate for {variant} again")
        if key in NEVER_NULL and metrics[key] is None:
            raise UserError(f"{path}: {key} is null; run evaluate for {variant} again")
    details_path = layout.details(study, variant)
    details = read_json(details_path) if details_path.is_file() else {}
    if variant == "fp32":
        return Result(variant, "baseline", "fp32", "fp32", "32/32", 32, metrics, details)
    settings = params.method(variant)
    bits = round(metrics["weight_bits"] or 0) if settings.kind == BUDGET else weight_bits(settings)
    return Result(
        variant, _group(settings), _family(settings), settings.kind, _widths(settings), bits, metrics, details
    )


def weight_bits(settings: Any) -> int:
    """Return the bits of a method's weights: 16 for a cast, else its `weight_bits`."""
    return 16 if settings.kind in ("cast", "qat_cast") else int(settings.weight_bits)


def _group(settings: Any) -> Group:
    if settings.kind.startswith("qat"):
        return "qat"
    return "outlier" if "clip_percentile" in settings.model_fields_set else "ptq"


def _family(settings: Any) -> Family:
    if settings.kind in ("cast", "qat_cast"):
        return "16-bit float"
    if settings.kind.startswith("mixed"):
        return "mixed"
    clipped = _group(settings) == "outlier"
    if settings.weight_bits in (7, 8):
        return "INT8 clipped" if clipped else "INT8"
    if settings.weight_bits == 4:
        return "INT4 clipped" if clipped else "uniform INT4"
    return "other"


def _widths(settings: Any) -> str:
    if settings.kind in ("cast", "qat_cast"):
        return "16/16"
    if settings.kind == BUDGET:
        return "2-16/16"
    if settings.kind.startswith("mixed"):
        return f"{settings.weight_bits},16/16"
    if settings.kind == "weight_only":
        return f"{settings.weight_bits}/-"
    return f"{settings.weight_bits}/{settings.activation_bits}"
