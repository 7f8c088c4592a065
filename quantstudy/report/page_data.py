"""What the HTML report shows of one study, as plain JSON: the `page` stage writes it, the `report` stage embeds it.

It also holds the predictions on every test image. So this file alone is enough to compare two variants, or one variant
of two revisions, on the same images.
"""

import base64
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantstudy import layout
from quantstudy.data.container import Split
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.measure.predictions import load_predictions
from quantstudy.measure.statistics import paired_drop_half_width
from quantstudy.methods.calibration import read_sensitivity
from quantstudy.params import Params, Static
from quantstudy.quantization.ranges import activation_range
from quantstudy.quantization.schemes import ActivationScheme
from quantstudy.report.histograms import as_array, load_histograms, rebin
from quantstudy.report.pareto import on_front, split_level
from quantstudy.report.results import Result, remarks
from quantstudy.report.tables import facts, record, scaling_law
from quantstudy.report.verdict import sentence

BINS = 64
"""The number of bins of a histogram on the page."""
COSTS = ("size_mb", "tbops", "latency_ms_b1", "latency_ms_b16")
"""The costs that are traded against accuracy."""
LAYER_COLUMNS = ("name", "weight", "activation", "real", "macs", "bytes", "sqnr_db")
FREE_TO_SHOW = ("digits",)
"""Sources whose images may be copied into a page: UCI's digits, CC BY 4.0."""

Row = dict[str, Any]


def page_data(params: Params, study: str, results: Sequence[Result], test: Split) -> Row:
    """Return everything that the page shows of `study`.

    `results` has one per variant of `params`, fp32 first; `test` is the split that the predictions are of.

    Raises:
        UserError: a file of predictions, the calibration or the outliers is missing or does not fit.
    """
    labels = test.labels.numpy()
    shape = len(labels), len(test.classes)
    predictions = {result.variant: load_predictions(study, result.variant, *shape) for result in results}
    has_sensitivity = layout.sensitivity(study, "json").is_file()
    return {
        "study": study,
        "facts": facts(params.study(study), results) | {"Classes": str(len(test.classes))},
        "remarks": remarks(results),
        "timing_spread": timing_spread(results),
        "weights_were_given": not params.study(study).training.epochs,
        "axis_floor": split_level([result.value("top1") for result in results]),
        "variants": variant_rows(results, predictions, labels, exported(params)),
        "ship": shipped(study) if study in params.ship else None,
        "scaling_law": scaling_law(params, results),
        "layers": {result.variant: layer_columns(result) for result in results},
        "inputs": layer_inputs(params, study, results),
        "sensitivity": [
            {key: row[key] for key in ("layer", "bits", "sqnr_db", "top1_drop")}
            for row in (read_sensitivity(study) if has_sensitivity else [])
        ],
        "sensitivity_is_of_this_run": study in params.budget.studies,
        "classes": list(test.classes),
        "labels": joined(labels),
        "predictions": {variant: joined(found) for variant, found in predictions.items()},
        "thumbnails": thumbnails(test) if params.study(study).data.source in FREE_TO_SHOW else None,
    }


def variant_rows(
    results: Sequence[Result],
    predictions: Mapping[str, NDArray[np.int16]],
    labels: NDArray[np.int64],
    exported: Collection[str] = (),
) -> list[Row]:
    """Return one row per variant: its metrics, intervals, sentences, settings, and the Pareto fronts that it is on."""
    right = {variant: found == labels for variant, found in predictions.items()}
    fronts = {f"front_{cost}": on_front(results, cost) for cost in COSTS}
    rows = []
    for result in results:
        drop_ci95 = 0.0 if result.variant == "fp32" else paired_drop_half_width(right["fp32"], right[result.variant])
        row = record(result) | result.interval | quartiles(result)
        row |= {name: result in front for name, front in fronts.items()}
        row |= {
            "simulated": result.simulated,
            "busy": result.busy,
            "drop_ci95": drop_ci95,
            "exported": result.variant in exported,
            "trained": result.group == "qat",
            "sentences": {size: sentence(result, drop_ci95, size) for size in (1, 16)},
            "settings": result.row.model_dump(exclude_none=True) if result.row else {},
            "runtime": result.details.get("runtime"),
            "kernel": result.details.get("kernel", {}),
        }
        row |= {f"speedup_b{size}": None for size in (1, 16) if not result.comparable(f"latency_ms_b{size}")}
        rows.append(row)
    return rows


def exported(params: Params) -> list[str]:
    """Return the variants that are written as ONNX files."""
    return ["fp32", *params.export.ptq, *params.export.budget, *params.export.qat]


