"""The real thing: a tiny `dvc repro` in a fresh copy, a second that runs nothing, changed params and changed code."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quantstudy.network.source_code import transitive_imports
from tests.conftest import ROOT
from tests.params import FEW, TINY_PARAMS

pytestmark = pytest.mark.slow

Run = Callable[..., str]
DVC = (sys.executable, "-m", "tools.dvc")
REPRO = (sys.executable, "-m", "tools.warm", *DVC, "repro")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the code, the DAG and one tiny study."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("quantstudy", "stages", "tools"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dvc.yaml", "code.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / file, root)
    (root / "params.yaml").write_text(yaml.safe_dump(TINY_PARAMS | FEW, sort_keys=False))
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
    call(*DVC, "init", "-q")
    shutil.copytree(ROOT / ".dvc" / "plots", copy / ".dvc" / "plots")
    call(*DVC, "config", "plots.html_template", "plots/page.html")
    call("git", "add", "-A")
    return call


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def stale(status: str) -> set[str]:
    """Return the stages that `dvc status` names."""
    return set(re.findall(r"^(\w[^\s]*):$", status, re.MULTILINE))


@pytest.fixture(scope="module")
def first(run: Run) -> set[str]:
    """The stages of the first `dvc repro`, committed to git."""
    stages = stages_run(run(*REPRO))
    run("git", "add", "-A")
    run("git", "commit", "-qm", "first")
    return stages


def test_the_first_run_runs_every_cell_and_a_second_nothing(first: set[str], run: Run) -> None:
    once = ("download", "finetune", "calibrate", "outliers", "trace", "evaluate_fp32", "export_fp32", "plots")
    expected = {"report", *(f"{stage}@tiny" for stage in (*once, "sensitivity", "page"))}
    for kind, methods in (("ptq", FEW["ptq"]), ("qat", FEW["qat"]), ("budget", FEW["budget"]["methods"])):
        cells = (kind, f"evaluate_{kind}", f"export_{kind}")
        expected |= {f"{stage}@tiny-{method}" for stage in cells for method in methods}
    assert first == expected
    variants = ["fp32", *FEW["ptq"], *FEW["qat"], *FEW["budget"]["methods"]]
    shown = ["results.md", "accuracy_vs_size_plot.png", "sensitivity.json", "sensitivity.png"]
    expected = {f"reports/tiny/{name}" for name in [*shown, *(f"metrics/{variant}.json" for variant in variants)]}
    assert set(run("git", "ls-files", "reports", "models", "data").split()) == expected
    assert stages_run(run(*REPRO)) == set()
    assert "Data and pipelines are up to date." in run(*DVC, "status")
    assert run("git", "status", "--short") == ""


def test_comments_and_docstrings_change_nothing(first: set[str], run: Run, copy: Path) -> None:
    module = copy / "quantstudy" / "methods" / "gptq.py"
    text = module.read_text()
    module.write_text(text.replace('"""', '"""One more word. ', 1) + "\n# a comment\n")
    found = run(*DVC, "status")
    module.write_text(text)
    assert "Data and pipelines are up to date." in found


@pytest.mark.parametrize("name", ["methods/gptq.py", "report/heatmap.py", "report/page/main.js"])
def test_a_changed_line_makes_just_its_stages_stale(first: set[str], run: Run, copy: Path, name: str) -> None:
    changed = copy / "quantstudy" / name
    reader = Path("quantstudy/report/html.py") if name.endswith(".js") else changed.relative_to(copy)
    scripts = {path.stem for path in copy.glob("stages/[!_]*.py")}
    running = {name for name in scripts if reader in transitive_imports(Path("stages") / f"{name}.py", copy)}
    commands = yaml.safe_load((copy / "dvc.yaml").read_text())["stages"]
    expected = {stage for stage in first if commands[stage.partition("@")[0]]["cmd"].split()[3] in running}
    text = changed.read_text()
    changed.write_text(text + "\nA = 1\n")
    found = stale(run(*DVC, "status"))
    changed.write_text(text)
    assert found == expected != set()
    assert "Data and pipelines are up to date." in run(*DVC, "status")


def test_a_changed_parameter_runs_just_its_cells_and_is_compared(first: set[str], run: Run, copy: Path) -> None:
    params = copy / "params.yaml"
    values = yaml.safe_load(params.read_text())
    values["methods"]["int4_weight_only"]["group_size"] = 64
    params.write_text(yaml.safe_dump(values, sort_keys=False))
    ran = stages_run(run(*REPRO))
    cells = {f"{stage}@tiny-int4_weight_only" for stage in ("ptq", "evaluate_ptq", "export_ptq")}
    assert ran == cells | {"plots@tiny", "page@tiny", "report"}
    difference = run(*DVC, "metrics", "diff")
    assert re.search(r"int4_weight_only\.json\s+size_mb", difference)
    assert not re.search(r"int8_static\.json", difference)
    report = run(sys.executable, "-m", "quantstudy", "compare", "HEAD")
    assert "- `methods.int4_weight_only.group_size`: 32 → 64" in report
    assert re.search(r"\| tiny +\| int4_weight_only \|", report) and not re.search(r"\| int8_static +\|", report)
    assert "exact McNemar test on the same 48 test images" in report


@pytest.mark.parametrize("command", [("show",), ("diff", "HEAD")], ids=["show", "diff"])
def test_the_page_of_plots_needs_no_network(first: set[str], run: Run, copy: Path, command: tuple[str, ...]) -> None:
    run(*DVC, "plots", *command, "-o", "page")
    page = (copy / "page" / "index.html").read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?http""", page)
    assert "window.vegaEmbed=" in page
    assert page.count("vegaEmbed('#") == 5  # two curves, trade-off, scaling law, sensitivity
    for title in ("tiny, fp32", "tiny, qat_int8", "tiny, accuracy against size and latency", "tiny, scaling law"):
        assert f'"text": "{title}"' in page
    assert "hist_features" in page


def test_an_experiment_changes_a_parameter(first: set[str], run: Run) -> None:
    output = run(*DVC, "exp", "run", "-S", "methods.int4_weight_only.group_size=128")
    assert "ptq@tiny-int4_weight_only" in stages_run(output)


NONE = {"ptq": [], "qat": [], "budget": {"studies": [], "methods": []}, "export": {"ptq": [], "budget": [], "qat": []}}


@pytest.mark.parametrize(("kind", "method"), [("ptq", "int8_static"), ("qat", "qat_int8")])
def test_one_kind_of_method_without_exports(first: set[str], run: Run, copy: Path, kind: str, method: str) -> None:
    law = {"scaling_law": {"ptq": ["fp32"], "qat": []} | {kind: ["fp32", method]}}
    (copy / "params.yaml").write_text(yaml.safe_dump(TINY_PARAMS | NONE | {kind: [method]} | law, sort_keys=False))
    assert {"plots@tiny", "page@tiny", "report"} <= stages_run(run(*REPRO)) <= first
    assert "Data and pipelines are up to date." in run(*DVC, "status")
    rows = re.findall(r"^\| (\w+) +\|", run(sys.executable, "-m", "quantstudy", "results"), re.MULTILINE)
    assert rows == ["variant", "fp32", method]
    run(*DVC, "plots", "show", "-o", "page")
