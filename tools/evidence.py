"""Make everything that README and docs/ show, in several sittings: `python -m tools.evidence [part ...]`.

A part is some commands and the committed files that they write. The commands run in a clone of the current commit,
`.cache/evidence/<folder>`, so a checkout's own params and models stay as they are. The clone keeps what it has made: a
part that is stopped goes on in the next sitting. What a part wrote is then copied to the checkout, and
reports/evidence.json notes its commit, day, machine, load and seconds, and the SHA-256 of all code that it ran, of its
commands, of each method's row in params.yaml, of its studies' rows and of the other sections.

`--check` fails if any of these has changed since the part was made. A new row changes nothing. A part that was never
made is named.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from quantstudy.errors import UserError, run_stage, unknown
from quantstudy.files import read_json, sha256, write_json
from quantstudy.machine.hardware import describe_machine
from quantstudy.network.source_code import scripts_sha256
from quantstudy.params import PARAMS_FILE
from tools.evidence_parts import EXTERNAL, Part, all_parts

RECORD = Path("reports") / "evidence.json"
FOLDER = Path(".cache") / "evidence"
LISTS = ("run", "ship", "ptq", "qat", "export", "budget")
"""The keys of params.yaml that say which studies and methods run."""


def stale(parts: Iterable[Part], root: Path, made: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the parts that were made by something else, each with the scripts and settings that have changed since."""
    found = {}
    for part in parts:
        if part.name in made:
            now, noted = code_of(part, root) | settings_of(part, root), made[part.name]
            then = noted.get("code", {}) | noted.get("settings", {"its settings were not noted": ""})
            absent = {f"{EXTERNAL}/{name}" for name in part.needs} - now.keys()  # they cannot be compared
            if changed := sorted(k for k in {*then, *part.scripts} - absent if now.get(k) != then.get(k)):
                found[part.name] = changed
    return found


def code_of(part: Part, root: Path) -> dict[str, str]:
    """Return by script of a part the SHA-256 of all code that it runs."""
    scripts = [Path(script) for script in part.scripts]
    return {path.as_posix(): digest for path, digest in scripts_sha256(scripts, root).items()}


def settings_of(part: Part, root: Path) -> dict[str, str]:
    """Return the SHA-256 of a part's commands and, by name, of its files and of what it reads in params.yaml.

    These are the rows of all methods, the rows of its studies, and every other section; `LISTS` only for `default`, as
    the other parts have lists of their own.
    """
    params = yaml.safe_load((root / PARAMS_FILE).read_text(encoding="utf-8")) | dict(part.params)
    studies = params["run"] if part.folder == "default" or "run" in part.params else []
    rest = params.keys() - {"methods", "studies", *(LISTS if part.name != "default" else ())}
    found: dict[str, Any] = {"its commands": part.commands} | {name: params[name] for name in sorted(rest)}
    found |= {f"methods.{name}": row for name, row in params["methods"].items()}
    found |= {f"studies.{name}": row for name, row in params["studies"].items() if name in studies}
    files = [f"{EXTERNAL}/{name}" for name in part.needs if (root / EXTERNAL / name).exists()]
    found |= {file: sha256(root / file) for file in files}
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in found.items()}


def make(part: Part, root: Path) -> dict[str, Any]:
    """Run a part's commands in its clone, copy what they wrote, and return what is noted of it.

    Raises:
        UserError: the checkout has changes that no commit has, a file of data/external/ is missing, a command failed,
            or a file was not written.
    """
    commit = _commit(root)
    if missing := [name for name in part.needs if not (root / EXTERNAL / name).exists()]:
        raise UserError(f"{part.name}: {', '.join(missing)}: no such file in {EXTERNAL}; put or link it there")
    clone, begun = _clone(root, part, commit)
    load, began = os.getloadavg()[0], time.monotonic()
    path = f"{root / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for command in part.commands:
        print(f"{part.name}: {command}", flush=True)
        shell: Any = {"cwd": clone, "env": os.environ | {"PATH": path}, "check": False}
        if status := subprocess.run(["bash", "-c", command], **shell).returncode:
            raise UserError(f"{part.name}: `{command}` ended with status {status}; the next run goes on from there")
    for pattern in part.writes:
        if not (written := sorted(clone.glob(pattern))):
            raise UserError(f"{part.name}: its commands wrote no {pattern}")
        for file in root.glob(pattern):
            if not (clone / file.relative_to(root)).exists():  # of a method that has another name now
                file.unlink()
        for file in written:
            (target := root / file.relative_to(clone)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    begun.unlink()
    return {
        "commit": commit,
        "day": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - began, 3),
        "code": code_of(part, clone),
        "settings": settings_of(part, clone),
    }


