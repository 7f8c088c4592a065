"""Whatever ends a stage is one line; a traceback lies in a file that the line names."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from quantstudy.errors import LOGS, MOST_TEXT, UserError, run_stage
from tests.conftest import ROOT


def failure(error: BaseException | Callable[[], object]) -> str:
    def main() -> None:
        if isinstance(error, BaseException):
            raise error
        error()

    with pytest.raises(SystemExit) as stop:
        run_stage(main)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("error: ")
    assert stop.value.code.isprintable() and len(stop.value.code) <= MOST_TEXT + 10
    return stop.value.code


UNKNOWN: dict[str, BaseException | Callable[[], object]] = {
    "value": ValueError("first\nsecond"),
    "no text": AssertionError(),
    "memory": MemoryError(),
    "recursion": RecursionError("too deep"),
    "torch": lambda: torch.zeros(2) @ torch.zeros(3),
    "numpy": lambda: np.zeros(2) @ np.zeros(3),
    "bytes": lambda: b"\xff".decode(),
    "connection": ConnectionResetError("by peer"),
    "surrogate": ValueError("\udcff"),
    "colours": RuntimeError("\x1b[31mred\x1b[0m"),
    "group": ExceptionGroup("several", [ValueError("one")]),
}


@pytest.mark.parametrize("error", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_exception_is_one_line_that_names_its_log(
    error: BaseException | Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages/ptq.py"])
    line = failure(error)
    name = re.search(r"the traceback is in (\S+)$", line)
    assert name and Path(name[1]) == LOGS / "ptq.log"
    assert Path(name[1]).read_text().startswith(("Traceback (most recent call last)", "  + Exception Group Traceback"))


def test_without_room_for_a_log_the_line_comes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".cache").touch()
    assert failure(ValueError("x")) == "error: ValueError: x"


def test_what_the_system_refuses_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for name in ("loop", "x" * 300, "missing", "."):
        assert failure(Path(name).read_bytes).startswith(f"error: {name[:200]}: ")
    assert "the disk is full" in failure(lambda: np.zeros(10**5).tofile("/dev/full"))
    assert "the disk is full" in failure(lambda: Path("/dev/full").write_text("x"))
    assert not LOGS.exists()


def test_a_line_is_bounded() -> None:
    assert len(failure(UserError("x" * 10**7))) <= MOST_TEXT + 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_signal_ends_a_stage_as_an_exception_does(tmp_path: Path, number: signal.Signals) -> None:
    code = """
import os, time, sys
from pathlib import Path
from quantstudy.errors import run_stage
from quantstudy.files import atomic

def main():
    with atomic(Path("out")):
        print("writing", flush=True)
        time.sleep(60)

run_stage(main)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    stage = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1)
    assert stage.stdout and stage.stdout.readline() == "writing\n"
    stage.send_signal(number)
    assert stage.communicate(timeout=10)[1] == "" and stage.returncode == 128 + number
    assert not list(tmp_path.iterdir())
