"""Files: written whole or not at all, nothing left by a killed writer, and damage found by whoever reads them."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantstudy.errors import UserError, run_stage
from quantstudy.files import PARTIAL, atomic, load_array, read_json, save_array, write_text
from tests.conftest import ROOT
from tests.harness import files as harness

KILLED = "import os, sys; from quantstudy.files import *; stack = atomic(Path(sys.argv[1])); stack.__enter__(); "


def partial(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PARTIAL}*"))


def test_what_a_killed_writer_left_is_gone_after_the_next_save_and_what_others_write_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED + "os.kill(os.getpid(), 9)", str(tmp_path / "a.txt")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    (left,) = partial(tmp_path)
    with atomic(tmp_path / "b.txt"):
        assert not left.exists()
        (other,) = partial(tmp_path)
        write_text(tmp_path / "c.txt", "c")
        assert other.exists()
        other.write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "c.txt"]
    assert f"{PARTIAL}*" in (ROOT / ".dvcignore").read_text().splitlines()


def test_an_array_is_known_to_be_whole_and_what_it_says(tmp_path: Path) -> None:
    path, array = tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(3, 4)
    save_array(path, array, "logits of a")
    whole = path.read_bytes()
    assert np.array_equal(np.load(path), array) and np.array_equal(load_array(whole, path, "logits of a"), array)
    flipped = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    cut = [whole[:end] for end in range(0, len(whole), 9)]
    with_nan = tmp_path / "nan.npy"
    np.save(with_nan, array * np.nan)
    for content in (*flipped, *cut, b"", b"noise" * 40, with_nan.read_bytes()):
        with pytest.raises(UserError, match=r"x\.npy: damaged, not finite, or not logits of a"):
            load_array(content, path, "logits of a")
    with pytest.raises(UserError, match="not logits of b"):
        load_array(whole, path, "logits of b")
    np.save(path, array)
    assert np.array_equal(load_array(path.read_bytes(), path, "logits of a"), array)


def test_json_that_breaks_readers_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ('{"top1": NaN}', '{"top1": 1', "[" * 10**5, ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
            read_json(path)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES])
def test_what_the_file_system_refuses_is_one_line(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("quantstudy.files.tempfile.mkstemp", refuse)
    with pytest.raises(SystemExit) as stop:
        run_stage(lambda: write_text(Path("x.txt"), "x"))
    assert stop.value.code == f"error: x.txt: {os.strerror(number)}"


def test_an_ascii_terminal_gets_escapes() -> None:
    code = "from quantstudy.errors import run_stage; run_stage(lambda: print('1 ± 2 \\udcff'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"1 \\xb1 2 \\udcff\n"), done.stderr


@pytest.mark.slow
def test_damaged_and_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(None):
        harness.make_studies()
    counts, wrong = harness.try_damages(flips=1)
    assert not wrong and counts["refused"] >= 4 * len(harness.READERS)
    counts, wrong = harness.try_hostile(share=4)
    assert not wrong and counts["refused"] > counts["accepted"] > 5
