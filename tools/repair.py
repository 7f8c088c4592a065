"""Repair DVC's own files after a killed run or a full disk, so the next run starts without help.

DVC writes `dvc.lock` and `.dvc/tmp/rwlock` in place. A run that ends in the middle leaves them empty or cut off, and
DVC then refuses to start. So a copy of `dvc.lock` is kept whenever it is whole. If a restored copy lacks a stage, DVC
finds the stage in its run cache. DVC also adds the files that it writes to git's index, which can stay locked.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from quantstudy.files import atomic

GIT_SECONDS = 2.0
"""How long a program that is not git itself may lock the index."""


def repair(root: Path) -> None:
    """Repair the files of the project at `root`; no other DVC may run there meanwhile."""
    _restore_lock_file(root)
    keep_lock_file(root)
    _remove_rwlock(root / ".dvc" / "tmp" / "rwlock")
    _unlock_index(root)


def keep_lock_file(root: Path) -> None:
    """Copy `dvc.lock` to DVC's temporary files if it is whole and differs from the copy there."""
    content, copy = _read(root / "dvc.lock"), _copy(root)
    if content and content != _read(copy) and _is_whole(content):
        _write(copy, content)


def _restore_lock_file(root: Path) -> None:
    path, kept = root / "dvc.lock", _read(_copy(root)) or b""
    content = _read(path)
    if content is None or b"<<<<<<<" in content:  # missing, or in a merge that the user must end
        return
    if content and (content == kept or (not kept.startswith(content) and _is_whole(content))):
        return
    for good, source in ((kept, "its copy"), (_committed(path), "git")):
        if _is_whole(good):
            _write(path, good)
            print(f"{path.name} was cut; it is restored from {source}", file=sys.stderr)
            return
    path.unlink()
    print(f"{path.name} was cut and there is no other; it is written anew", file=sys.stderr)


def _is_whole(content: bytes) -> bool:
    """Return whether DVC can read a lock file, and its last line is complete."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml

    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(content.decode(), "dvc.lock"))
    except Exception:  # in the text, the YAML or the schema: DVC cannot read it
        return False
    return content.endswith(b"\n")


def _copy(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "dvc.lock"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def _git(folder: Path, *arguments: str) -> bytes:
    """Return what git prints; nothing if there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def _committed(path: Path) -> bytes:
    return _git(path.parent, "show", f"HEAD:./{path.name}")


def _remove_rwlock(path: Path) -> None:
    """Remove DVC's list of files in use, unless a process that it names still runs and is older than the list."""
    content = _read(path)
    if content is not None and not any(_ran(int(pid), path) for pid in re.findall(rb'"pid": (\d+)', content)):
        path.unlink()


def _ran(pid: int, path: Path) -> bool:
    try:
        return psutil.Process(pid).create_time() <= path.stat().st_mtime
    except psutil.Error:
        return False


def _unlock_index(root: Path) -> None:
    """Remove the lock of git's index if it is older than any program needs, and no git process works here."""
    name = _git(root, "rev-parse", "--git-path", "index.lock").decode().strip()
    path = root / name
    if not name or not path.exists():
        return
    time.sleep(max(0.0, min(GIT_SECONDS, path.stat().st_mtime + GIT_SECONDS - time.time())))
    if not any(_is_git_in(process, root) for process in psutil.process_iter()):
        path.unlink(missing_ok=True)
        print(f"{path}: a run that was killed had left it; it is removed", file=sys.stderr)


def _is_git_in(process: psutil.Process, root: Path) -> bool:
    try:
        return process.name().startswith("git") and Path(process.cwd()).is_relative_to(root.resolve())
    except psutil.Error:
        return False
