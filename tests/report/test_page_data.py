"""The data of the HTML report: computed from the study's files, honest about what was not measured."""

import json

import numpy as np
import pytest

from quantstudy import layout
from quantstudy.files import read_json
from quantstudy.params import load_params
from quantstudy.report.page_data import significant, timing_spread
from quantstudy.report.results import load_results
from quantstudy.report.verdict import sentence
from stages import page, report
from tests.conftest import TINY, Project
from tests.report.fabricate_page import IMAGES, LAYERS, fabricate_page, sensitivity_rows


@pytest.fixture
def study(project: Project) -> Project:
    fabricate_page(load_params(), "tiny")
    return project


def written() -> dict:
    page.main(["--study", "tiny"])
    return read_json(layout.page("tiny"))


def test_it_has_every_variant_of_the_params_and_no_other(study: Project) -> None:
    assert [row["variant"] for row in written()["variants"]] == load_params().variants
    study.edit("export.ptq", ["int8_static"])
    study.edit("ptq", ["fp16", "int8_static", "int4_static"])
    data = written()
    names = ["fp32", "fp16", "int8_static", "int4_static", *load_params().qat]
    assert [row["variant"] for row in data["variants"]] == names
    assert list(data["predictions"]) == list(data["layers"]) == names
    assert "clip" not in layout.page("tiny").read_text().replace('"clips"', "").replace("clip_percentile", "")
    for variant, text in data["predictions"].items():
        assert text.split() == [str(found) for found in np.load(layout.predictions("tiny", variant))]
    assert len(data["labels"].split()) == IMAGES and data["thumbnails"]["side"] == 8
    study.edit("studies.tiny.data", TINY["data"] | {"source": "torchvision", "dataset": "Food101"})
    assert written()["thumbnails"] is None


def test_a_simulated_kernel_gets_no_speed_up_and_no_place_on_a_latency_front(study: Project) -> None:
    path = layout.metrics("tiny", "int4_static")
    lying = read_json(path) | {"kernel_real": 0, "speedup_b1": 9.0, "speedup_b16": 9.0}
    path.write_text(json.dumps(lying | {"latency_ms_b1": 1e-3, "latency_ms_b16": 1e-3, "top1": 99.0}))
    row = next(row for row in written()["variants"] if row["variant"] == "int4_static")
    assert row["speedup_b1"] is None and row["speedup_b16"] is None and row["simulated"]
    assert not row["front_latency_ms_b1"] and not row["front_latency_ms_b16"] and row["front_size_mb"]
    assert "no speed-up stated" in row["sentences"]["16"] and "faster" not in row["sentences"]["16"]


def test_a_latency_of_a_busy_machine_counts_for_nothing(study: Project) -> None:
    path = layout.details("tiny", "int8_static")
    path.write_text(json.dumps(read_json(path) | {"busy": [16]}))
    path = layout.metrics("tiny", "int8_static")
    best = {"latency_ms_b1": 1e-3, "latency_ms_b16": 1e-3, "speedup_b1": 9.0, "speedup_b16": 9.0, "top1": 99.0}
    path.write_text(json.dumps(read_json(path) | best))
    row = next(row for row in written()["variants"] if row["variant"] == "int8_static")
    assert (row["busy"], row["speedup_b1"], row["speedup_b16"]) == ([16], 9.0, None)
    assert row["front_latency_ms_b1"] and not row["front_latency_ms_b16"]
    assert "the machine was busy" in row["sentences"]["16"] and "9.0× faster" in row["sentences"]["1"]  # noqa: RUF001


