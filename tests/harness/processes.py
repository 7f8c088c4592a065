"""Processes that a test has ended."""

import contextlib
from collections.abc import Iterable

import psutil


def running(processes: Iterable[psutil.Process], seconds: float = 0) -> list[psutil.Process]:
    """Return those that have not ended after some seconds.

    One that has ended stays a zombie until its parent asks for its status. Where the parent has ended too, that is
    init, which may take its time, and in a container may never ask.
    """
    found = []
    for process in psutil.wait_procs(processes, seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
