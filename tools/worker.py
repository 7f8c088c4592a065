"""What a Ray worker does for `tools/jobs.py`: it runs the command of one stage, as DVC would, and says how it ended.

A worker that sees the folder of the driver runs the stage there. One whose `ray start` had QUANTSTUDY_FOLDER set has
a clone of its own in that folder: there it pulls what the stage needs from DVC's remote, runs it, and pushes what it
made, the run cache included.
"""

import contextlib
import fcntl
import functools
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from stages.__main__ import ask
from tools.processes import end, end_with_parent

FOLDER_VARIABLE = "QUANTSTUDY_FOLDER"
STATE = Path(".cache") / "jobs"
"""Where logs, locks and the token lie, in each project folder."""
TOKEN = STATE / "token"
"""A worker that reads the driver's token in this file shares the driver's folder."""
LOG_TAIL = 100_000
"""Bytes of a log that travel from another machine."""


class StageKilled(RuntimeError):
    """Somebody killed a stage's process: the system for its memory, or a person. It is worth another try."""


class NodeRefused(RuntimeError):
    """A machine cannot run stages: it has no clone of the project, or of another version."""


@dataclass(frozen=True)
class Order:
    """One stage to run.

    `threads` become OMP_NUM_THREADS; None leaves it as a plain `dvc repro` has it. `alone` says that it times on the
    CPU, beside nothing else. `pulls` are the files of other stages that it reads. `texts` are the driver's dvc.lock,
    dvc.yaml, params.yaml and code.yaml, which a clone elsewhere takes over or is held to.
    """

    name: str
    command: str
    root: str
    token: str
    threads: str | None
    alone: bool
    warm: str = ""
    pulls: tuple[str, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: the exit status, the seconds that its command took, where, and the end of its log."""

    status: int
    seconds: float
    node: str
    shared: bool
    log: str


def log_file(name: str) -> Path:
    """Return where a stage's output goes, in the project's folder."""
    return STATE / "logs" / f"{name}.log"


def run(order: Order) -> Outcome:
    """Run a stage and return how it ended.

    Raises:
        StageKilled: its process was killed.
        NodeRefused: this machine has no clone of the project's version.
    """
    folder, shared = find_folder(order.root, order.token)
    if not shared:
        from tools.elsewhere import push, take_over

        take_over(folder, order)
    log = folder / log_file(order.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with timing_lock(folder) if order.alone else contextlib.nullcontext():
        started = time.monotonic()
        with log.open("wb") as output:
            status = _run_command(order, folder, output.fileno())
        seconds = time.monotonic() - started
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise StageKilled(f"{order.name} was killed on {platform.node()}")
    if not shared and not status:
        push(folder, order.name)
    tail = log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
    return Outcome(status, seconds, platform.node(), shared, tail)


@contextlib.contextmanager
def timing_lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold what a stage that times on the CPU holds while it runs, and the driver while it writes dvc.lock.

    Yields whether it is held; without `wait` it may not be.
    """
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    with (folder / STATE / f"timing-{platform.node()}").open("wb") as file:  # machines may share the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def find_folder(root: str, token: str) -> tuple[Path, bool]:
    """Return the project's folder on this machine, and whether it is the driver's, which holds the `token`.

    Raises:
        NodeRefused: there is none.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE, root))
    with contextlib.suppress(OSError):
        if (folder / TOKEN).read_text(encoding="utf-8") == token:
            return folder, True
    if FOLDER_VARIABLE not in os.environ or not (folder / "dvc.yaml").is_file():
        raise NodeRefused(
            f"{platform.node()}: {folder} is not the driver's folder and no clone of the project; "
            f"set {FOLDER_VARIABLE} to a clone where `ray start` runs"
        )
    return folder, False


def shares_folder(root: str, token: str, code: str) -> bool:
    """Return whether this machine sees the driver's folder, whose code.yaml is `code`.

    Raises:
        NodeRefused: it does not, and has no clone of the same code either.
    """
    folder, shared = find_folder(root, token)
    if not shared:
        from tools.elsewhere import check_code

        check_code(folder, code)
    return shared


def _run_command(order: Order, folder: Path, output: int) -> int:
    """Run a stage's command in a shell, as DVC does, or in the warm process; whatever ends this process ends it too."""
    environment = os.environ | {
        "DVC_ROOT": str(folder),
        "DVC_STAGE": order.name,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("OMP_NUM_THREADS", None)  # Ray sets it
    if order.threads:
        environment["OMP_NUM_THREADS"] = order.threads
    if order.warm:
        environment["QUANTSTUDY_WARM"] = order.warm
    words = order.command.split()
    if words[:3] == ["python", "-m", "stages"] and order.command == shlex.join(words):
        with Path(os.devnull).open() as nothing:
            status = ask(words[3:], folder, environment, (nothing.fileno(), output, output))
        if status is not None:
            return status
    process = subprocess.Popen(
        ["/bin/sh", "-c", order.command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=functools.partial(end_with_parent, os.getpid()),
    )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            end([psutil.Process(process.pid)])
