"""What the HTML report shows of one study, as plain JSON: the `page` stage writes it, the `report` stage embeds it.

It holds the predictions on every test image too, so that two variants, or the same variant of two revisions, can be
compared on the same images from this file alone.
"""

import base64
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantstudy import layout
from quantstudy.data.container import Split
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.measure.statistics import paired_drop_half_width
from quantstudy.network.checkpoint import load_tensors
from quantstudy.params import Params, Static
from quantstudy.quantization.ranges import activation_range
from quantstudy.quantization.schemes import ActivationScheme
from quantstudy.report.histograms import as_array, check_calibration, rebin
from quantstudy.report.pareto import pareto_front, split_level
from quantstudy.report.results import Result
from quantstudy.report.tables import record, scaling_law
from quantstudy.report.verdict import sentence

BINS = 64
"""Bins of a histogram on the page."""
COSTS = {"size_mb": False, "tbops": False, "latency_ms_b1": True, "latency_ms_b16": True}
"""What accuracy is traded for, each with whether a simulated kernel's figure says nothing about it."""
LAYER_COLUMNS = ("name", "weight", "activation", "real", "macs", "bytes", "sqnr_db")
FREE_TO_SHOW = ("digits",)
"""Sources whose images may be copied into a page: UCI's digits, CC BY 4.0."""

Row = dict[str, Any]


def page_data(params: Params, study: str, results: Sequence[Result], test: Split) -> Row:
    """Return everything that the page shows of `study`.

    Args:
        params: the params that `results` were read with.
        study: a row of `studies`.
        results: one a variant, fp32 first.
        test: the test split that the predictions are of.

    Raises:
        UserError: a file of predictions, the calibration or the outliers is missing or does not fit.
    """
    labels = test.labels.numpy()
    predictions = {result.variant: read_predictions(study, result.variant, len(labels)) for result in results}
    sensitivity = layout.sensitivity(study, "json")
    return {
        "study": study,
        "facts": facts(params, study, results, test),
        "remarks": list(dict.fromkeys(remark for result in results for remark in result.details.get("remarks", []))),
        "timing_spread": timing_spread(results),
        "axis_floor": split_level([result.value("top1") for result in results]),
        "variants": variant_rows(params, results, predictions, labels),
        "scaling_law": scaling_law(params, results),
        "layers": {result.variant: layer_columns(params, result) for result in results},
        "inputs": layer_inputs(params, study),
        "sensitivity": shown_sensitivity(read_json(sensitivity)) if sensitivity.is_file() else [],
        "sensitivity_is_of_this_run": study in params.budget.studies,
        "classes": list(test.classes),
        "labels": joined(labels),
        "predictions": {variant: joined(found) for variant, found in predictions.items()},
        "thumbnails": thumbnails(test) if params.study(study).data.source in FREE_TO_SHOW else None,
    }


def read_predictions(study: str, variant: str, images: int) -> NDArray[np.int16]:
    """Return the predicted classes of a variant, int16 [images]; raise `UserError` when they are of other images."""
    path = layout.predictions(study, variant)
    try:
        found: NDArray[np.int16] = np.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run evaluate for {variant} first") from None
    if found.shape != (images,):
        raise UserError(f"{path}: predictions of {len(found)} images, the test split has {images}; run evaluate again")
    return found


def facts(params: Params, study: str, results: Sequence[Result], test: Split) -> dict[str, str]:
    """Return what was run, on what, as names and values to read."""
    row = params.study(study)
    data, calibration = row.data, row.calibration
    machines = dict.fromkeys(result.details.get("machine", "not recorded") for result in results)
    return {
        "Network": row.model.architecture,
        "Pretrained weights": row.model.weights or "none (random start)",
        "Images": f"{data.dataset or data.path or data.source}, {len(test.classes)} classes, {data.image_size} px",
        "Test images": str(len(test)),
        "Calibration images": str(calibration.batches * calibration.batch_size),
        "Seed": str(row.seed),
        "Machine and versions": "; also ".join(machines),
    }


def variant_rows(
    params: Params,
    results: Sequence[Result],
    predictions: Mapping[str, NDArray[np.int16]],
    labels: NDArray[np.int64],
) -> list[Row]:
    """Return a row a variant: its metrics, intervals, sentences, settings, and the Pareto fronts that it is on."""
    right = {variant: found == labels for variant, found in predictions.items()}
    fronts = {cost: on_front(results, cost, real_only) for cost, real_only in COSTS.items()}
    rows = []
    for result in results:
        top1, half = result.value("top1"), result.value("top1_ci95")
        drop_ci95 = 0.0 if result.variant == "fp32" else paired_drop_half_width(right["fp32"], right[result.variant])
        row = record(result) | {
            "simulated": result.simulated,
            "top1_low": max(0.0, top1 - half),
            "top1_high": min(100.0, top1 + half),
            "drop_ci95": drop_ci95,
            "sentences": {size: sentence(result, drop_ci95, size) for size in (1, 16)},
            "settings": {} if result.variant == "fp32" else params.method(result.variant).model_dump(exclude_none=True),
            "runtime": result.details.get("runtime"),
            "kernel": result.details.get("kernel", {}),
        }
        row |= {f"front_{cost}": result.variant in names for cost, names in fronts.items()}
        row |= quartiles(result)
        if result.simulated:
            row |= {"speedup_b1": None, "speedup_b16": None}
        rows.append(row)
    return rows