def shipped(study: str) -> Row | None:
    """Return what the search of a study found; None if there was no search."""
    path = layout.search(study)
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or not {"sentence", "variant", "figures", "trials"} <= found.keys():
        raise UserError(f"{path}: not the end of a search; run the stage search again")
    return {key: found[key] for key in ("sentence", "variant", "figures", "trials")}


def quartiles(result: Result) -> dict[str, float | None]:
    """Return the lower and upper quartile of both latencies in ms, on the runtime that is reported."""
    name = f"{result.variant} {result.details.get('runtime')}"
    timings = {(row["executable"], row["batch_size"]): row for row in result.details.get("timings", [])}
    return {
        f"{key}_{end}": timings.get((name, size), {}).get(f"{quartile}_quartile_ms", result[key])
        for size, key in ((1, "latency_ms_b1"), (16, "latency_ms_b16"))
        for end, quartile in (("low", "lower"), ("high", "upper"))
    }


def timing_spread(results: Sequence[Result]) -> dict[str, float]:
    """Return by batch size how far apart fp32's own timings lie, as a share of their median; each variant has one.

    It is the distance of their quartiles, on the runtime where that is largest; 0 with fewer than four timings.
    """
    taken: dict[tuple[str, int], list[float]] = {}
    for timing in (timing for result in results for timing in result.details.get("timings", [])):
        if timing["executable"].startswith("fp32 ") and not timing.get("busy"):
            taken.setdefault((timing["executable"], timing["batch_size"]), []).append(timing["median_ms"])
    spread = {"1": 0.0, "16": 0.0}
    for (_, size), values in taken.items():
        if len(values) >= 4 and str(size) in spread:
            lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
            spread[str(size)] = max(spread[str(size)], significant((upper - lower) / middle))
    return spread


def layer_columns(result: Result) -> dict[str, list[Any]]:
    """Return the rows of a variant's layers column by column; a missing value is null.

    Equalization scales the channels between layers. Their difference from fp32 is then not noise, so the SQNR is left
    out.
    """
    rows = result.details.get("layers", [])
    columns = {column: [row.get(column) for row in rows] for column in LAYER_COLUMNS}
    if getattr(result.row, "equalize", False):
        columns["sqnr_db"] = [None] * len(rows)
    return columns


def layer_inputs(params: Params, study: str, results: Sequence[Result]) -> list[Row]:
    """Return the histogram of every layer's input, the percentiles of the outlier study, and where variants clip.

    `clips` has the range of every static post-training variant on these histograms. The other variants have ranges
    from training, from run time, or from an equalized network.
    """
    layers, _ = load_histograms(study)
    path = layout.activation_stats(study)
    found = read_json(path)
    outliers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(outliers, dict) or outliers.keys() != layers.keys():
        raise UserError(f"{path}: not of the layers of {layout.calibration(study)}; run outliers again")
    made = {result.variant: result.row for result in results if result.variant in params.ptq}
    static: dict[str, Any] = {name: row for name, row in made.items() if isinstance(row, Static) and not row.equalize}
    rows = []
    for name, layer in layers.items():
        edges, counts = rebin(as_array(layer["edges"]), as_array(layer["counts"]), BINS)
        row = {"layer": name, "edges": rounded(edges), "shares": rounded(counts / max(counts.sum(), 1.0))}
        row |= {key: outliers[name][key] for key in ("mean", "std", "kurtosis", "percentiles")}
        clips = {}
        for variant, method in static.items():
            scheme = ActivationScheme("static", method.activation_bits)
            clips[variant] = rounded(activation_range(layer, scheme, method.activation_range, method.clip_percentile))
        rows.append(row | {"clips": clips})
    return rows


def rounded(values: Iterable[float]) -> list[float]:
    """Return `values` with the digits that the page shows."""
    return [significant(value) for value in values]


def significant(value: float) -> float:
    """Return `value` with four significant digits: the page shows no more."""
    return float(f"{value:.4g}")


def joined(classes: NDArray[Any]) -> str:
    """Return class indices as one string, which is shorter than a list."""
    return " ".join(map(str, classes.tolist()))


def thumbnails(test: Split) -> Row:
    """Return the grey level of every pixel of the test images, base64 of uint8 [images, side, side]."""
    import torch

    grey = test.decode(torch.arange(len(test))).float().mean(1).round().to(torch.uint8)
    return {"side": grey.shape[-1], "grey": base64.b64encode(grey.numpy().tobytes()).decode()}
