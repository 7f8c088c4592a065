"""The DAG: every stage tracks its code, plain names, lists that agree with the params."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from quantstudy import layout
from tests.conftest import ROOT
from tests.params import TINY_PARAMS
from tools.dag import flowchart

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def script(stage: dict[str, Any]) -> str:
    """Return the name of the script that a stage runs."""
    name = re.match(r"python -m stages (\w+)", stage["cmd"])
    assert name, stage["cmd"]
    return name[1]


def test_a_stage_tracks_its_code_and_code_is_every_script() -> None:
    assert all({"code.yaml": [script(stage)]} in stage["params"] for stage in STAGES.values())
    scripts = {path.stem for path in ROOT.glob("stages/[!_]*.py")}
    assert set(yaml.safe_load((ROOT / "code.yaml").read_text())) == scripts
    assert {script(stage) for stage in STAGES.values()} == scripts - {"diagnose"}


def test_every_method_that_is_made_is_measured() -> None:
    for stage, methods in (("ptq", "${ptq}"), ("qat", "${qat}"), ("budget", "${budget.methods}")):
        axes = {"study": "${run}", "method": methods}
        assert STAGES[stage]["matrix"] == axes == STAGES[f"evaluate_{stage}"]["matrix"]


def test_what_a_study_ships_can_be_got_by_name() -> None:
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["artifacts"]
    studies = yaml.safe_load((ROOT / "params.yaml").read_text())["studies"]
    assert {name: row["path"] for name, row in found.items()} == {
        study.replace("_", "-"): layout.ship(study).as_posix() for study in studies
    }


@pytest.mark.parametrize("raw", [yaml.safe_load((ROOT / "params.yaml").read_text()), TINY_PARAMS], ids=["own", "tests"])
def test_params_that_stages_track_exist(raw: dict[str, Any]) -> None:
    for stage in STAGES.values():
        for key in (key for key in stage["params"] if isinstance(key, str)):
            for study in raw["studies"]:
                for method in raw["methods"]:
                    found = raw
                    for part in key.replace("${item.study}", study).replace("${item.method}", method).split("."):
                        assert part in found, key
                        found = found[part]


def test_git_ignores_what_the_cache_holds() -> None:
    """So that DVC writes no .gitignore of its own, and a run leaves no file that git does not know."""
    cached, in_git = [], []
    for stage in STAGES.values():
        for out in (*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])):
            path, options = (out, {}) if isinstance(out, str) else next(iter(out.items()))
            path = path.replace("${item.study}", "vgg11_digits").replace("${item.method}", "int8_static")
            (cached if options.get("cache", True) else in_git).append(path)
    command = ["git", "check-ignore", "--no-index", *cached, *in_git]
    printed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if printed.returncode > 1:
        pytest.skip(f"no git repository: {printed.stderr}")
    assert sorted(printed.stdout.split()) == sorted(cached)


def test_the_facts_of_a_machine_are_no_output_that_another_one_would_skip() -> None:
    outs = [yaml.safe_dump(stage) for stage in STAGES.values()]
    assert not any(layout.ENVIRONMENT.as_posix() in text for text in outs)
    assert f"/{layout.ENVIRONMENT.as_posix()}" in (ROOT / ".gitignore").read_text().split()
    assert "-m stages diagnose" in (ROOT / "quantstudy" / "__main__.py").read_text()  # before anything else runs


def test_the_picture_of_the_dag_has_a_box_a_kind_and_no_arrow_that_others_imply() -> None:
    names = ["a@s", "b@s-1", "b@s-2", "c@s"]
    a, one, two, c = (SimpleNamespace(name=name) for name in names)
    found = flowchart([a, one, two, c], [(one, a), (two, a), (c, one), (c, a)])
    boxes, arrows = ['  a["a"]', '  b["b × 2"]', '  c["c"]'], ["  a --> b", "  b --> c"]  # noqa: RUF001
    assert found.splitlines() == ["flowchart LR", *boxes, *arrows]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The stages and the package, with a code.yaml that is of them."""
    for folder in ("quantstudy", "stages", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(tmp_path, "tools.code")
    return tmp_path


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", *command]
    return subprocess.run(called, cwd=folder, env=environment, text=True, capture_output=True, check=False)


def test_a_stage_of_other_code_than_dvc_knows_is_refused(copy: Path) -> None:
    stage = ("stages", "plots", "--help")
    assert run(copy, *stage, DVC_STAGE="plots").returncode == 0
    module = copy / "quantstudy" / "report" / "tables.py"
    module.write_text(module.read_text() + "\nSTEP = 1\n")
    done = run(copy, *stage, DVC_STAGE="plots")
    assert done.returncode == 1 and done.stderr.startswith("error: code.yaml: plots ")
    assert done.stderr.count("\n") == 1
    assert run(copy, *stage).returncode == 0  # by hand
    assert run(copy, "tools.code", "--check").returncode == 1
    run(copy, "tools.code")
    assert run(copy, "tools.code", "--check").returncode == 0
    assert run(copy, *stage, DVC_STAGE="plots").returncode == 0
