import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantstudy import layout
from quantstudy.params import load_params
from quantstudy.report.results import METRIC_KEYS, Result, load_results
from quantstudy.report.tables import markdown, ptq_results_path, record, scaling_law
from tests.report.fabricate import fabricate


@pytest.fixture
def results(project) -> list[Result]:
    fabricate(load_params(), "tiny")
    return load_results(load_params(), "tiny")


def change(variant: str, **values: float | None) -> list[Result]:
    path = layout.metrics("tiny", variant)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return load_results(load_params(), "tiny")


def test_one_result_a_variant_in_the_order_of_the_params(results: list[Result]) -> None:
    params = load_params()
    assert [result.variant for result in results] == params.variants
    facts = {result.variant: (result.group, result.family, result.widths, result.bits) for result in results}
    assert facts["fp32"] == ("baseline", "fp32", "32/32", 32)
    assert facts["bf16"] == ("ptq", "16-bit float", "16/16", 16)
    assert facts["int8_weight_only"] == ("ptq", "INT8", "8/-", 8)
    assert facts["int4_static"] == ("ptq", "uniform INT4", "4/8", 4)
    assert facts["mixed_variance"] == ("ptq", "mixed", "4,16/16", 4)
    assert facts["clip_int8"] == ("outlier", "INT8 clipped", "8/8", 8)
    assert facts["clip_int4_p99"] == ("outlier", "INT4 clipped", "4/4", 4)
    assert facts["qat_int4"] == ("qat", "uniform INT4", "4/8", 4)
    assert facts["qat_fp16"] == ("qat", "16-bit float", "16/16", 16)


def test_a_record_is_flat_and_complete(results: list[Result]) -> None:
    for result in results:
        row = record(result)
        assert set(METRIC_KEYS) < set(row)
        assert all(isinstance(value, str | int | float | None) for value in row.values())


def test_the_table_says_what_it_does_not_know(results: list[Result]) -> None:
    nothing = dict.fromkeys(
        ("latency_ms_b1", "latency_ms_b16", "speedup_b1", "speedup_b16", "kernel_real", "agreement", "top1_drop_p")
    )
    lines = markdown(change("bf16", **nothing, top1_drop=-0.001)).splitlines()
    (line,) = (line for line in lines if line.startswith("| bf16 "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    dash = "\u2013"
    assert cells[3:5] == ["+0.00", dash] and cells[7:10] == [dash] * 3 and cells[11] == dash
    assert len({len(line) for line in lines}) == 1


def test_simulated_kernels_are_marked(results: list[Result]) -> None:
    lines = {line.split("|")[1].strip(): line for line in markdown(results).splitlines()}
    assert lines["int4_static"].rstrip(" |").endswith("simulated") and lines["int8_static"].rstrip(" |").endswith(
        "real"
    )


def test_a_partly_real_kernel_says_so(results: list[Result]) -> None:
    layout.details("tiny", "mixed_simple").write_text(json.dumps({"kernel": {"real": 3, "total": 11}}))
    assert "| simulated (3/11 real) |" in markdown(load_results(load_params(), "tiny"))
    layout.details("tiny", "mixed_simple").unlink()
    assert "real)" not in markdown(load_results(load_params(), "tiny"))


def test_scaling_law_goes_from_many_bits_to_few(results: list[Result]) -> None:
    rows = scaling_law(load_params(), change("fp32", top1=99.9, top1_ci95=0.5))
    assert [(row["training"], row["bits"]) for row in rows] == [
        (training, bits) for training in ("PTQ", "QAT") for bits in (32, 16, 8, 4)
    ]
    assert (rows[0]["top1_low"], rows[0]["top1_high"]) == (99.4, 100.0)


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
    from quantstudy.errors import UserError

    path = layout.metrics("tiny", "fp16")
    damage(path)
    with pytest.raises(UserError) as error:
        load_results(load_params(), "tiny")
    assert message in str(error.value) and str(path) in str(error.value)


def test_names_of_the_original_study() -> None:
    assert ptq_results_path("a", "vgg11").name == "ptq_results_torchao_final.json"
    assert ptq_results_path("a", "mobilenet_v2").name == "ptq_results_mobilenet_torchao_final.json"
