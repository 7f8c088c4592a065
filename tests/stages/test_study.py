"""Every stage's `main` on a few dozen images, from the download to the plots."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from quantstudy import layout
from quantstudy.report.results import METRIC_KEYS
from quantstudy.runtimes.sessions import why_missing
from stages import (
    calibrate,
    diagnose,
    download,
    evaluate,
    export,
    finetune,
    outliers,
    page,
    plots,
    ptq,
    qat,
    report,
    sensitivity,
    trace,
)
from tests.conftest import Project

pytestmark = pytest.mark.slow

PTQ = ["fp16", "int8_dynamic", "int8_static", "int4_weight_only", "mixed_variance", "clip_int4_p99"]
LEARNED = {
    "qat_codes": {"kind": "qat_joint", "weight_bits": 6, "rounding": "gptq", "gain_correction": True, "epochs": 1},
}
QAT = ["qat_int4", "qat_fp16", *LEARNED]


@pytest.fixture
def trained(project: Project) -> Project:
    """The tiny study up to its calibration."""
    project.edit("ptq", PTQ)
    project.edit("qat", QAT)
    for name, row in LEARNED.items():
        project.edit(f"methods.{name}", row)
    project.edit("budget", {"studies": ["tiny"], "methods": ["mixed_budget"]})
    project.edit("sensitivity.bits", [2, 4, 8, 16])
    project.edit("export", {"ptq": ["int8_static"], "budget": [], "qat": ["qat_int4"]})
    project.edit("scaling_law", {"ptq": ["fp32", "int8_static"], "qat": ["fp32", "qat_int4"]})
    for stage in (download, finetune, calibrate):
        stage.main(["--study", "tiny"])
    return project


def test_the_whole_study(trained: Project) -> None:
    diagnose.main([])
    outliers.main(["--study", "tiny"])
    for method in PTQ:
        ptq.main(["--study", "tiny", "--method", method])
    sensitivity.main(["--study", "tiny"])
    ptq.main(["--study", "tiny", "--method", "mixed_budget"])
    for method in QAT:
        qat.main(["--study", "tiny", "--method", method])
    records = {}
    for variant in ["fp32", *PTQ, "mixed_budget", *QAT]:
        evaluate.main(["--study", "tiny", "--variant", variant])
        records[variant] = json.loads(layout.metrics("tiny", variant).read_text())
        assert set(records[variant]) == set(METRIC_KEYS)
        assert records[variant]["images"] == 48
        assert np.load(layout.predictions("tiny", variant)).dtype == np.int16
        found = layout.model("tiny", variant).stat().st_size
        assert records[variant]["size_mb"] == found / 1e6
    plots.main(["--study", "tiny"])
    page.main(["--study", "tiny"])
    report.main([])
    shown = json.loads(layout.page("tiny").read_text())
    assert len(shown["inputs"]) == len(shown["layers"]["int8_static"]["bytes"]) == 53 and layout.REPORT.is_file()
    last = {variant: shown["layers"][variant]["sqnr_db"][-1] for variant in [*PTQ, *QAT]}
    assert all(sqnr > 0 for sqnr in last.values()), last

    assert records["fp32"]["top1_drop"] == 0 and records["fp32"]["agreement"] == 100
    for variant in ("int8_static", "int8_dynamic", "int4_weight_only", "clip_int4_p99", "qat_int4", *LEARNED, "fp16"):
        assert records[variant]["layers_quantized"] == records[variant]["layers_quantizable"] == 53
    assert records["mixed_variance"]["layers_quantized"] == records["mixed_budget"]["layers_quantized"] == 53
    assert records["mixed_budget"]["weight_bits"] <= 4.0
    for record in records.values():
        if not record["kernel_real"]:
            assert record["speedup_b1"] is None and record["speedup_b16"] is None
    assert records["int4_weight_only"]["kernel_real"] == records["clip_int4_p99"]["kernel_real"] == 0
    assert not list(Path("models/tiny/resume").glob("*"))


def test_a_variant_is_made_and_measured_the_same_twice(trained: Project) -> None:
    ptq.main(["--study", "tiny", "--method", "int8_static"])
    evaluate.main(["--study", "tiny", "--variant", "fp32"])
    seen = []
    for _ in range(2):
        evaluate.main(["--study", "tiny", "--variant", "int8_static"])
        record = json.loads(layout.metrics("tiny", "int8_static").read_text())
        seen.append({key: record[key] for key in ("top1", "sqnr_db", "size_mb", "tbops", "agreement")})
    assert seen[0] == seen[1]
    ptq.main(["--study", "tiny", "--method", "int4_weight_only"])
    first = layout.model("tiny", "int4_weight_only").read_bytes()
    ptq.main(["--study", "tiny", "--method", "int4_weight_only"])
    assert layout.model("tiny", "int4_weight_only").read_bytes() == first


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
def test_a_variant_is_timed_on_every_runtime_and_exported(trained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(runtime: str) -> str | None:
        return "not installed: pip install '.[openvino]'" if runtime == "openvino" else None

    monkeypatch.setattr("quantstudy.runtimes.sessions.why_missing", missing)
    monkeypatch.setattr("quantstudy.measure.agreement.why_missing", missing)
    trained.edit("measure.runtimes", ["onnxruntime", "openvino"])
    ptq.main(["--study", "tiny", "--method", "int8_static"])
    trace.main(["--study", "tiny"])
    for variant in ("fp32", "int8_static"):
        evaluate.main(["--study", "tiny", "--variant", variant])
        export.main(["--study", "tiny", "--variant", variant])
    details = json.loads(layout.details("tiny", "int8_static").read_text())
    timed = {timing["executable"] for timing in details["timings"]}
    assert timed == {f"{variant} {name}" for variant in ("int8_static", "fp32") for name in ("eager", "onnxruntime")}
    assert details["agreement_with_eager"].keys() == {"eager", "onnxruntime"}
    assert details["exported"] == {"onnxruntime": "tuned for onnxruntime"}
    assert "pip install '.[openvino]'" in details["unavailable"]["int8_static openvino"]
    facts = json.loads(layout.onnx_report("tiny", "int8_static").read_text())
    assert facts["images"] == 48 and facts["exported"] == details["exported"]
    assert facts["agreement"]["onnxruntime"] > 80 and facts["agreement_as_exported"]["onnxruntime"] > 80
    assert facts["size_mb"] < 1.03 * facts["pth_size_mb"]
    assert "openvino" in facts["unavailable"]


def test_mistakes_are_one_line(project: Project) -> None:
    assert "study: 'tinny' is unknown (did you mean tiny?)" in project.failure(finetune.main, "--study", "tinny")
    assert "data/tiny/train.pt" in project.failure(finetune.main)
    assert "models/tiny/fp32.pth: no such file" in project.failure(calibrate_without_model)
    assert "method: 'int8_statc' is unknown" in project.failure(ptq.main, "--method", "int8_statc")
    assert "method: 'qat_int8' is unknown" in project.failure(ptq.main, "--method", "qat_int8")
    assert "method: 'fp16' is unknown" in project.failure(qat.main, "--method", "fp16")
    assert "variant: 'int9' is unknown" in project.failure(evaluate.main, "--variant", "int9")
    assert "variant: 'int9' is unknown" in project.failure(export.main, "--variant", "int9")
    assert "models/tiny/fp32.pth: no such file" in project.failure(export.main, "--variant", "fp32")
    project.edit("studies.tiny.model.architecture", "mobilenet")
    assert "studies.tiny.model.architecture: 'mobilenet' is unknown" in project.failure(finetune.main)


def calibrate_without_model(argv: list[str]) -> None:
    download.main(argv)
    calibrate.main(argv)


def test_a_budget_that_cannot_be_kept_is_one_line(trained: Project) -> None:
    trained.edit("methods.mixed_budget.mean_bits", 2.0)
    assert "reports/tiny/sensitivity.json: no such file" in trained.failure(ptq.main, "--method", "mixed_budget")
    sensitivity.main(["--study", "tiny"])
    line = trained.failure(ptq.main, "--method", "mixed_budget")
    found = re.search(r"methods.mixed_budget.mean_bits: 2 is too small; the smallest possible is ([\d.]+)$", line)
    assert found
    trained.edit("methods.mixed_budget.mean_bits", float(found[1]))
    ptq.main(["--study", "tiny", "--method", "mixed_budget"])
    trained.edit("budget.studies", [])
    assert "budget.studies: tiny is missing" in trained.failure(ptq.main, "--method", "mixed_budget")
