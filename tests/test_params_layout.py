"""`params.yaml` lies there as DVC writes it: an experiment with another number changes that number's line alone."""

import difflib
import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from quantstudy.params import load_params
from quantstudy.params.reading import read_params
from tests.conftest import ROOT


def changed_lines(before: str, after: str) -> list[str]:
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("studies.vgg11_digits.seed", 1),
        ("studies.mobilenetv2_digits.training.learning_rate", 0.0123456789),
        ("studies.vgg11_cifar100_32px.qat.methods.qat_w2a8.learning_rate", 1e-7),
        ("methods.qat_w4a8.epochs", 1000),
        ("methods.clip_int4_p95.clip_percentile", 99.9),
        ("measure.seconds", 0.5),
        ("runtime.processes", 2),
    ],
)
def test_another_number_changes_one_line(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    apply_overrides(path, [f"{key}={value}"])
    removed, added = changed_lines((ROOT / "params.yaml").read_text(), path.read_text())
    last = key.rpartition(".")[2]
    assert f"{last}:" in removed and f"{last}: {value}" in added
    assert load_params(path) != load_params(ROOT / "params.yaml")


def test_a_list_of_other_names_keeps_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    apply_overrides(path, ["run=[vgg11_cifar100]"])
    changed = changed_lines((ROOT / "params.yaml").read_text(), path.read_text())
    assert sorted(line[0] for line in changed) == ["+", "-", "-"]
    assert read_params(path) == read_params(ROOT / "params.yaml") | {"run": ["vgg11_cifar100"]}
