"""A stage reads no param that dvc.yaml does not track for it: every read of the tiny study's stages is recorded."""

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import yaml

from quantstudy.params import Params, Section, load_params
from tests.conftest import ROOT, Project
from tests.params import FEW

pytestmark = pytest.mark.slow

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LISTS = FEW | {"qat": ["qat_int8", "qat_w4a8"]}
"""The methods that run; the second reads calibration images, the first histograms."""
WHOLE = {"__dict__", "__iter__", "model_copy", "model_dump", "model_dump_json", "model_fields_set"}
"""Attributes of a section by which all of it is read."""


class Listed(list[str]):
    """The variants of a run. A stage may ask whether its own is one, as DVC has asked already; more is a read."""

    def __init__(self, names: Sequence[str], seen: set[str]) -> None:
        super().__init__(names)
        self._seen = seen

    def __iter__(self) -> Iterator[str]:
        self._seen |= {"ptq", "budget.methods", "qat"}
        return super().__iter__()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The dotted keys of params.yaml that have been read since it was loaded."""
    seen: set[str] = set()
    places: dict[int, str] = {}
    kept = []  # so that no other object gets the id of a section
    get, variants = object.__getattribute__, Params.variants.fget

    def walk(section: Section, place: str) -> None:
        kept.append(section)
        places[id(section)] = place
        for name in type(section).model_fields:
            value = get(section, name)
            rows = value.items() if isinstance(value, dict) else [("", value)]
            for key, row in rows:
                if isinstance(row, Section):
                    walk(row, f"{place}{name}.{key + '.' if key else ''}")

    def record(section: Section, name: str) -> Any:
        value = get(section, name)
        if (place := places.get(id(section))) is not None:
            names = isinstance(value, dict) and place == ""  # `studies` and `methods`, whose rows have places
            if name in WHOLE or (name in type(section).model_fields and not isinstance(value, Section) and not names):
                seen.add(place + name if name not in WHOLE else place.rstrip("."))
        return value

    def load(*arguments: Any) -> Any:
        params = load_params(*arguments)
        walk(params, "")
        return params

    for module in list(sys.modules.values()):
        if getattr(module, "load_params", None) is load_params and module.__name__ != __name__:
            monkeypatch.setattr(module, "load_params", load)
    monkeypatch.setattr(Section, "__getattribute__", record, raising=False)
    names = property(lambda params: Listed(_unrecorded(variants, params, seen), seen))
    monkeypatch.setattr(Params, "variants", names)
    return seen


def _unrecorded(variants: Any, params: Any, seen: set[str]) -> list[str]:
    before = set(seen)
    found: list[str] = variants(params)
    seen.intersection_update(before)
    return found


def cells() -> Iterator[tuple[str, list[str], set[str]]]:
    """Yield each cell of the tiny study in an order that runs: its script, its flags, the keys it tracks."""
    order = ["download", "finetune", "calibrate", "trace", "sensitivity", "outliers", "ptq", "budget", "qat"]
    order += [name for start in ("evaluate_", "export_") for name in STAGES if name.startswith(start)]
    order += ["search", "plots", "page", "report"]
    assert sorted(order) == sorted(STAGES)
    for name in order:
        stage = STAGES[name]
        axis = stage.get("matrix", {}).get("method", "${}")[2:-1]
        methods: Any = LISTS
        for part in filter(None, axis.split(".")):
            methods = methods[part]
        for method in methods if axis else [""]:
            text = yaml.safe_dump({"cmd": stage["cmd"], "params": stage["params"]})
            cell = yaml.safe_load(text.replace("${item.study}", "tiny").replace("${item.method}", method))
            script, *flags = cell["cmd"].removeprefix("python -m stages ").split()
            yield script, flags, {key for key in cell["params"] if isinstance(key, str)}


def untracked(reads: set[str], tracked: set[str]) -> set[str]:
    """Return the keys that were read and are none of the tracked ones, nor within one."""
    return {key for key in reads if not any(re.match(rf"{re.escape(name)}(\.|$)", key) for name in tracked)}


@pytest.fixture
def stages() -> dict[str, Any]:
    """The scripts of all cells, imported before `reads` replaces what they load params with."""
    return {script: importlib.import_module(f"stages.{script}") for script, _, _ in cells()}


def test_every_stage_reads_only_what_it_tracks(stages: dict[str, Any], project: Project, reads: set[str]) -> None:
    for key, value in LISTS.items():
        project.edit(key, value)
    project.edit("studies.tiny.goal", {"max_drop": 90.0, "confidence": 0.5, "may_train": True})
    leaks, read = {}, set()
    for script, flags, tracked in cells():
        reads.clear()
        stages[script].main(flags)
        read |= {*reads}
        if found := untracked(reads, tracked):
            leaks[" ".join([script, *flags])] = sorted(found)
    assert not leaks
    assert {"studies.tiny.seed", "methods.qat_int8.weight_bits", "measure.seconds", "run"} <= read


def test_a_planted_read_is_found(
    stages: dict[str, Any], project: Project, reads: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    download, prepare = stages["download"], stages["download"].prepare
    (_, flags, tracked) = next(cell for cell in cells() if cell[0] == "download")
    monkeypatch.setattr(
        download, "prepare", lambda *given: (download.load_params().measure.threads, prepare(*given))[1]
    )
    download.main(flags)
    assert untracked(reads, tracked) == {"measure.threads"}
