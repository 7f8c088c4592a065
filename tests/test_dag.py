"""The DAG: complete dependencies, plain names, lists that agree with the params."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy.params import load_params

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def local_imports(path: Path, root: Path) -> Iterator[Path]:
    """Yield every local module that `path` imports anywhere in it, relative to `root`."""
    for node in ast.walk(ast.parse((root / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = Path(*name.split(".")).with_suffix(".py")
            if (root / module).is_file():
                yield module


def transitive_imports(script: Path, root: Path) -> set[Path]:
    """Return `script` and every local module it imports, directly or not."""
    seen, todo = {script}, [script]
    while todo:
        for module in local_imports(todo.pop(), root):
            if module not in seen:
                seen.add(module)
                todo.append(module)
    return seen


def undeclared(stage: dict[str, Any], root: Path) -> set[str]:
    """Return the modules a stage runs that are not among its deps."""
    name = re.match(r"python -m stages\.(\w+)", stage["cmd"])
    assert name, stage["cmd"]
    needed = {path.as_posix() for path in transitive_imports(Path("stages") / f"{name[1]}.py", root)}
    return needed - set(stage["deps"])


@pytest.mark.parametrize("name", STAGES)
def test_every_local_import_is_declared(name: str) -> None:
    assert undeclared(STAGES[name], ROOT) == set()


@pytest.mark.parametrize("name", STAGES)
def test_no_declared_module_is_unused(name: str) -> None:
    script = Path("stages") / (STAGES[name]["cmd"].split()[2].split(".")[1] + ".py")
    declared = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")}
    assert declared == {path.as_posix() for path in transitive_imports(script, ROOT)}


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    shutil.copytree(ROOT / "quantstudy", tmp_path / "quantstudy")
    (tmp_path / "quantstudy" / "planted.py").write_text("")
    helper = tmp_path / "quantstudy" / "quantization" / "packing.py"
    helper.write_text(helper.read_text() + "\n\ndef late() -> None:\n    from quantstudy import planted\n")
    assert undeclared(STAGES["ptq"], tmp_path) == {"quantstudy/planted.py"}


def test_names_on_a_matrix_axis_cannot_collide() -> None:
    params = load_params(ROOT / "params.yaml")
    for name in (*params.run, *params.studies, *params.ptq, *params.qat):
        assert re.fullmatch(r"[a-z0-9_]+", name)


def test_every_stage_has_a_description() -> None:
    assert all(stage.get("desc") for stage in STAGES.values())


def test_every_method_listed_is_measured_and_every_row_is_listed() -> None:
    params = load_params(ROOT / "params.yaml")
    assert sorted(params.methods) == sorted([*params.ptq, *params.qat])
    assert STAGES["evaluate_ptq"]["matrix"] == {"study": "${run}", "method": "${ptq}"} == STAGES["ptq"]["matrix"]
    assert STAGES["evaluate_qat"]["matrix"] == {"study": "${run}", "method": "${qat}"} == STAGES["qat"]["matrix"]


def test_params_that_stages_track_exist() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES.values():
        for key in stage.get("params", []):
            for study in raw["studies"]:
                for method in raw["methods"]:
                    found = raw
                    for part in key.replace("${item.study}", study).replace("${item.method}", method).split("."):
                        assert part in found, key
                        found = found[part]
