"""Run DVC with code.yaml up to date: `python -m tools.dvc status` is `dvc status` for the code as it is now.

`repro` first reports all mistakes in params.yaml. Before DVC starts, its files are repaired if a killed run damaged
them (tools/repair.py). When this process is told to end, the processes that it started end too. `make setup` makes the
virtual environment's `dvc` run this module. `python -m dvc` is DVC itself.
"""

import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import psutil
from dvc.cli import main
from dvc.exceptions import DvcException
from dvc.repo import Repo

from quantstudy.errors import run_stage
from quantstudy.params import PARAMS_FILE, load_params
from tools.code import CODE_FILE, refresh
from tools.processes import end
from tools.progress import Progress, known_seconds, save_seconds
from tools.repair import keep_lock_file, repair


def project() -> Path | None:
    """Return the folder of the project that the working directory lies in."""
    here = Path.cwd()
    found = (folder for folder in (here, *here.parents) if (folder / CODE_FILE).is_file())
    return next((folder for folder in found if (folder / "dvc.yaml").is_file()), None)


def run() -> None:
    """Run DVC with the arguments of this process; exit with DVC's status."""
    told: list[int] = []

    def stop(number: int, _: object) -> NoReturn:
        told.append(number)
        end(psutil.Process().children())
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    root = project()
    if root:
        prepare(root)
        if sys.argv[1:2] == ["repro"] and (root / PARAMS_FILE).is_file():
            load_params(root / PARAMS_FILE)
    progress = count_stages(root) if root and sys.argv[1:] == ["repro"] else None
    gc.freeze()
    gc.set_threshold(100_000)  # DVC reads its lock file again after each stage: a million objects without cycles
    status = main(sys.argv[1:])
    if root and progress:
        if not status:  # the last stage has ended and did not fail
            progress.end()
        with contextlib.suppress(OSError):
            save_seconds(root, progress)
    if root and (root / ".dvc").is_dir():
        with contextlib.suppress(OSError):  # a full disk: the next run keeps it
            keep_lock_file(root)
    sys.exit(128 + told[0] if told else status)


def count_stages(root: Path) -> Progress | None:
    """Let DVC's messages say how far a run of all stages is; return None if DVC cannot read the project."""
    try:
        with Repo(root) as repo:
            names = [stage.addressing for stage in repo.index.graph.nodes]
    except DvcException:
        return None
    progress = Progress(names, known_seconds(root))
    for name in ("dvc.stage", "dvc.stage.run", "dvc.stage.cache"):
        logging.getLogger(name).addFilter(progress)
    return progress


def prepare(root: Path) -> None:
    """Repair DVC's files unless another DVC runs here, hold a lock until the process ends, and write code.yaml."""
    if (root / ".dvc").is_dir():
        guard = os.open(root / ".dvc", os.O_RDONLY)  # open until the process ends, however it ends
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            repair(root)
        fcntl.flock(guard, fcntl.LOCK_SH)
    refresh(root)


if __name__ == "__main__":
    run_stage(run)
