"""The DAG: complete dependencies, plain names, lists that agree with the params."""

import re
from typing import Any

import pytest
import yaml

from quantstudy import layout
from quantstudy.params import load_params
from tests.conftest import ROOT

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def script(stage: dict[str, Any]) -> str:
    """Return the name of the script that a stage runs."""
    name = re.match(r"python -m stages (\w+)", stage["cmd"])
    assert name, stage["cmd"]
    return name[1]


@pytest.mark.parametrize("name", [name for name in STAGES if name != "code"])
def test_a_stage_depends_on_the_list_of_its_code(name: str) -> None:
    listed = f"reports/code/{script(STAGES[name])}.txt"
    assert [dep for dep in STAGES[name]["deps"] if dep.startswith("reports/code/")] == [listed]
    assert listed in [next(iter(out)) for out in STAGES["code"]["outs"]]


def test_the_lists_are_of_all_code() -> None:
    assert STAGES["code"]["deps"] == ["quantstudy", "stages"]
    scripts = {path.stem for path in ROOT.glob("stages/[!_]*.py")} - {"list_code"}
    assert {next(iter(out)) for out in STAGES["code"]["outs"]} == {f"reports/code/{name}.txt" for name in scripts}


def test_names_on_a_matrix_axis_cannot_collide() -> None:
    params = load_params(ROOT / "params.yaml")
    for name in (*params.run, *params.studies, *params.ptq, *params.qat):
        assert re.fullmatch(r"[a-z0-9_]+", name)


def test_every_stage_has_a_description() -> None:
    assert all(stage.get("desc") for stage in STAGES.values())


def test_every_method_listed_is_measured_and_the_rows_left_out_are_those_that_take_minutes() -> None:
    params = load_params(ROOT / "params.yaml")
    for name in params.methods.keys() - {*params.ptq, *params.qat}:
        row = params.method(name)
        beyond = {"equalize": False, "weight_range": "minmax", "rounding": "nearest", "finetune": False}
        takes_minutes = any(getattr(row, key, default) != default for key, default in beyond.items())
        assert takes_minutes or row.kind == "mixed_budget", name
    axes = {"study": "${run}", "method": "${budget.methods}"}
    assert STAGES["evaluate_budget"]["matrix"] == axes == STAGES["budget"]["matrix"]
    assert STAGES["evaluate_ptq"]["matrix"] == {"study": "${run}", "method": "${ptq}"} == STAGES["ptq"]["matrix"]
    assert STAGES["evaluate_qat"]["matrix"] == {"study": "${run}", "method": "${qat}"} == STAGES["qat"]["matrix"]


def test_the_artifacts_are_the_models_of_the_default_run() -> None:
    params = load_params(ROOT / "params.yaml")
    expected = {f"{study}/{v}": layout.model(study, v) for study in params.run for v in params.variants}
    exported = ["fp32", *params.export.ptq, *params.export.qat]
    expected |= {f"{study}/onnx/{v}": layout.onnx(study, v) for study in params.run for v in exported}
    artifacts = yaml.safe_load((ROOT / "dvc.yaml").read_text())["artifacts"]
    assert {name: row["path"] for name, row in artifacts.items()} == {n: p.as_posix() for n, p in expected.items()}
    for name, row in artifacts.items():
        study, variant = name.split("/")[0], name.split("/")[-1]
        model = params.study(study)
        assert row["type"] == "model" and row["desc"].startswith(f"{model.model.architecture} on {model.data.source}")
        assert row["labels"][:3] == [model.model.architecture, model.data.source, variant]


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
