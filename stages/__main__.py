"""`python -m stages ptq --study ...` runs `stages/ptq.py`, in a warm process where there is one.

DVC runs stages this way. One whose code is not what code.yaml says is refused then: DVC would write down that it ran
other code than it did.
"""

import json
import os
import runpy
import socket
import sys
from pathlib import Path

STAGES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def ask(arguments: list[str]) -> int | None:
    """Have a stage run by `tools/warm.py`; return its exit status, or None where no such process is."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ["QUANTSTUDY_WARM"])
        except (KeyError, OSError):
            return None
        request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8)], range(3))
        connection.sendall(content)
        answer = connection.recv(1)
        return answer[0] if answer else 1


def check_code(stage: str) -> None:
    """Exit with one line when code.yaml has another digest of a stage's code than the code gives."""
    from quantstudy.network.source_code import scripts_sha256

    script, listed = Path("stages") / f"{stage}.py", Path("code.yaml")
    digest = scripts_sha256([script], Path())[script]
    if not listed.is_file() or f"{stage}: {digest}" not in listed.read_text(encoding="utf-8").splitlines():
        sys.exit(f"error: code.yaml: {stage} is not of this code; use .venv/bin/dvc, or run `python -m tools.code`")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"usage: python -m stages STAGE ...; STAGE is one of {', '.join(STAGES)}")
    if (status := ask(sys.argv[1:])) is not None:
        sys.exit(status)
    name = sys.argv.pop(1)
    if "DVC_STAGE" in os.environ:
        check_code(name)
    sys.argv[0] = f"stages/{name}.py"
    runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
