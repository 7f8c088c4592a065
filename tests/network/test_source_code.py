"""The local modules a script imports, found in its text and met when it runs; the digest of what they do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantstudy.network.source_code import scripts_sha256, transitive_imports
from tests.conftest import ROOT

SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("stages/[!_]*.py"))
LOADED = """
import importlib, pathlib, sys
importlib.import_module(sys.argv[1])
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print(*(file for file in files if file and pathlib.Path(file).is_relative_to(pathlib.Path.cwd())), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_module_that_python_loads_is_found(script: Path) -> None:
    command = [sys.executable, "-c", LOADED, f"stages.{script.stem}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {Path(file).relative_to(ROOT) for file in printed.split()}
    loaded = {path for path in loaded if path.parts[0] in ("quantstudy", "stages")}
    assert script in loaded and loaded <= set(transitive_imports(script, ROOT))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


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
    write(tmp_path, files)
    found = transitive_imports(Path("top/inner/network.py"), tmp_path)
    assert {path.as_posix() for path in found} == set(files) - {"top/unused.py"}
    assert transitive_imports(Path("top/__init__.py"), tmp_path) == [Path("top/__init__.py"), Path("top/helper.py")]


FILES = {
    "run.py": "import top.model\nfrom top import other",
    "top/__init__.py": "",
    "top/model.py": 'NAME = "weights.txt"\n\ndef double(x):\n    """Double."""\n    return 2 * x\n',
    "top/weights.txt": "1 2 3",
    "top/unread.txt": "4 5 6",
    "top/other.py": "X = 1\n",
}
SAME = {
    "comment": ("top/model.py", FILES["top/model.py"].replace("2 * x", "2 * x  # twice")),
    "docstring": ("top/model.py", FILES["top/model.py"].replace('"""Double."""', '"""Return x twice."""')),
    "no docstring": ("top/model.py", FILES["top/model.py"].replace('    """Double."""\n', "")),
    "layout": ("top/model.py", FILES["top/model.py"].replace("2 * x", "(2\n        * x)")),
    "docstring of a constant": ("top/other.py", 'X = 1\n"""One."""\n'),
    "file that none reads": ("top/unread.txt", "7"),
    "module that none imports": ("top/new.py", "Y = 2"),
}
OTHER = {
    "line": ("top/model.py", FILES["top/model.py"].replace("2 * x", "3 * x")),
    "string": ("top/other.py", 'X = "1"\n'),
    "order": ("top/other.py", "Z = 0\nX = 1\n"),
    "file that one reads": ("top/weights.txt", "1 2 4"),
    "package": ("top/__init__.py", "import os"),
    "late import": ("top/other.py", "X = 1\n\ndef late():\n    import top.new\n"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(tmp_path, FILES)


def digest(tree: Path) -> str:
    script = Path("run.py")
    found = scripts_sha256([script], tree)[script]
    shutil.rmtree(tree / ".cache", ignore_errors=True)
    assert scripts_sha256([script], tree)[script] == found  # what was kept of the texts is what they give
    return found


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_a_change_of_what_runs_and_no_other_changes_the_digest(tree: Path, change: str) -> None:
    before = digest(tree)
    name, text = (SAME | OTHER)[change]
    (tree / name).write_text(text)
    assert (digest(tree) == before) == (change in SAME)


def test_a_link_to_params_is_no_code(tree: Path) -> None:
    before = digest(tree)
    (tree / "top" / "weights.txt").unlink()
    without = digest(tree)
    (tree / "params.yaml").write_text("1")
    (tree / "top" / "weights.txt").symlink_to("../params.yaml")
    assert digest(tree) == without != before
