"""The tables of a study: what each variant is, what was measured, and what was not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.files import read_json, write_json
from quantstudy.measure.statistics import wilson_interval
from quantstudy.params import load_params
from quantstudy.report.front import plot_budget_front
from quantstudy.report.lines import plot_scaling_law
from quantstudy.report.markdown import NOTHING
from quantstudy.report.results import Result, load_results, pictures, remarks
from quantstudy.report.tables import markdown, note, scaling_law
from tests.conftest import Project
from tests.report.fabricate import fabricate


@pytest.fixture
def results(project) -> list[Result]:
    fabricate(load_params(), "tiny")
    return load_results(load_params(), "tiny")


def change(variant: str, **values: float | None) -> list[Result]:
    path = layout.metrics("tiny", variant)
    write_json(path, read_json(path) | values)
    return load_results(load_params(), "tiny")


def test_one_result_a_variant_in_the_order_of_the_params(results: list[Result]) -> None:
    params = load_params()
    assert [result.variant for result in results] == params.variants
    facts = {result.variant: (result.group, result.family, result.widths, result.bits) for result in results}
    assert facts["fp32"] == ("baseline", "fp32", "32/32", 32)
    assert facts["int8_weight_only"] == ("ptq", "INT8", "8/-", 8)
    assert facts["mixed_variance"] == ("ptq", "mixed", "4,16/16", 4)
    assert facts["clip_int4_p99"] == ("outlier", "INT4 clipped", "4/4", 4)
    assert facts["qat_int4"] == ("qat", "uniform INT4", "4/8", 4)
    assert facts["qat_fp16"] == ("qat", "16-bit float", "16/16", 16)
    rows = scaling_law(load_params(), results)
    points = [(training, bits) for training in ("PTQ", "QAT") for bits in (32, 16, 8, 4)]
    assert [(row["training"], row["bits"]) for row in rows] == points


@pytest.mark.parametrize(("correct", "images"), [(0, 3), (39, 40), (10, 10), (9_995, 10_000)])
def test_the_ends_of_an_interval_are_wilsons(results: list[Result], correct: int, images: int) -> None:
    low, high = wilson_interval(correct, images)
    found = change("fp32", top1=100 * correct / images, images=images, top1_ci95=(high - low) / 2)
    row = scaling_law(load_params(), found)[0]
    assert (row["top1_low"], row["top1_high"]) == pytest.approx((low, high))
    assert row["top1_low"] <= row["top1"] <= row["top1_high"]


@pytest.mark.parametrize(("correct", "images"), [(0, 3), (10, 10)])
def test_the_ends_of_no_and_of_all_images_can_be_drawn(
    results: list[Result], tmp_path: Path, correct: int, images: int
) -> None:
    found = change("fp32", top1=100 * correct / images, images=images)
    plot_scaling_law(tmp_path / "law.png", "tiny", scaling_law(load_params(), found))
    low, high = wilson_interval(correct, images)
    row = {"series": "uniform", "label": "W4", "size_mb": 1.0, "sqnr_db": 9.0}
    row |= {"top1": 100 * correct / images, "top1_low": low, "top1_high": high}
    plot_budget_front(tmp_path / "front.png", "tiny", [row])


@pytest.mark.parametrize("values", [{"top1": 100.5}, {"top1": -0.5}, {"images": 0}], ids=str)
def test_metrics_that_are_no_accuracy_are_one_line(results: list[Result], values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"fp32\.json: .* is no accuracy; run evaluate for fp32 again"):
        change("fp32", **values)


def cells(results: list[Result]) -> dict[str, list[str]]:
    """Return the rows of the Markdown table by variant."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(results).splitlines()]
    return {row[0]: row for row in rows}


