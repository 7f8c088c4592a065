"""The result tables of a study: JSON with the original study's names, CSV for DVC's plots, Markdown to read."""

from collections.abc import Sequence
from typing import Any

from quantstudy import layout
from quantstudy.files import write_csv, write_json, write_text
from quantstudy.params import Params, Study
from quantstudy.report.markdown import NOTHING, latency, markdown_table, number, p_value, signed
from quantstudy.report.results import METRIC_KEYS, Result, remarks

FACTS = ("variant", "group", "family", "kind", "widths", "bits")
SCALING_COLUMNS = ("training", "bits", "variant", "top1", "top1_ci95", "top1_low", "top1_high")
HEADER = (
    *("variant", "W/A bits", "top-1 %", "drop (p)", "agreement %", "size MB", "× smaller"),  # noqa: RUF001
    *("ms, batch 1", "ms, batch 16", "speed-up", "layers", "kernel"),
)


def write_tables(params: Params, study: str, results: Sequence[Result]) -> str:
    """Write every table of `study` and return the Markdown table; `results` has one per variant, fp32 first."""
    row, folder = params.study(study), layout.report(study)
    untrained = [result for result in results if result.group != "qat"]
    trained = [result for result in results if result.group in ("baseline", "qat")]
    mobilenet = "mobilenet_" if row.model.architecture.startswith("mobilenet") else ""  # as the original study has it
    write_json(folder / "tables" / f"ptq_results_{mobilenet}torchao_final.json", list(map(record, untrained)))
    write_json(folder / "tables" / "qat_finetune_results.json", list(map(record, trained)))
    write_csv(folder / "results.csv", (*FACTS, *METRIC_KEYS), map(record, results))
    write_csv(folder / "scaling_law.csv", SCALING_COLUMNS, scaling_law(params, results))
    text = markdown(results) + "\n" + note(study, row, results) + "\n"
    write_text(folder / "results.md", text)
    return text


def record(result: Result) -> dict[str, Any]:
    """Return a result as one flat row: what the variant is, then its metrics."""
    return {name: getattr(result, name) for name in FACTS} | {key: result[key] for key in METRIC_KEYS}


def scaling_law(params: Params, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the points of the scaling law: PTQ, then QAT, each from most to fewest bits."""
    by_name = {result.variant: result for result in results}
    return [
        {"training": training, "bits": point.bits, "variant": point.variant} | point.interval
        for training, names in (("PTQ", params.scaling_law.ptq), ("QAT", params.scaling_law.qat))
        for point in sorted((by_name[name] for name in names), key=lambda result: -result.bits)
    ]


def markdown(results: Sequence[Result]) -> str:
    """Return the Markdown table of `results`, its columns padded so that it reads well as plain text too."""
    return markdown_table([HEADER, *(_cells(result) for result in results)], words=2)


def _cells(result: Result) -> tuple[str, ...]:
    speedups = [number(result[f"speedup_b{batch}"], 2) for batch in (1, 16)]
    return (
        result.variant,
        result.widths.replace("-", NOTHING),
        f"{result.value('top1'):.2f} ± {result.value('top1_ci95'):.2f}",
        _drop(result),
        number(result["agreement"], 1),
        *(number(result[key], 2) for key in ("size_mb", "compression")),
        *(latency(result[f"latency_ms_b{batch}"], batch in result.busy) for batch in (1, 16)),
        NOTHING if set(speedups) == {NOTHING} else " / ".join(speedups),
        f"{number(result['layers_quantized'], 0)}/{number(result['layers_quantizable'], 0)}",
        _kernel(result),
    )


def _kernel(result: Result) -> str:
    """Return `real` or `simulated`; if only some layers run on a real kernel, with their number."""
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
    return signed(drop) + ("" if p is None else f" ({p_value(p)})")


def facts(row: Study, results: Sequence[Result]) -> dict[str, str]:
    """Return the network, images and machine of a study, as names and values to read."""
    height, width = row.data.size
    size = height if height == width else f"{height} by {width}"
    origin = row.data.dataset or row.data.path or row.data.source
    machines = dict.fromkeys(result.details.get("machine", "a machine not recorded") for result in results)
    return {
        "Network": row.model.architecture,
        "Pretrained weights": row.model.weights or "none (random start)",
        "Images": f"{origin} at {size} px",
        "Test images": f"{results[0].value('images'):.0f}",
        "Calibration images": str(row.calibration.batches * row.calibration.batch_size),
        "Seed": str(row.seed),
        "Machine and versions": "; also ".join(machines),
    }


def note(study: str, row: Study, results: Sequence[Result]) -> str:
    """Return the paragraphs under the table: what was measured, on what, and how to read the columns."""
    known = facts(row, results)
    measured = (
        f"`{study}`: {known['Network']} on {known['Test images']} test images of {known['Images']}, "
        f"pretrained weights: {known['Pretrained weights']}, seed {known['Seed']}. "
        f"Measured on {known['Machine and versions']}."
    )
    reading = (
        "± is half the width of the 95 % Wilson interval. Drop is fp32's top-1 minus the variant's, in percentage "
        "points, with p of the exact McNemar test on the same images. Agreement is the share of images for which the "
        "variant predicts the class that fp32 predicts. Speed-up is fp32's time over the variant's, at batch 1 / "
        "batch 16, both timed in turns in one process; rows were timed at different moments, so do not divide their "
        "ms. A simulated kernel has no speed-up, since its ms is the simulation's, nor has a latency that is marked "
        "busy: other work, or a wide spread, made it unsure. Layers counts those stored in fewer than 32 bits."
    )
    return "\n\n".join([measured, reading, *remarks(results)])
