"""The plots stage on made-up metrics: what it writes, that it writes it again, and what it refuses."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantstudy import layout
from quantstudy.files import read_json, write_json
from quantstudy.params import load_params
from stages import page, plots, report
from tests.conftest import Project
from tests.report.fabricate import fabricate
from tests.report.fabricate_page import fabricate_page

FOLDER = Path("reports/tiny")
PLOTS = ["accuracy_vs_latency_plot", "accuracy_vs_size_plot", "scaling_law_plot", "training_curves"]
TABLES = ["tables/ptq_results_mobilenet_torchao_final.json", "tables/qat_finetune_results.json"]
TABLES += ["results.csv", "results.md"]
WRITTEN = sorted([*(f"{name}.png" for name in PLOTS), *TABLES, "scaling_law.csv"])


@pytest.fixture
def study(project):
    fabricate(load_params(), "tiny")
    return project


def outputs() -> dict[str, bytes]:
    files = [*FOLDER.iterdir(), *(FOLDER / "tables").iterdir()]
    return {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in sorted(files) if path.is_file()}


def test_writes_every_table_and_plot_and_the_same_again(study, capsys: pytest.CaptureFixture[str]) -> None:
    plots.main(["--study", "tiny"])
    first = outputs()
    assert sorted(first) == WRITTEN
    printed = capsys.readouterr().out
    assert first["results.md"].decode() in printed and "10000 test images of digits at 32 px" in printed
    plots.main(["--study", "tiny"])
    assert outputs() == first
    with (FOLDER / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == load_params().variants
    assert next(row for row in rows if row["variant"] == "int4_static")["speedup_b1"] == ""
    names = [[row["variant"] for row in json.loads(first[table])] for table in TABLES[:2]]
    assert names == [["fp32", *load_params().ptq], ["fp32", *load_params().qat]]


def test_a_removed_variant_is_in_no_output_and_nothing_need_be_timed(study) -> None:
    study.edit("export.ptq", ["int8_static", "int4_static"])
    study.edit("ptq", ["fp16", "int8_static", "int4_static"])
    plots.main(["--study", "tiny"])
    assert layout.metrics("tiny", "clip_int4").is_file()
    text = "".join(outputs()[name].decode() for name in (*TABLES, "scaling_law.csv"))
    assert "int4_static" in text and "clip_int4" not in text and "mixed" not in text
    for variant in load_params().variants:
        path = layout.metrics("tiny", variant)
        untimed = dict.fromkeys(("latency_ms_b1", "latency_ms_b16", "speedup_b1", "speedup_b16"))
        write_json(path, read_json(path) | untimed)
    plots.main(["--study", "tiny"])
    assert sorted(outputs()) == WRITTEN


@pytest.mark.parametrize(
    ("ptq", "qat"),
    [(["int8_static", "fp16"], []), ([], ["qat_int8"]), ([], [])],
    ids=["without training", "only with training", "fp32 alone"],
)
def test_a_study_may_have_no_method_of_a_kind(project: Project, ptq: list[str], qat: list[str]) -> None:
    for key, value in {"ptq": ptq, "qat": qat, "scaling_law": {"ptq": ptq, "qat": qat}}.items():
        project.edit(key, value)
    project.edit("export", {"ptq": [], "budget": [], "qat": []})
    fabricate_page(load_params(), "tiny")
    plots.main(["--study", "tiny"])
    assert set(WRITTEN) <= set(outputs())
    page.main(["--study", "tiny"])
    report.main([])
    shown = read_json(layout.page("tiny"))
    assert [row["variant"] for row in shown["variants"]] == ["fp32", *ptq, *qat]
    assert len(shown["scaling_law"]) == len(ptq) + len(qat) and layout.REPORT.is_file()


@pytest.mark.parametrize("missing", [layout.metrics("tiny", "qat_int8"), layout.curve("tiny", "qat_bf16")], ids=str)
def test_a_missing_input_is_one_line(study, missing: Path) -> None:
    missing.unlink()
    assert f"{missing}: no such file" in study.failure(plots.main)
    assert not (FOLDER / "results.md").exists()


def test_a_broken_curve_is_one_line(study) -> None:
    layout.curve("tiny", "finetune").write_text("epoch,train_loss\n1,nonsense\n")
    assert "finetune.csv: not a training curve" in study.failure(plots.main)
    assert "did you mean tiny?" in study.failure(plots.main, "--study", "tinny")


def test_needs_no_torch() -> None:
    code = "import sys, stages.plots; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
