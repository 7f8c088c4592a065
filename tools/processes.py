"""End processes for good."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable

import psutil

PR_SET_PDEATHSIG = 1
PATIENCE = 10.0
"""Seconds that a process has to end by itself."""


def end(processes: Iterable[psutil.Process], patience: float = PATIENCE) -> None:
    """Ask processes and all that they started to end, wait for `patience` seconds, and kill those that do not."""
    told = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            told += [process, *process.children(recursive=True)]
    for process in told:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(told, patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(told, PATIENCE)


def end_with_parent(parent: int) -> None:
    """Have the system end this process when its parent is gone, and end now when it is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
