"""Write down the code that each stage runs, so that a change re-runs exactly the stages that import what changed.

Every other stage has its list among its deps. One line a module, as `sha256sum` prints it, stands for the twenty
entries a stage that DVC would write into dvc.lock, which it writes anew after each stage.
"""

from collections.abc import Sequence
from pathlib import Path

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.files import sha256, write_text
from quantstudy.imports import transitive_imports


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/code/<stage>.txt for every other script in stages/."""
    root = Path()
    for script in sorted(root.glob("stages/[!_]*.py")):
        if script.stem != "list_code":
            modules = transitive_imports(script, root)
            write_text(layout.code(script.stem), "".join(f"{sha256(path)}  {path.as_posix()}\n" for path in modules))


if __name__ == "__main__":
    run_stage(main)
