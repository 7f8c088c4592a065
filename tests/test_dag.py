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
    """Yield every local module that `path` imports anywhere in it, relative to `root`; a package is its docstring."""
    for node in ast.walk(ast.parse((root / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{path}: imports are absolute here"
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


def needed(stage: dict[str, Any], root: Path) -> set[str]:
    """Return the modules a stage runs."""
    name = re.match(r"python -m stages\.(\w+)", stage["cmd"])
    assert name, stage["cmd"]
    return {path.as_posix() for path in transitive_imports(Path("stages") / f"{name[1]}.py", root)}


def declared(stage: dict[str, Any], root: Path) -> set[str]:
    """Return the modules among a stage's deps; a package among them stands for every module in it."""
    found = {dep for dep in stage["deps"] if dep.endswith(".py")}
    for package in (root / dep for dep in stage["deps"] if dep.startswith("quantstudy/") and not dep.endswith(".py")):
        found |= {path.relative_to(root).as_posix() for path in modules_in(package)}
    return found


def modules_in(package: Path) -> set[Path]:
    """Return every module below a package but the files that make it one."""
    return {path for path in package.rglob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("name", STAGES)
def test_the_modules_declared_are_those_imported(name: str) -> None:
    assert declared(STAGES[name], ROOT) == needed(STAGES[name], ROOT)


def test_what_makes_a_package_holds_no_code() -> None:
    for path in ROOT.glob("quantstudy/**/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr | ast.Assign) for node in body), path


@pytest.mark.parametrize(("place", "stays_declared"), [("planted", False), ("quantization/planted", True)])
def test_a_planted_import_is_found(tmp_path: Path, place: str, stays_declared: bool) -> None:
    """One beside the packages is missing from the deps; one in a declared package is covered by it."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    shutil.copytree(ROOT / "quantstudy", tmp_path / "quantstudy")
    (tmp_path / "quantstudy" / f"{place}.py").write_text("")
    helper = tmp_path / "quantstudy" / "quantization" / "packing.py"
    module = "quantstudy." + place.replace("/", ".")
    helper.write_text(helper.read_text() + f"\n\ndef late() -> None:\n    import {module}\n")
    missing = needed(STAGES["ptq"], tmp_path) - declared(STAGES["ptq"], tmp_path)
    assert missing == (set() if stays_declared else {f"quantstudy/{place}.py"})


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
