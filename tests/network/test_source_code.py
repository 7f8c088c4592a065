"""The local modules a script imports: all of them, found in its text and met when it runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantstudy.network.source_code import transitive_imports
from tests.conftest import ROOT

SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("stages/[!_]*.py"))
LOADED = """
import importlib, pathlib, sys
importlib.import_module(sys.argv[1])
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print(*(file for file in files if file and pathlib.Path(file).is_relative_to(pathlib.Path.cwd())), sep="\\n")
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_module_that_python_loads_is_found(script: Path) -> None:
    command = [sys.executable, "-c", LOADED, f"stages.{script.stem}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {Path(file).relative_to(ROOT) for file in printed.split()}
    loaded = {path for path in loaded if path.parts[0] in ("quantstudy", "stages")}
    assert script in loaded and loaded <= set(transitive_imports(script, ROOT))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the code."""
    for folder in ("stages", "quantstudy"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_a_planted_late_import_is_found(code: Path) -> None:
    before = transitive_imports(Path("stages/ptq.py"), code)
    (code / "quantstudy" / "planted.py").write_text("")
    helper = code / "quantstudy" / "quantization" / "packing.py"
    helper.write_text(helper.read_text() + "\n\ndef late() -> None:\n    from quantstudy import planted\n")
    after = transitive_imports(Path("stages/ptq.py"), code)
    assert set(after) - set(before) == {Path("quantstudy/planted.py")}


def test_kernels_are_code_of_their_module() -> None:
    found = transitive_imports(Path("stages/evaluate.py"), ROOT)
    assert {Path("quantstudy/runtimes/avx2.py"), Path("quantstudy/runtimes/avx2.cpp")} <= set(found)


def test_relative_imports_are_followed(tmp_path: Path) -> None:
    files = {
        "top/__init__.py": "from . import helper",
        "top/helper.py": "",
        "top/inner/__init__.py": "",
        "top/inner/network.py": "from ..deep import layer\nfrom .near import x",
        "top/inner/near.py": "",
        "top/deep.py": "",
        "top/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = transitive_imports(Path("top/inner/network.py"), tmp_path)
    assert {path.as_posix() for path in found} == set(files) - {"top/unused.py"}
    assert transitive_imports(Path("top/__init__.py"), tmp_path) == [Path("top/__init__.py"), Path("top/helper.py")]
