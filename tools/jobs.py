"""Run the stages of the DAG side by side: `python -m tools.jobs --jobs 4 [--address auto] [targets]`.

Ray (https://docs.ray.io) gives each stage its GPU or its cores, on this machine or on those of a cluster, and tries a
stage again elsewhere whose worker died. This process decides what may run (tools/scheduler.py), and is the only one
that writes dvc.lock (tools/ledger.py). What a stage takes is `meta: {takes: ...}` in dvc.yaml:

- `machine`: it times. On a CPU it runs beside nothing else on its machine; with GPUs it has one to itself.
- `device`: it computes. It gets a GPU if there are any, else as many cores as it would have alone (`runtime.threads`,
  all by default), so that its result does not depend on the number of jobs.
- `devices`: it trains, in `runtime.processes` processes, each of which takes that.
- nothing: one core.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from quantstudy.errors import UserError, run_stage
from quantstudy.params import load_params
from quantstudy.params.project import Runtime
from tools import worker
from tools.dvc import prepare, project
from tools.ledger import Ledger
from tools.live import Board
from tools.pool import Pool, connect, scratch
from tools.processes import end
from tools.scheduler import PATIENCE, Jobs


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run what has to run; exit with 1 if a stage failed, with 128 and the signal's number after a signal."""
    parser = argparse.ArgumentParser(prog="python -m tools.jobs", description="Run stages side by side, with Ray.")
    parser.add_argument("--jobs", type=int, help="stages at once; by default as many as there are cores or GPUs")
    parser.add_argument("--address", help="of a Ray cluster, `auto` for the one that runs here; else Ray is started")
    parser.add_argument("targets", nargs="*", help="stages; with what they need they are all that runs")
    given = parser.parse_args(argv)
    if given.jobs is not None and given.jobs < 1:
        raise UserError(f"--jobs: {given.jobs} is not a number of stages, which is 1 or more")
    logging.getLogger("dvc").setLevel(logging.WARNING)
    root = project()
    if root is None:
        raise UserError("no project: no folder from here up has a dvc.yaml and a code.yaml")
    os.chdir(root)
    prepare(root)
    params = load_params()
    for number in _watched():  # until the first stage may run there is nothing to write down
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with _only_run(root):
        try:
            ledger = Ledger(given.targets)
            pool, jobs = connect(given.address, given.jobs)
            status = _run(ledger, pool, jobs, params.runtime)
        finally:
            end(psutil.Process().children(), PATIENCE)  # Ray, if it was started here and the run did not end well
            shutil.rmtree(scratch(), ignore_errors=True)
    sys.exit(status)


def _watched() -> list[signal.Signals]:
    """Return the signals that end a run; `nohup` has one of them ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def _only_run(root: Path) -> Iterator[None]:
    """Keep other runs of this program out of a folder.

    Raises:
        UserError: one is at work there.
    """
    (root / worker.STATE).mkdir(parents=True, exist_ok=True)
    with (root / worker.STATE / "run").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("--jobs: another run with --jobs works in this folder; wait for it or end it") from None
        yield


def _run(ledger: Ledger, pool: Pool, jobs: int, runtime: Runtime) -> int:
    """Run what has to run and return the exit status."""
    with Board(Path.cwd(), list(ledger.stages), jobs) as board:
        run = Jobs(ledger, pool, jobs, board, runtime)
        for number in _watched():
            signal.signal(number, lambda number, _: run.told.append(number))
        try:
            run.run()
        finally:
            run.stop()
            with contextlib.suppress(OSError):
                board.save()
    for name, reason in run.failed.items():
        print(f"failed: {name}: {reason}\n  its log: {worker.log_file(name)}", file=sys.stderr)
    return 128 + run.told[0] if run.told else int(bool(run.failed or run.waiting or run.ended))


if __name__ == "__main__":
    run_stage(main)