def _commit(root: Path) -> str:
    """Return the current commit; raise `UserError` if a file that makes evidence differs from it."""
    changed = [line[3:] for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()]
    made = (name for part in all_parts().values() for name in part.writes)
    own = ["README.md", "docs/*.md", RECORD.as_posix(), *made]
    if other := [name for name in changed if not any(Path(name).match(pattern) for pattern in own)]:
        raise UserError(f"{other[0]}: has changes that are not committed; evidence carries the commit that made it")
    return _git(root, "rev-parse", "HEAD").strip()


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def _clone(root: Path, part: Part, commit: str) -> tuple[Path, Path]:
    """Return the clone of a part, at the commit, with the part's params, and the note of what began the part there.

    What a part has written there is kept until it ends. It begins anew if its code or settings are not those that began
    it. dvc.lock is always kept: by it DVC knows what has changed.
    """
    clone = root / FOLDER / part.folder
    if not clone.is_dir():
        clone.parent.mkdir(parents=True, exist_ok=True)
        _git(root, "clone", "--quiet", str(root), str(clone))
        (clone / "data").mkdir(exist_ok=True)
        for name in (".venv-peers", EXTERNAL.as_posix()):
            (clone / name).symlink_to(root / name)
        cache = root / ".dvc" / "cache"
        (clone / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n", encoding="utf-8")
    elif _git(clone, "rev-parse", "HEAD").strip() != commit:
        open_parts = [other for other in all_parts().values() if _note(clone, other).is_file()]
        kept = {file: file.read_bytes() for file in (clone / "dvc.lock", *_written(clone, open_parts))}
        _git(clone, "fetch", "--quiet", "origin")
        _git(clone, "checkout", "--quiet", "--force", "--detach", commit)
        for file in _written(clone, open_parts):  # as the commit has it
            file.unlink()
        for file, content in kept.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    if part.params:
        params = yaml.safe_load((root / PARAMS_FILE).read_text(encoding="utf-8")) | dict(part.params)
        (clone / PARAMS_FILE).write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    begun, now = _note(clone, part), json.dumps(code_of(part, clone) | settings_of(part, clone))
    if not begun.is_file() or begun.read_text(encoding="utf-8") != now:
        for file in _written(clone, [part]):
            file.unlink()
        begun.parent.mkdir(exist_ok=True)
        begun.write_text(now, encoding="utf-8")
    return clone, begun


def _note(clone: Path, part: Part) -> Path:
    return clone / ".cache" / f"begun-{part.name}"


def _written(clone: Path, parts: Iterable[Part]) -> list[Path]:
    """Return what parts have written in a clone, without dvc.lock."""
    patterns = dict.fromkeys(pattern for part in parts for pattern in part.writes)
    return [file for pattern in patterns for file in clone.glob(pattern) if file.name != "dvc.lock"]


def check(parts: Mapping[str, Part], root: Path) -> int:
    """Print which parts were never made and which were made by other code; return the exit status."""
    made: dict[str, Any] = read_json(root / RECORD) if (root / RECORD).is_file() else {}
    found = stale(parts.values(), root, made)
    for name, scripts in found.items():
        changed = f"made by other code or settings ({', '.join(scripts)})"
        print(f"{name}: {changed}; run `make evidence PARTS={name}`", file=sys.stderr)
    if never := [name for name in parts if name not in made]:
        print(f"{RECORD}: {len(never)} of {len(parts)} parts were not made yet: {', '.join(never)}")
    return int(bool(found))


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is not current, or check that all is."""
    parser = argparse.ArgumentParser(prog="python -m tools.evidence", description="Make what README and docs/ show.")
    parser.add_argument("--check", action="store_true", help="only say what is not current")
    parser.add_argument("parts", nargs="*", help="all by default, in their order")
    given = parser.parse_args(argv)
    root, parts = Path.cwd(), all_parts()
    for name in given.parts:
        if name not in parts:
            raise unknown("part", name, list(parts))
    if given.check:
        sys.exit(check(parts, root))
    for part in (parts[name] for name in given.parts or parts):
        made: dict[str, Any] = read_json(root / RECORD) if (root / RECORD).is_file() else {}
        if part.name in made and not stale([part], root, made):
            print(f"{part.name}: current, made by {made[part.name]['commit'][:7]}")
            continue
        write_json(root / RECORD, made | {part.name: make(part, root)})


if __name__ == "__main__":
    run_stage(main)
