"""Run a command whose stages need not import PyTorch, a hundred times over.

`python -m quantstudy.warm dvc repro` imports the heavy packages once, while the command starts, and forks for each
stage that the command runs: `python -m stages <stage> ...` finds a socket's path in the environment, hands over its
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

VARIABLE = "QUANTSTUDY_WARM"
PRELOAD = ("torch", "torch._dynamo", "torchvision.models", "pydantic", "tqdm", "yaml")
_HEADER = 8
_STANDARD_FILES = 3


def main(command: Sequence[str]) -> int:
    """Run `command`, serve the stages it starts, return its exit status."""
    if not hasattr(os, "pidfd_open"):
        return subprocess.call(command)
    started, seconds = time.perf_counter(), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "stages")
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen(command, env=os.environ | {VARIABLE: path})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command and the stages get it too, and end
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
        with _pidfd(process.pid) as ended:
            while ended not in (ready := select.select([listener, ended], [], [])[0]):
                assert ready
                with listener.accept()[0] as connection:
                    name, taken = _serve(connection)
                    seconds.setdefault(name, []).append(taken)
    if seconds:
        print(_summary(seconds, time.perf_counter() - started), file=sys.stderr)
    return process.wait()


def ask(arguments: Sequence[str]) -> int | None:
    """Have a stage run by the process above; return its exit status, or None where there is no such process."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[VARIABLE])
        except (KeyError, OSError):
            return None
        request = {"arguments": list(arguments), "folder": str(Path.cwd()), "environment": dict(os.environ)}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(_HEADER)], range(_STANDARD_FILES))
        connection.sendall(content)
        answer = connection.recv(1)
        return answer[0] if answer else 1


def _serve(connection: socket.socket) -> tuple[str, float]:
    """Run the stage that a connection asks for; return its name and the seconds it took."""
    header, files, *_ = socket.recv_fds(connection, _HEADER, _STANDARD_FILES)
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
    with _pidfd(child) as ended:
        if ended not in select.select([connection, ended], [], [])[0]:  # who asked is gone
            os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([status if status >= 0 else 128 - status]))
    return request["arguments"][0], time.perf_counter() - started


def _run(request: dict[str, object], files: list[int]) -> None:
    """Become the stage. Does not return."""
    status = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        os.chdir(str(request["folder"]))
        sys.path[0] = str(request["folder"])
        sys.modules.pop("quantstudy", None)  # it is imported from that folder, whichever it is
        status = run_here(request["arguments"])  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def run_here(arguments: Sequence[str]) -> int:
    """Run a stage in this process, return its exit status; like Python, print the text of a `SystemExit`."""
    stage, *rest = arguments
    sys.argv = [f"stages/{stage}.py", *rest]
    try:
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _pidfd(pid: int):  # type: ignore[no-untyped-def]
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _summary(seconds: dict[str, list[float]], total: float) -> str:
    inside = sum(map(sum, seconds.values()))
    lines = [f"{name:12}{len(taken):4} x {sum(taken) / len(taken):6.1f} s" for name, taken in seconds.items()]
    outside = f"{total:.0f} s in all, of them {total - inside:.0f} s ({1 - inside / total:.0%}) outside the stages"
    return "\n".join(["", *lines, outside])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