def on_front(results: Sequence[Result], cost: str, real_only: bool) -> set[str]:
    """Return the variants that no other beats in both top-1 and `cost`."""
    points = {
        result.variant: (value, result.value("top1"))
        for result in results
        if (value := result[cost]) is not None and not (real_only and result.simulated)
    }
    front = set(pareto_front(list(points.values())))
    return {variant for variant, point in points.items() if point in front}


def quartiles(result: Result) -> dict[str, float | None]:
    """Return the lower and upper quartile of both latencies in ms, on the runtime that is reported."""
    name = f"{result.variant} {result.details.get('runtime')}"
    found: dict[str, float | None] = {}
    for size in (1, 16):
        timings = [
            timing
            for timing in result.details.get("timings", [])
            if timing["executable"] == name and timing["batch_size"] == size
        ]
        for end, key in (("low", "lower_quartile_ms"), ("high", "upper_quartile_ms")):
            found[f"latency_ms_b{size}_{end}"] = timings[0][key] if timings else result[f"latency_ms_b{size}"]
    return found


def timing_spread(results: Sequence[Result]) -> dict[str, float]:
    """Return, by batch size, how far apart fp32's own timings lie, one beside each variant: a share of their median.

    It is the distance of their quartiles, on the runtime where that is largest; 0 with fewer than four timings.
    """
    found: dict[str, dict[str, list[float]]] = {"1": {}, "16": {}}
    for result in results:
        for timing in result.details.get("timings", []):
            if timing["executable"].startswith("fp32 ") and (size := str(timing["batch_size"])) in found:
                found[size].setdefault(timing["executable"], []).append(timing["median_ms"])
    return {
        size: max((_spread(values) for values in of_runtimes.values() if len(values) >= 4), default=0.0)
        for size, of_runtimes in found.items()
    }


def _spread(values: Sequence[float]) -> float:
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return significant((upper - lower) / middle)


def layer_columns(params: Params, result: Result) -> dict[str, list[Any]]:
    """Return the rows of a variant's layers column by column; what was not taken is null.

    Equalization scales the channels between layers, which says nothing of their noise, so the SQNR is left out.
    """
    rows = result.details.get("layers", [])
    columns = {column: [row.get(column) for row in rows] for column in LAYER_COLUMNS}
    if result.variant != "fp32" and getattr(params.method(result.variant), "equalize", False):
        columns["sqnr_db"] = [None] * len(rows)
    return columns


def shown_sensitivity(rows: Sequence[Row]) -> list[Row]:
    """Return the columns of the rows of a sensitivity file that the page shows."""
    return [{key: row[key] for key in ("layer", "bits", "sqnr_db", "top1_drop")} for row in rows]


def layer_inputs(params: Params, study: str) -> list[Row]:
    """Return the histogram of every layer's input, the percentiles of the outlier study, and where variants clip.

    `clips` has the range of every static post-training variant on these histograms: training, run time and
    equalization make the others' ranges.
    """
    path = layout.calibration(study)
    layers = check_calibration(load_tensors(path), path)
    outliers = read_json(layout.activation_stats(study))["layers"]
    rows_of = {name: params.method(name) for name in params.ptq}
    static = {name: row for name, row in rows_of.items() if row.kind == "static" and not row.equalize}
    rows = []
    for name, layer in layers.items():
        edges, counts = rebin(as_array(layer["edges"]), as_array(layer["counts"]), BINS)
        rows.append(
            {
                "layer": name,
                "edges": [significant(edge) for edge in edges],
                "shares": [significant(share) for share in counts / max(counts.sum(), 1.0)],
                **{key: outliers[name][key] for key in ("mean", "std", "kurtosis", "percentiles")},
                "clips": {
                    variant: [significant(end) for end in static_range(layer, row)] for variant, row in static.items()
                },
            }
        )
    return rows


def static_range(layer: Mapping[str, Any], row: Static) -> tuple[float, float]:
    """Return where a static method clips a layer's input."""
    scheme = ActivationScheme("static", row.activation_bits)
    return activation_range(dict(layer), scheme, row.activation_range, row.clip_percentile)


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
    return {"side": test.side, "grey": base64.b64encode(grey.numpy().tobytes()).decode()}
