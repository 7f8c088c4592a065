"""The real thing: a tiny `dvc repro` in a fresh copy, a second that runs nothing, a changed parameter."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, TINY

Run = Callable[..., str]
METHODS = {"ptq": ["int8_static", "int4_weight_only"], "qat": ["qat_int8"]}
BUDGET = ["mixed_budget"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the code, the DAG and one tiny study."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("quantstudy", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / file, root)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= METHODS | {"run": ["tiny"], "studies": {"tiny": TINY}}
    params["measure"].update(runtimes=[], seconds=0.05)
    params |= {"budget": {"studies": ["tiny"], "methods": BUDGET}}
    params["export"] = METHODS | {"budget": BUDGET}
    params["sensitivity"]["bits"] = [2, 4, 16]
    params["scaling_law"] = {"ptq": ["fp32", "int8_static"], "qat": ["fp32", "qat_int8"]}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def run(copy: Path) -> Run:
    """Run a command in the copy, with this interpreter's tools; return what it printed."""

    def call(*command: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    call("git", "init", "-q")
    call("git", "config", "user.email", "a@b")
    call("git", "config", "user.name", "a")
    call("dvc", "init", "-q")
    shutil.copytree(ROOT / ".dvc" / "plots", copy / ".dvc" / "plots")
    call("dvc", "config", "plots.html_template", "plots/page.html")
    return call


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="module")
def first(run: Run) -> set[str]:
    """The stages of the first `dvc repro`, committed to git."""
    stages = stages_run(run("dvc", "repro"))
    run("git", "add", "-A")
    run("git", "commit", "-qm", "first")
    return stages


def test_the_first_run_runs_every_cell(first: set[str]) -> None:
    expected = {"code", "diagnose", "report"}
    expected |= {
        f"{stage}@tiny"
        for stage in (
            *("download", "finetune", "calibrate", "outliers", "trace", "evaluate_fp32", "export_fp32", "plots"),
            *("sensitivity", "page"),
        )
    }
    for kind, methods in (METHODS | {"budget": BUDGET}).items():
        cells = (kind, f"evaluate_{kind}", f"export_{kind}")
        expected |= {f"{stage}@tiny-{method}" for stage in cells for method in methods}
    assert first == expected


def test_a_second_run_runs_nothing(first: set[str], run: Run) -> None:
    assert stages_run(run("dvc", "repro")) == set()
    assert "up to date" in run("dvc", "status")


def test_a_changed_parameter_runs_just_its_cells(first: set[str], run: Run, copy: Path) -> None:
    params = copy / "params.yaml"
    text = params.read_text()
    before, _, after = text.partition("int4_weight_only:\n    kind")
    params.write_text(before + "int4_weight_only:\n    kind" + after.replace("group_size: 32", "group_size: 64", 1))
    ran = stages_run(run("dvc", "repro"))
    cells = {f"{stage}@tiny-int4_weight_only" for stage in ("ptq", "evaluate_ptq", "export_ptq")}
    assert ran == cells | {"plots@tiny", "page@tiny", "report"}
    difference = run("dvc", "metrics", "diff")
    assert re.search(r"int4_weight_only\.json\s+size_mb", difference)
    assert not re.search(r"int8_static\.json", difference)


def test_compare_tells_what_the_parameter_changed(first: set[str], run: Run) -> None:
    report = run(sys.executable, "-m", "quantstudy", "compare", "HEAD")
    assert "- `methods.int4_weight_only.group_size`: 32 → 64" in report
    assert re.search(r"\| tiny +\| int4_weight_only \|", report) and not re.search(r"\| int8_static +\|", report)
    assert "exact McNemar test on the same 48 test images" in report


@pytest.mark.parametrize("command", [("show",), ("diff", "HEAD")], ids=["show", "diff"])
def test_the_page_of_plots_needs_no_network(first: set[str], run: Run, copy: Path, command: tuple[str, ...]) -> None:
    run("dvc", "plots", *command, "-o", "page")
    page = (copy / "page" / "index.html").read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?http""", page)
    assert (
        "window.vegaEmbed=" in page and page.count("vegaEmbed('#") == 5
    )  # two curves, trade-off, scaling law, sensitivity
    for title in ("tiny, fp32", "tiny, qat_int8", "tiny, accuracy against size and latency", "tiny, scaling law"):
        assert f'"text": "{title}"' in page
    assert "hist_features" in page


def test_a_changed_module_runs_just_the_stages_that_import_it(first: set[str], run: Run, copy: Path) -> None:
    module = copy / "quantstudy" / "report" / "labels.py"
    module.write_text(module.read_text() + "\n# changed\n")
    assert stages_run(run("dvc", "repro")) == {"code", "plots@tiny"}


def test_an_experiment_changes_a_parameter(first: set[str], run: Run) -> None:
    output = run("dvc", "exp", "run", "-S", "methods.int4_weight_only.group_size=128")
    assert "ptq@tiny-int4_weight_only" in stages_run(output)