def test_the_table_says_what_it_does_not_know(results: list[Result]) -> None:
    keys = ("latency_ms_b1", "latency_ms_b16", "speedup_b1", "speedup_b16", "kernel_real", "agreement", "top1_drop_p")
    row = cells(change("bf16", **dict.fromkeys(keys), top1_drop=-0.001))["bf16"]
    assert row[3:5] == ["+0.00", NOTHING] and row[7:10] == [NOTHING] * 3 and row[11] == NOTHING
    layout.details("tiny", "mixed_simple").write_text(json.dumps({"kernel": {"real": 3, "total": 11}}))
    layout.details("tiny", "mixed_variance").unlink()
    rows = cells(load_results(load_params(), "tiny"))
    kernels = [rows[name][-1] for name in ("int8_static", "int4_static", "mixed_simple", "mixed_variance")]
    assert kernels == ["real", "simulated", "simulated (3/11 real)", "simulated"]


def test_a_latency_of_a_busy_machine_says_so(results: list[Result]) -> None:
    path = layout.details("tiny", "int8_static")
    write_json(path, read_json(path) | {"busy": [16]})
    row = cells(change("int8_static", latency_ms_b1=1.5, latency_ms_b16=643.0, speedup_b1=2.0, speedup_b16=None))
    assert row["int8_static"][7:10] == ["1.50", "643.00 busy", f"2.00 / {NOTHING}"]
    assert row["int8_dynamic"][8].replace(".", "").isdecimal()


def test_pictures_of_an_older_fp32_model_are_told_apart(results: list[Result], project: Project) -> None:
    fp32 = results[0].metrics
    for name in ("scaling_law_plot", "sensitivity", "budget_front", "other"):
        (layout.report("tiny") / f"{name}.png").touch()
    row = {"series": "fp32", "size_mb": fp32["size_mb"], "top1": fp32["top1"]}

    def current() -> list[str]:
        found, older = pictures(load_params(), "tiny")
        assert len(found) + len(older) == 4
        return [path.stem for path in found]

    assert current() == ["scaling_law_plot"]
    project.edit("budget.studies", ["tiny"])
    for change in ({"top1": 9.0}, {"size_mb": 9.0}):
        write_json(layout.budget_front("tiny", "json"), {"rows": [row | change]})
        assert current() == ["scaling_law_plot", "sensitivity"]
    write_json(layout.budget_front("tiny", "json"), {"rows": [row]})
    assert current() == ["budget_front", "scaling_law_plot", "sensitivity"]


def test_what_a_technique_was_not_applied_to_is_one_remark(results: list[Result]) -> None:
    heavy = "more than 4,000,000 weights: rounded to nearest"
    layers = {f"features.{index}": "no normalization" for index in range(60)}
    for variant, skipped in {
        "int4_static": {"adaround": {"classifier.0": heavy}},
        "int8_static": {"adaround": {"classifier.0": heavy, "classifier.3": heavy}, "equalize": {"": "no pair"}},
        "bf16": {"bias_correction": layers},
    }.items():
        path = layout.details("tiny", variant)
        write_json(path, read_json(path) | {"skipped": skipped})
    results = load_results(load_params(), "tiny")
    assert len(remarks(results)) == 4
    found = {text.split()[0]: text for text in remarks(results)}
    assert all(word in found["adaround"] for word in ("classifier.0", "classifier.3", heavy, "int4_static"))
    assert "no pair" in found["equalize"] and "int8_static" in found["equalize"]
    assert "features.0" in found["bias_correction"] and "more layers" in found["bias_correction"]
    assert all(remark in note("tiny", load_params().study("tiny"), results) for remark in remarks(results))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_text('{"top1": 1.0}'), "has no key 'top5'; run evaluate for fp16 again"),
        (lambda path: path.write_text("[]"), "has no key 'top1'"),
        (lambda path: path.write_text(path.read_text().replace('"images": 10000', '"images": null')), "images is null"),
    ],
    ids=["missing", "truncated", "old keys", "no mapping", "null"],
)
def test_a_bad_metrics_file_is_named(results: list[Result], damage: Callable[[Path], object], message: str) -> None:
    path = layout.metrics("tiny", "fp16")
    damage(path)
    with pytest.raises(UserError) as error:
        load_results(load_params(), "tiny")
    assert message in str(error.value) and str(path) in str(error.value)
