"""What a killed run or a full disk leaves of DVC's files is mended, and nothing else is touched."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.repair import repair

ENTRY = "    cmd: make\n    outs:\n    - path: {0}\n      md5: d8e8fca2dc0f896fd7cb4cb0031ba249\n      size: 5\n"
ONE = "schema: '2.0'\nstages:\n  a:\n" + ENTRY.format("a")
TWO = ONE + "  b:\n" + ENTRY.format("b")
COMMIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
CUT = {
    "empty": "",
    "in a word": TWO[:-60],
    "at a line's end": TWO[: TWO.index("      size: 5\n  b")],
    "in a list": TWO[: TWO.rindex("    - path")],
    "no stage": "schema: '2.0'\n",
    "zeros": "\0" * 64,
    "no YAML": TWO + "  'c\n",
}
READ_BY_DVC = ("at a line's end", "no stage")
"""DVC runs again what it does not find in it."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(ONE)
    for command in (("git", "init", "-q"), ("git", "add", "dvc.lock"), COMMIT):
        subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("source", ["copy", "git", "nothing"])
def test_a_cut_lock_file_is_restored(root: Path, cut: str, source: str) -> None:
    lock, text = root / "dvc.lock", CUT[cut]
    if source == "copy":
        lock.write_text(TWO)
        repair(root)
    if source == "nothing":
        lock.rename(root / "elsewhere")
        subprocess.run((*COMMIT, "-a"), cwd=root, check=True)
    lock.write_text(text)
    repair(root)
    expected = {"copy": TWO, "git": ONE, "nothing": None}[source]
    if source != "copy" and cut in READ_BY_DVC:
        expected = text
    assert (lock.read_text() if lock.exists() else None) == expected


def test_a_lock_file_that_dvc_reads_or_that_a_merge_left_is_the_users(root: Path) -> None:
    lock = root / "dvc.lock"
    merge = f"<<<<<<< HEAD\n{ONE}=======\n{TWO}>>>>>>> other\n"
    for text in (TWO, ONE.replace("size: 5", "size: 6"), merge):
        lock.write_text(text)
        repair(root)
        assert lock.read_text() == text
    lock.unlink()
    repair(root)
    assert not lock.exists()


@pytest.mark.parametrize("pid", [None, 2**22 + 1, os.getpid()], ids=["none", "dead", "of another process"])
@pytest.mark.parametrize("cut", [0, 9, -1, None], ids=["empty", "cut", "not closed", "whole"])
def test_a_lock_whose_owner_is_gone_is_removed(root: Path, cut: int | None, pid: int | None) -> None:
    """A process that started after the file was written got the owner's id by chance."""
    rwlock = root / ".dvc" / "tmp" / "rwlock"
    held = {"a": {"pid": pid, "cmd": "dvc repro"}} if pid else {}
    rwlock.write_text(json.dumps({"write": held, "read": {}})[:cut])
    os.utime(rwlock, (1e9, 1e9))
    repair(root)
    assert not rwlock.exists()


def test_a_lock_whose_owner_runs_is_left(root: Path) -> None:
    rwlock = root / ".dvc" / "tmp" / "rwlock"
    rwlock.write_text(json.dumps({"read": {"a": [{"pid": os.getpid(), "cmd": "dvc repro"}]}}))
    repair(root)
    assert rwlock.exists()


def test_gits_index_is_unlocked_unless_git_runs(root: Path) -> None:
    lock = root / ".git" / "index.lock"
    lock.touch()
    git = subprocess.Popen(["git", "cat-file", "--batch"], cwd=root, stdin=subprocess.PIPE)
    repair(root)
    assert lock.exists()
    git.communicate()
    repair(root)
    assert not lock.exists()


def test_dvc_mends_first_unless_another_one_runs(root: Path) -> None:
    for name in ("code.yaml", "dvc.yaml"):
        (root / name).touch()
    (root / "dvc.lock").write_text("")
    prepare = "from pathlib import Path; from tools import dvc; dvc.prepare(Path())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = os.open(root / ".dvc", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    subprocess.run([sys.executable, "-c", prepare], cwd=root, env=environment, check=True)
    assert (root / "dvc.lock").read_text() == ""
    os.close(other)
    subprocess.run([sys.executable, "-c", prepare], cwd=root, env=environment, check=True)
    assert (root / "dvc.lock").read_text() == ONE
