"""A stage on a machine that does not share the driver's folder: its files come and go through DVC's remote."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from quantstudy.files import write_text
from tools.code import CODE_FILE, refresh
from tools.ledger import save
from tools.worker import STATE, NodeRefused, Order


def take_over(folder: Path, order: Order) -> None:
    """Make a clone what the driver's folder is for one stage: its params, its lock file, and what the stage reads.

    Raises:
        NodeRefused: the clone's code is another, or the remote has not what the stage reads.
    """
    os.chdir(folder)  # DVC's names of stages are relative to it
    check_code(folder, order.texts[str(CODE_FILE)])
    with _alone_in(folder):
        for name, text in order.texts.items():
            if name != str(CODE_FILE):
                write_text(folder / name, text)
        with Repo(folder) as repo:
            if order.pulls:
                repo.pull(targets=[str(folder / path) for path in order.pulls], force=True)
            (stage,) = repo.stage.collect(order.name)
            with repo.lock:
                stage.remove_outs()


def check_code(folder: Path, code: str) -> None:
    """Compare a clone's code.yaml, which is brought up to date, with the driver's.

    Raises:
        NodeRefused: they differ.
    """
    with _alone_in(folder):
        refresh(folder)
        if (folder / CODE_FILE).read_text(encoding="utf-8") != code:
            raise NodeRefused(f"{platform.node()}: {folder} has other code than the driver; check out the same commit")


def push(folder: Path, name: str) -> None:
    """Send what a stage has made to the remote, with its entry of the run cache."""
    with _alone_in(folder), Repo(folder) as repo:
        (stage,) = repo.stage.collect(name)
        with repo.lock:
            failed = save([stage])
        if failed:
            raise DvcException(failed[name])
        repo.push(targets=[name], run_cache=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other workers of this machine off the clone's DVC."""
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    with (folder / STATE / "dvc").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
