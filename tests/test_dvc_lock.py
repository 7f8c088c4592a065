"""The lock file that DVC writes is the same, whichever of its parsers read it before."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import _yaml, dump_yaml, load_yaml, modify_yaml

from quantstudy.dvc_lock import read_quickly
from tests.conftest import ROOT

LONG = "python -m stages ptq --study a --method a_very_long_name_of_a_method_that_makes_this_line_longer_than_eighty"
SPECIAL = {
    "cmd": LONG,
    "params": {
        "rates": [1e-05, 2.5e-05, 0.0003, 1e20, 100.0, float("inf"), -0.0, 123456789.123456789],
        "empty": [{}, [], "", None],
        "words": [
            "on",
            "012",
            "1e-05",
            "1_000",
            "a: 'b' # c",
            " ü\t",
            "2.0",
            "~",
            "x\ny\n",
            "2026-01-01",
            "0x1F",
            LONG,
        ],
        "nested": [[1, True], [{"a": [{"b": 2}]}]],
    },
}


@pytest.mark.parametrize("stage", [None, SPECIAL], ids=["ours", "special"])
def test_it_is_written_as_dvc_writes_it(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "dvc.lock", []
    content = load_yaml(ROOT / "dvc.lock") if stage is None else {"schema": "2.0", "stages": {"a@b-c": stage}}
    dump_yaml(path, content)
    before = path.read_text()
    monkeypatch.setattr(_yaml, "parse_yaml_for_update", kept := _yaml.parse_yaml_for_update)
    for quick in (False, True):
        path.write_text(before)
        if quick:
            read_quickly()
            assert _yaml.parse_yaml_for_update is not kept
        for name in ("added", "another"):
            with modify_yaml(path) as data:
                data["stages"].update({name: {"cmd": "true", "outs": [{"path": "x", "size": 1}]}})
        written.append(path.read_text())
    assert written[0] == written[1]
    assert written[0].startswith(before)
    assert "another:" in written[0]


def test_comments_elsewhere_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_yaml, "parse_yaml_for_update", _yaml.parse_yaml_for_update)
    read_quickly()
    path = tmp_path / "dvc.yaml"
    path.write_text("# why\nstages: {}\n")
    with modify_yaml(path) as data:
        data["vars"] = []
    assert path.read_text().startswith("# why\n")


def test_a_dvc_without_these_functions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_yaml, "parse_yaml_for_update")
    read_quickly()
    assert not hasattr(_yaml, "parse_yaml_for_update")


def test_it_is_dvc() -> None:
    command = [sys.executable, "-m", "quantstudy.dvc_lock", "stage"]
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "invalid choice: 'nothing'" in done.stderr
