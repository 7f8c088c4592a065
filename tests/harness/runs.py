"""Kill runs and fill their disks, then run again: `python -m tests.harness.runs --kills 60 --disks 10`.

Each trial is a fresh project with the code, a short DAG and a tiny study, run as `make repro` runs it. A sixth of the
kills aim at DVC while it writes its lock file; the counts say how many cut it. Of the others every second is SIGTERM to
the outer process, which has to end all others, and the rest SIGKILL to all at once. A disk is a tmpfs (it takes root)
that fills up at another write each time. The run after that must end well, without a hand, a traceback or a file that
an undisturbed run has not, and with the same outputs but for what is a time. The counts go to
reports/reliability/runs.json, and with `--jobs 3`, three stages at once, to jobs.json.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.conftest import ROOT
from tests.harness.record import record
from tests.params import FEW, TINY, TINY_PARAMS

STAGES = ("download", "finetune", "calibrate", "ptq", "outliers")
WARM = (sys.executable, "-m", "tools.warm", sys.executable, "-m")
COMMANDS = {1: (*WARM, "tools.dvc", "repro")}
"""How a project is run, by the number of stages at once."""
TIMED = re.compile("latency|speedup|memory|timings|load|busy|second|waiting")
HANGS = 300.0
"""Seconds after which a run hangs."""


def make_project(root: Path, stages: Sequence[str] = STAGES) -> Path:
    """Write a project with one tiny study and some of the stages, a git and a DVC repository, and nothing run."""
    for folder in ("quantstudy", "stages", "tools"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("code.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / file, root)
    dag = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    few = FEW | {"ptq": ["int8_static"], "export": FEW["export"] | {"ptq": ["int8_static"]}}
    data = TINY["data"] | {"max_train": 64, "max_test": 32}
    tiny = TINY | {"data": data, "model": {"architecture": "vgg11_small"}}
    params = TINY_PARAMS | few | {"studies": {"tiny": tiny}}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {name: dag[name] for name in stages}}))
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    dvc = (sys.executable, "-m", "dvc")
    commit = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start")
    for command in (("git", "init", "-q"), (*dvc, "init", "-q")):
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    for command in (("git", "add", "-A"), commit):
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


class Run:
    """A run of the project at `root` that has been started."""

    def __init__(self, root: Path, jobs: int = 1) -> None:
        self.root, self.output = root, root.parent / f"{root.name}.txt"
        temporary, cache = root.parent / f"{root.name}.tmp", root / ".dvc" / "tmp" / "site"
        temporary.mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "TMPDIR": str(temporary), "DVC_SITE_CACHE_DIR": str(cache)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(root / ".cache" / "inductor")  # as the Makefile does
        with self.output.open("w") as file:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            command = COMMANDS.get(jobs, (*WARM, "tools.jobs", "--jobs", str(jobs)))
            self.process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True, **streams)

    def processes(self) -> list[psutil.Process]:
        """Return what runs of it, the outer process first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            outer = psutil.Process(self.process.pid)
            return [outer, *outer.children(recursive=True)]
        return []

    def kill(self, first: psutil.Process | None = None) -> None:
        """Kill all of it at once."""
        if first:
            with contextlib.suppress(psutil.NoSuchProcess):
                first.kill()
        found = self.processes()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(found, HANGS)

    def complaint(self, succeeds: bool) -> str:
        """Wait for the end; return what is wrong with it, nothing where that is as it should be."""
        try:
            status = self.process.wait(HANGS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "hangs"
        if "Traceback" in self.output.read_text():
            return "tracebacks"
        return "lost" if succeeds and status else ""


def outputs(root: Path) -> dict[str, Any]:
    """Return all files of a project but its caches, by name; those with times in them without the times."""
    skipped = (".git/", ".dvc/", ".cache/", "quantstudy/", "stages/", "tools/")
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name: _content(root / name) for name in names if not name.startswith(skipped)}


def _content(path: Path) -> Any:
    if path.name == "dvc.lock":
        return sorted(yaml.safe_load(path.read_text())["stages"])
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".csv":
        header, *rows = (line.split(",") for line in path.read_text().splitlines())
        return [[cell for name, cell in zip(header, row, strict=True) if not TIMED.search(name)] for row in rows]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not TIMED.search(key)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


