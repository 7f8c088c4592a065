"""Run a command whose stages need not import PyTorch, a hundred times over.

`python -m tools.warm dvc repro` imports the heavy packages once, while the command starts, and forks for each stage
that the command runs: `python -m stages <stage> ...` finds a socket's path in the environment, hands over its
arguments, folder, environment and standard files, and ends with the stage's exit status. No module of the project is
imported before the fork, so each stage runs the code that lies on disk. Without the variable, or on a system without
pidfds (only Linux has them), a stage imports what it needs itself; that is the only difference.

At the end the seconds of each kind of stage are printed, and what was spent outside them.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "QUANTSTUDY_WARM"
PRELOAD = ("torch", "torch._dynamo", "torchvision.models", "pydantic", "tqdm", "yaml")


def main(command: Sequence[str]) -> int:
    """Run `command`, serve the stages it starts, return its exit status; a signal to end is passed on to it.

    The command is a process group of its own, so that a terminal's Ctrl-C reaches it once, from here.
    """
    if not hasattr(os, "pidfd_open"):
        return subprocess.call(command)
    started, seconds = time.perf_counter(), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "stages")
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen(command, env=os.environ | {VARIABLE: path}, process_group=0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: _pass_on(process.pid, number))
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
        with os.fdopen(os.pidfd_open(process.pid), "rb", 0) as ended:
            while ended not in select.select([listener, ended], [], [])[0]:
                with listener.accept()[0] as connection:
                    name, taken = _serve(connection)
                    seconds.setdefault(name, []).append(taken)
    if seconds:
        print(_summary(seconds, time.perf_counter() - started), file=sys.stderr)
    return _exit_status(process.wait())


def _pass_on(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        os.killpg(group, signal.SIGCONT)  # a group that the terminal has stopped would never see it


def _exit_status(code: int) -> int:
    """Return a shell's exit status for a return code of `subprocess`."""
    return code if code >= 0 else 128 - code


def _serve(connection: socket.socket) -> tuple[str, float]:
    """Run the stage that a connection asks for; return its name and the seconds it took."""
    header, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        try:
            request = json.loads(stream.read(int.from_bytes(header)))
        except ValueError:  # who asked is gone already
            return "nothing", 0.0
    started = time.perf_counter()
    child = os.fork()
    if not child:
        _run(request, files)
    for file in files:
        os.close(file)
    with os.fdopen(os.pidfd_open(child), "rb", 0) as ended:
        if ended not in select.select([connection, ended], [], [])[0]:  # who asked is gone
            os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([_exit_status(status)]))
    return request["arguments"][0], time.perf_counter() - started


def _run(request: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Become the stage."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        del os.environ[VARIABLE]  # the stage is run here
        os.chdir(request["folder"])
        sys.path[0], sys.argv = request["folder"], ["stages", *request["arguments"]]
        runpy.run_module("stages", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = int(isinstance(end.code, str)) if not isinstance(end.code, int) else end.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _summary(seconds: dict[str, list[float]], total: float) -> str:
    inside = sum(map(sum, seconds.values()))
    lines = [f"{name:12}{len(taken):4} x {sum(taken) / len(taken):6.1f} s" for name, taken in seconds.items()]
    outside = f"{total:.0f} s in all, of them {total - inside:.0f} s ({1 - inside / total:.0%}) outside the stages"
    return "\n".join(["", *lines, outside])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
