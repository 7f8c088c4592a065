"""`python -m stages ptq --study ...` runs `stages/ptq.py`, in a warm process (`tools/warm.py`) if there is one.

DVC runs stages this way. Under DVC a stage is refused if its code does not match code.yaml, and it fails if its code
changes while it runs: DVC would record other code than it ran.
"""

import contextlib
import json
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantstudy.errors import run_stage

STAGES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def ask(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], files: Sequence[int] = (0, 1, 2)
) -> int | None:
    """Let the process of `tools/warm.py` run a stage; return its exit status, or None if there is no such process."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect("\0" + environment["QUANTSTUDY_WARM"])
        except (KeyError, OSError):
            return None
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        content = json.dumps(request).encode()
        with contextlib.suppress(ConnectionError):
            socket.send_fds(connection, [len(content).to_bytes(8)], files)
            connection.sendall(content)
            if answer := connection.recv(1):
                return answer[0]
        sys.exit("error: the process that runs the stages has ended; run it again")


def code_digest(stage: str) -> str:
    """Return the digest of the code that a stage runs."""
    from quantstudy.network.source_code import scripts_sha256

    script = Path("stages") / f"{stage}.py"
    return scripts_sha256([script], Path())[script]


def run(name: str, arguments: list[str]) -> None:
    """Run a stage, in a warm process if there is one; exit with the stage's status if that is not 0.

    The warm process calls this function too. It has no other process to ask, so it checks the code and runs the stage.
    """
    if status := ask([name, *arguments], Path.cwd(), os.environ):
        sys.exit(status)
    if status is None:
        (run_checked if "DVC_STAGE" in os.environ else run_here)(name, arguments)


def run_here(name: str, arguments: list[str]) -> None:
    """Run a stage in this process."""
    sys.argv = [f"stages/{name}.py", *arguments]
    runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)


def run_checked(name: str, arguments: list[str]) -> None:
    """Run a stage; exit with one line if its code does not match code.yaml, or changes while the stage runs."""
    digest, listed = code_digest(name), Path("code.yaml")
    if not listed.is_file() or f"{name}: {digest}" not in listed.read_text(encoding="utf-8").splitlines():
        sys.exit(f"error: code.yaml: {name} is not of this code; use .venv/bin/dvc, or run `python -m tools.code`")
    run_here(name, arguments)
    if code_digest(name) != digest:
        sys.exit(f"error: the code of {name} changed while it ran; run it again")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m stages STAGE ...; STAGE is one of {', '.join(STAGES)}")
    stage, *others = sys.argv[1:]
    run_stage(lambda: run(stage, others))