class Harness:
    """Trials of one project against an undisturbed run of it."""

    def __init__(self, folder: Path, stages: Sequence[str], jobs: int) -> None:
        self.folder, self.counts, self.jobs = folder, Counter[str](), jobs
        self.template = make_project(folder / "template", stages)
        self.trials = 0
        started = time.perf_counter()
        calm = Run(self.fresh(folder))  # by plain DVC, whatever the number of jobs
        if complaint := calm.complaint(True):
            raise SystemExit(f"the undisturbed run: {complaint}\n{calm.output.read_text()}")
        self.seconds = time.perf_counter() - started
        self.expected, self.size = outputs(calm.root), _bytes(calm.root)

    def fresh(self, folder: Path) -> Path:
        """Return a new copy of the project, with nothing run."""
        self.trials += 1
        return Path(shutil.copytree(self.template, folder / f"trial{self.trials}", symlinks=True))

    def judge(self, root: Path, complaint: str) -> None:
        """Run again what was disturbed; count what is wrong, and keep the folder then."""
        again = Run(root, self.jobs)
        later = again.complaint(True)
        complaint = complaint or later or self._difference(root)
        self.counts[complaint or "as undisturbed"] += 1
        print(json.dumps(self.counts), file=sys.stderr, flush=True)
        if complaint:
            print(f"trial {root.name}: {complaint}\n{again.output.read_text()[-2000:]}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(root)

    def _difference(self, root: Path) -> str:
        found = outputs(root)
        if self.jobs > 1 and not _is_clean(root):
            return "dvc status is not clean"
        temporary = root.parent / f"{root.name}.tmp"
        if found.keys() - self.expected.keys() or any(temporary.iterdir()) or (root / ".git" / "index.lock").exists():
            return f"left behind: {[*found.keys() - self.expected.keys(), *temporary.iterdir()]}"
        names = sorted(found.keys() | self.expected.keys())
        return ", ".join(name for name in names if found.get(name) != self.expected.get(name))

    def kill_at(self, moment: float, number: signal.Signals) -> None:
        """Kill a run after `moment` seconds: all of it, or its outer process by SIGTERM."""
        run = Run(self.fresh(self.folder), self.jobs)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(moment)
        complaint, started = "", run.processes()
        if number == signal.SIGKILL:
            run.kill()
        else:
            run.process.send_signal(number)
            complaint = run.complaint(False)
            if any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started):
                complaint = complaint or "left running"
        self.counts["kills"] += 1
        self.judge(run.root, complaint)

    def kill_while_locking(self, place: int) -> None:
        """Kill a run while DVC writes its lock file for the `place`-th time."""
        run = Run(self.fresh(self.folder), self.jobs)
        lock, seen, size = run.root / "dvc.lock", 0, -1
        dvc: psutil.Process | None = None
        while run.process.poll() is None and seen < place:
            before, size = size, lock.stat().st_size if lock.exists() else -1
            seen += size == 0 and before != 0
            dvc = dvc or next((process for process in run.processes() if _is_dvc(process)), None)
            time.sleep(0.0005)
        run.kill(first=dvc)
        self.counts["kills"] += 1
        self.counts["kills that cut the lock file"] += not lock.read_bytes().endswith(b"\n")
        self.judge(run.root, "")

    def fill_disk(self, share: float) -> None:
        """Give a run a share of the room that it needs; then give it enough."""
        with _disk(self.folder / "disk", _bytes(self.template) + share * (self.size - _bytes(self.template))) as disk:
            run = Run(self.fresh(disk), self.jobs)
            complaint = run.complaint(False)
            self.counts["disks"] += 1
            self.counts["disks that were full"] += run.process.returncode != 0
            subprocess.run(["mount", "-o", f"remount,size={4 * self.size:.0f}", str(disk)], check=True)
            self.judge(run.root, complaint)


def _is_clean(root: Path) -> bool:
    command = [sys.executable, "-m", "tools.dvc", "status"]
    return "up to date" in subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout


def _is_dvc(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[1:3] in (["-m", "tools.dvc"], ["-m", "tools.jobs"])
    return False


def _bytes(root: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))


@contextlib.contextmanager
def _disk(path: Path, size: float) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size:.0f}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def harness(kills: int, disks: int, stages: Sequence[str] = STAGES, jobs: int = 1) -> dict[str, int]:
    """Try it and return the counts; every trial has to be `as undisturbed`."""
    with tempfile.TemporaryDirectory() as folder:
        trials = Harness(Path(folder), stages, jobs)
        locking = max(kills // 6, min(kills, 1))
        for place in range(locking):
            trials.kill_while_locking(1 + place % len(stages))
        for place in range(kills - locking):
            number = signal.SIGTERM if place % 2 else signal.SIGKILL
            trials.kill_at(trials.seconds * (place + 0.5) / (kills - locking), number)
        for place in range(disks if os.geteuid() == 0 else 0):
            trials.fill_disk((place + 0.5) / disks)
        return dict(trials.counts)


def main(argv: Sequence[str] | None = None) -> None:
    """Try it and write the counts down; exit with 1 where a trial did not end as the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="stages at once")
    arguments = parser.parse_args(argv)
    counts = harness(arguments.kills, arguments.disks, jobs=arguments.jobs)
    record("runs" if arguments.jobs == 1 else "jobs", counts)
    sys.exit(counts["as undisturbed"] != counts["kills"] + counts.get("disks", 0))


if __name__ == "__main__":
    main()