def test_layers_have_their_facts_and_inputs_their_clips_and_sensitivity_is_shown(study: Project) -> None:
    data = written()
    assert data["layers"]["int8_static"]["name"] == list(LAYERS)
    assert data["layers"]["int8_static"]["bytes"] == [800] * 3 and data["layers"]["fp32"]["sqnr_db"] == [None] * 3
    first = data["inputs"][0]
    assert sum(first["shares"]) == pytest.approx(1, abs=1e-3) and len(first["edges"]) == len(first["shares"]) + 1
    assert first["clips"]["int8_static"] == [-3.0, 3.0]
    reported = [first["percentiles"]["99"][end] for end in ("low", "high")]
    assert reported[0] > -3 and first["clips"]["clip_int8_p99"] == pytest.approx(reported, rel=1e-3)
    assert "int8_dynamic" not in first["clips"] and "qat_int8" not in first["clips"]
    assert written()["sensitivity"] == []
    layout.sensitivity("tiny", "json").write_text(json.dumps(sensitivity_rows()))
    assert written()["sensitivity"] == sensitivity_rows() and not written()["sensitivity_is_of_this_run"]
    study.edit("budget", {"studies": ["tiny"], "methods": []})
    assert written()["sensitivity_is_of_this_run"]
    study.edit("methods.int8_static.equalize", True)
    data = written()
    assert [data["layers"][name]["sqnr_db"][0] for name in ("int8_static", "int8_dynamic")] == [None, 32.0]
    assert "int8_static" not in data["inputs"][0]["clips"] and "clip_int8" in data["inputs"][0]["clips"]


def test_the_spread_of_timings_is_that_of_the_same_model_beside_each_variant(study: Project) -> None:
    results = load_results(load_params(), "tiny")
    for number, result in enumerate(results[:5]):
        times = {"fp32 eager": 10.0 + number, f"{result.variant} eager": 7.0, "fp32 inductor": 5.0}
        rows = [{"executable": name, "batch_size": 16, "median_ms": ms} for name, ms in times.items()]
        result.details["timings"] = rows
    for result in results[5:]:
        result.details["timings"] = []
    assert timing_spread(results) == {"1": 0.0, "16": significant(2 / 12)}
    np.save(layout.predictions("tiny", "fp16"), np.zeros(3, np.int16))
    assert "predictions of 3 images, the test split has 60" in study.failure(page.main)
    layout.predictions("tiny", "fp16").unlink()
    assert "run evaluate for fp16 first" in study.failure(page.main)


def test_the_sentence_never_turns_a_ratio_around(study: Project) -> None:
    result = next(row for row in load_results(load_params(), "tiny") if row.variant == "int8_static")
    result.metrics.update(compression=3.98, speedup_b16=3.14, speedup_b1=0.5, top1_drop=0.051, kernel_real=1)
    quick, slow = sentence(result, 0.4, 16), sentence(result, 0.4, 1)
    assert "3.98× smaller" in quick and "3.1× faster" in quick and "no measurable loss (+0.05 ± 0.40 points)" in quick  # noqa: RUF001
    assert "2.0× slower" in slow  # noqa: RUF001
    result.metrics.update(speedup_b16=1.02, top1_drop=-0.2, compression=0.5)
    even = sentence(result, 0.4, 16)
    assert "2.00× larger" in even and "as fast" in even and "no measurable loss (-0.20 ± 0.40 points)" in even  # noqa: RUF001
    assert "0.20 ± 0.10 points gained" in sentence(result, 0.1, 16)
    result.metrics.update(top1_drop=0.3)
    assert "0.30 ± 0.10 points lost" in sentence(result, 0.1, 16)
    result.metrics.update(speedup_b16=None)
    assert "not timed" in sentence(result, 0.4, 16)


def test_the_page_needs_no_network_and_no_text_ends_a_script_early(study: Project) -> None:
    page.main(["--study", "tiny"])
    data = read_json(layout.page("tiny"))
    data["facts"]["Network"] = "</script><b>"
    layout.page("tiny").write_text(json.dumps(data))
    report.main([])
    html = layout.REPORT.read_text()
    assert "</script><b>" not in html and html.count("</script>") == 3
    assert ' src="' not in html.partition("<script>")[0] and '<link rel="stylesheet' not in html
    assert layout.REPORT.stat().st_size < 3e6
