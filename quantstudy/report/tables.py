"""The result tables of a study: JSON with the original study's names, CSV for DVC's plots, Markdown to read."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantstudy import layout
from quantstudy.files import write_json, write_text
from quantstudy.params import Params, Study
from quantstudy.report.results import METRIC_KEYS, Result

NOTHING = "–"  # noqa: RUF001 - an en dash, the typographic sign of an empty cell

FACTS = ("variant", "group", "family", "kind", "widths", "bits")
CSV_COLUMNS = (*FACTS, *METRIC_KEYS)

HEADER = (
    "variant",
    "W/A bits",
    "top-1 %",
    "drop (p)",
    "agreement %",
    "size MB",
    "× smaller",  # noqa: RUF001 - the multiplication sign
    "ms, batch 1",
    "ms, batch 16",
    "speed-up",
    "layers",
    "kernel",
)


def ptq_results_path(study: str, architecture: str) -> Path:
    """Return where the post-training results go: the original study names its MobileNet file differently."""
    mobilenet = "mobilenet_" if architecture.startswith("mobilenet") else ""
    return layout.report(study) / "tables" / f"ptq_results_{mobilenet}torchao_final.json"


def write_tables(params: Params, study: str, results: Sequence[Result]) -> str:
    """Write every table of `study` and return the Markdown one.

    Args:
        params: the params that `results` were read with.
        study: a row of `studies`.
        results: one a variant, fp32 first.
    """
    row, folder = params.study(study), layout.report(study)
    untrained = [result for result in results if result.group != "qat"]
    trained = [result for result in results if result.group in ("baseline", "qat")]
    write_json(ptq_results_path(study, row.model.architecture), [record(result) for result in untrained])
    write_json(folder / "tables" / "qat_finetune_results.json", [record(result) for result in trained])
    write_csv(folder / "results.csv", CSV_COLUMNS, map(record, results))
    write_csv(folder / "scaling_law.csv", SCALING_COLUMNS, scaling_law(params, results))
    text = markdown(results) + "\n" + note(study, row, results) + "\n"
    write_text(folder / "results.md", text)
    return text


def record(result: Result) -> dict[str, Any]:
    """Return a result as one flat row: what the variant is, then its metrics."""
    return {name: getattr(result, name) for name in FACTS} | {key: result[key] for key in METRIC_KEYS}


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` with a header of `columns`; null is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


SCALING_COLUMNS = ("training", "bits", "variant", "top1", "top1_ci95", "top1_low", "top1_high")


def scaling_law(params: Params, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the points of the scaling law: PTQ, then QAT, each from most to fewest bits.

    `top1_low` and `top1_high` are top-1 minus and plus the half-width of its 95 % interval, within 0 to 100.
    """
    by_name = {result.variant: result for result in results}
    rows = []
    for training, names in (("PTQ", params.scaling_law.ptq), ("QAT", params.scaling_law.qat)):
        points = sorted((by_name[name] for name in names), key=lambda result: -result.bits)
        for point in points:
            top1, half = point.value("top1"), point.value("top1_ci95")
            row = {"training": training, "bits": point.bits, "variant": point.variant, "top1": top1}
            row |= {"top1_ci95": half, "top1_low": max(0.0, top1 - half), "top1_high": min(100.0, top1 + half)}
            rows.append(row)
    return rows


def markdown(results: Sequence[Result]) -> str:
    """Return the Markdown table of `results`, its columns padded so that it reads well as plain text too."""
    return markdown_table([HEADER, *(_cells(result) for result in results)], words=2)


def p_value(p: float) -> str:
    """Return a p-value as the tables show it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def markdown_table(rows: Sequence[Sequence[str]], words: int) -> str:
    """Return a padded Markdown table, its header first; the columns after the first `words` are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width if column < words else "-" * (width - 1) + ":" for column, width in enumerate(widths))
    return "".join(f"| {line} |\n" for line in (lines[0], rule, *lines[1:]))


def _cells(result: Result) -> tuple[str, ...]:
    layers = [_number(result[key], 0) for key in ("layers_quantized", "layers_quantizable")]
    return (
        result.variant,
        result.widths.replace("-", NOTHING),
        f"{result.value('top1'):.2f} ± {result.value('top1_ci95'):.2f}",
        _drop(result),
        _number(result["agreement"], 1),
        _number(result["size_mb"], 2),
        _number(result["compression"], 2),
        _number(result["latency_ms_b1"], 2),
        _number(result["latency_ms_b16"], 2),
        _speedups(result),
        "/".join(layers),
        _kernel(result),
    )


def _kernel(result: Result) -> str:
    """Return real or simulated, with the layers that run on a real kernel where only some do."""
    if result["kernel_real"] is None:
        return NOTHING
    layers = result.details.get("kernel", {})
    real, total = layers.get("real", 0), layers.get("total", 0)
    share = f" ({real}/{total} real)" if 0 < real < total else ""
    return ("simulated" if result.simulated else "real") + share


def _drop(result: Result) -> str:
    drop, p = result["top1_drop"], result["top1_drop_p"]
    if result.group == "baseline" or drop is None:
        return NOTHING
    shown = f"{round(drop, 2) + 0.0:+.2f}"  # no negative zero
    if p is None:
        return shown
    return f"{shown} ({p_value(p)})"


def _speedups(result: Result) -> str:
    ratios = [result["speedup_b1"], result["speedup_b16"]]
    if all(ratio is None for ratio in ratios):
        return NOTHING
    return " / ".join(_number(ratio, 2) for ratio in ratios)


def _number(value: float | None, decimals: int) -> str:
    return NOTHING if value is None else f"{value:.{decimals}f}"


def note(study: str, row: Study, results: Sequence[Result]) -> str:
    """Return the paragraphs under the table: what was measured, on what, and how to read the columns."""
    images = int(results[0].value("images"))
    origin = row.data.dataset or row.data.path or row.data.source
    weights = row.model.weights or "none (random start)"
    machines = dict.fromkeys(result.details.get("machine", "a machine not recorded") for result in results)
    remarks = dict.fromkeys(remark for result in results for remark in result.details.get("remarks", []))
    measured = (
        f"`{study}`: {row.model.architecture} on {images} test images of {origin} at {row.data.image_size} px, "
        f"pretrained weights: {weights}, seed {row.seed}. Measured on {'; also on '.join(machines)}."
    )
    reading = (
        "± is half the 95 % Wilson interval. Drop is fp32's top-1 minus the variant's, in percentage points, with the "
        "exact McNemar p-value on the same images. Agreement: share of images predicted as fp32 predicts them. "
        "Speed-up is at batch 1 / batch 16 over fp32 timed alternately in the same process; none is stated for a "
        "simulated kernel, whose latency is the simulation's. Layers: those stored in fewer than 32 bits."
    )
    return "\n\n".join([measured, reading, *remarks])
