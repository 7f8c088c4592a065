"""Run a command whose stages need not import PyTorch, a hundred times over.

`python -m tools.warm dvc repro` forks a server, which imports the heavy packages once, while the command starts, and
forks for each stage that the command runs, for several at once where `tools/jobs.py` runs them: `python -m stages
<stage> ...` finds a socket's name in the environment, hands over its arguments, folder, environment and standard files,
and ends with its exit status. No module of the project is imported before the fork, so each stage runs the code that
lies on disk. Without the variable, or on a system without pidfds (only Linux has them), a stage imports what it needs
itself; that is the only difference.

The socket has a name that no file holds, and serves this user alone. Whatever ends this process, even SIGKILL, ends the
server, and that the stage it serves.

At the end the seconds of each kind of stage are printed, and what was spent outside them.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tools.processes import end, end_with_parent

VARIABLE = "QUANTSTUDY_WARM"
PRELOAD = ("torch", "torch._dynamo", "torchvision.models", "pydantic", "tqdm", "yaml")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SCRATCH = Path(".cache") / "warm"
"""The server's temporary folder, in which PyTorch leaves one when it is imported; the next run empties it."""
ASKING_SECONDS = 5.0
"""How long who connects may take to say what it wants."""
LARGEST_REQUEST = 2**24


def main(command: Sequence[str]) -> int:
    """Run `command`, have the stages it starts served, return its exit status; a signal to end is passed on to it.

    The command is a process group of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """
    if not hasattr(os, "pidfd_open"):
        return subprocess.call(command)
    started = time.perf_counter()
    shutil.rmtree(SCRATCH, ignore_errors=True)
    report, written = os.pipe()
    watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # Linux finds a free name in a namespace beside the file system
        listener.listen()
        own = os.getpid()
        server = os.fork()
        if not server:
            _serve_stages(listener, written, own)
        os.close(written)
        early: list[int] = []
        for number in watched:
            signal.signal(number, lambda number, _: early.append(number))
        environment = os.environ | {VARIABLE: listener.getsockname()[1:].decode()}
        process = subprocess.Popen(command, env=environment, process_group=0)
    for number in watched:
        signal.signal(number, lambda number, _: _pass_on(process.pid, number))
    for number in early:
        _pass_on(process.pid, number)
    status = _exit_status(process.wait())
    os.kill(server, signal.SIGTERM)
    os.waitpid(server, 0)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    os.set_blocking(report, False)  # something that a stage has left running may hold the other end
    with contextlib.suppress(BlockingIOError):
        if lines := os.read(report, 2**20).decode().splitlines():
            print(_summary([line.split() for line in lines], time.perf_counter() - started), file=sys.stderr)
    return status


def _pass_on(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        os.killpg(group, signal.SIGCONT)  # a group that the terminal has stopped would never see it


def _exit_status(code: int) -> int:
    """Return a shell's exit status for a return code of `subprocess`."""
    return code if code >= 0 else 128 - code


def _serve_stages(listener: socket.socket, report: int, parent: int) -> NoReturn:
    """Become the server: import, then have a process for each connection run its stage."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.setpgid(0, 0)
        end_with_parent(parent)
        SCRATCH.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(SCRATCH.resolve())
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so far it ended at once
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets those that have ended
        own = os.getpid()
        while True:
            with listener.accept()[0] as connection:
                if not os.fork():
                    listener.close()
                    _attend(connection, report, own)
    finally:
        with contextlib.suppress(BaseException):
            end(psutil.Process().children())  # those who attend to stages end these; the prompt comes back after them
        os._exit(0)


def _attend(connection: socket.socket, report: int, parent: int) -> NoReturn:
    """Become the process that runs the stage of a connection and writes its name and seconds."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with_parent(parent)
        started = time.perf_counter()
        if name := _serve(connection):
            os.write(report, f"{name} {time.perf_counter() - started}\n".encode())
    finally:
        os._exit(0)


def _serve(connection: socket.socket) -> str | None:
    """Run the stage that a connection asks for and return its name; None where nothing is asked in time."""
    asked = _receive(connection)
    if not asked:
        return None
    request, files = asked
    own = os.getpid()
    child = os.fork()
    if not child:
        _run(request, files, own)
    for file in files:
        os.close(file)
    stage = psutil.Process(child)
    try:
        with os.fdopen(os.pidfd_open(child), "rb", 0) as ended:
            select.select([connection, ended], [], [])
    finally:  # it has ended, who asked is gone, or this process has to end
        end([stage])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([_exit_status(stage.wait() or 0)]))
    return request["arguments"][0]


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the request and the standard files of who connects; None for another user, and for who does not ask."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        return None
    connection.settimeout(ASKING_SECONDS)
    files: list[int] = []
    try:
        header, files, *_ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as stream:
            return json.loads(stream.read(min(int.from_bytes(header), LARGEST_REQUEST))), files
    except (OSError, ValueError):
        for file in files:
            os.close(file)
        return None


def _run(request: dict[str, Any], files: Sequence[int], parent: int) -> NoReturn:
    """Become the stage."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(parent)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        del os.environ[VARIABLE]  # the stage is run here
        if threads := os.environ.get("OMP_NUM_THREADS"):  # PyTorch read it when it was imported
            sys.modules["torch"].set_num_threads(int(threads.partition(",")[0]))
        os.chdir(request["folder"])
        tempfile.tempdir = None  # the stage's environment says it
        sys.path[0], sys.argv = request["folder"], ["stages", *request["arguments"]]
        runpy.run_module("stages", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        status = int(isinstance(left.code, str)) if not isinstance(left.code, int) else left.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _summary(served: Sequence[Sequence[str]], total: float) -> str:
    kinds: dict[str, list[float]] = {}
    for name, taken in served:
        kinds.setdefault(name, []).append(float(taken))
    inside = sum(map(sum, kinds.values()))
    lines = [f"{name:12}{len(taken):4} x {sum(taken) / len(taken):6.1f} s" for name, taken in kinds.items()]
    outside = f"{total:.0f} s in all, of them {total - inside:.0f} s ({1 - inside / total:.0%}) outside the stages"
    if inside > total:  # several ran at once
        outside = f"{total:.0f} s in all, for {inside:.0f} s of stages"
    return "\n".join(["", *lines, outside])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
