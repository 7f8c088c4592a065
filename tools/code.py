"""Write code.yaml: for each stage's script, the SHA-256 of all code that it runs.

DVC reads the file as params, `params: [code.yaml: [ptq]]`. So a stage runs again when its code does something else, but
not when only a comment changes. `python -m tools.dvc`, which is `dvc` in the virtual environment, writes the file
before DVC reads it.
"""

import sys
from pathlib import Path

from quantstudy.files import write_text
from quantstudy.network.source_code import scripts_sha256

CODE_FILE = Path("code.yaml")
HEADER = "# SHA-256 of the code that each stage runs. `dvc` of the virtual environment and tools/code.py write it.\n"


def refresh(root: Path, write: bool = True) -> bool:
    """Return whether code.yaml of the project at `root` was up to date; if it was not and `write` is set, update it."""
    scripts = sorted(path.relative_to(root) for path in root.glob("stages/[!_]*.py"))
    lines = (f"{script.stem}: {digest}\n" for script, digest in scripts_sha256(scripts, root).items())
    path, text = root / CODE_FILE, HEADER + "".join(lines)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return True
    if write:
        write_text(path, text)
    return False


if __name__ == "__main__":
    checking = sys.argv[1:] == ["--check"]
    if not refresh(Path(), write=not checking) and checking:
        sys.exit(f"{CODE_FILE} is not of this code; run `python -m tools.code`")
