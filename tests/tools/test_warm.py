import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow  # each imports PyTorch anew

STAGE = """
import os, signal, sys
print("torch" in sys.modules, sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), __name__)
if sys.argv[1] == "mistake":
    sys.exit("error: a mistake")
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "broken":
    raise ValueError("broken")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    shutil.copy(ROOT / "stages" / "__main__.py", tmp_path / "stages")
    (tmp_path / "stages" / "hello.py").write_text(STAGE)
    return tmp_path


def start(folder: Path, script: str, *, warm: bool) -> subprocess.Popen[str]:
    """Start a shell script in `folder`, whose temporary files lie there too."""
    command = [sys.executable, "-m", "tools.warm"] if warm else []
    (folder / "temporary").mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(ROOT)}
    script = script.replace("python", sys.executable)
    command += ["sh", "-c", script]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1)


def shell(folder: Path, script: str, *, warm: bool) -> subprocess.CompletedProcess[str]:
    process = start(folder, script, warm=warm)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(script, process.returncode, output, errors)


def test_a_stage_finds_the_packages_imported_and_its_own_arguments_folder_and_environment(folder: Path) -> None:
    done = shell(folder, "COLOUR=red python -m stages hello a 'b c'", warm=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"True ['a', 'b c'] {folder} red __main__\n"
    assert "hello          1 x" in done.stderr and "outside the stages" in done.stderr


def test_without_the_warm_process_a_stage_runs_by_itself(folder: Path) -> None:
    done = shell(folder, "python -m stages hello a", warm=False)
    assert done.stdout == f"False ['a'] {folder} None __main__\n"


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(("argument", "text"), [("mistake", "error: a mistake"), ("broken", "ValueError: broken")])
def test_a_failing_stage_fails_the_same_way(folder: Path, warm: bool, argument: str, text: str) -> None:
    done = shell(folder, f"python -m stages hello {argument}", warm=warm)
    assert done.returncode == 1
    assert text in done.stderr


def test_a_killed_stage_is_reported_as_a_shell_would_and_an_edited_one_runs_as_edited(folder: Path) -> None:
    assert shell(folder, "python -m stages hello killed", warm=True).returncode == 128 + 9
    edit = "python -m stages hello a; echo 'print(42)' > stages/hello.py; python -m stages hello a"
    assert shell(folder, edit, warm=True).stdout.endswith("__main__\n42\n")


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_an_unknown_stage_is_one_line(folder: Path, warm: bool) -> None:
    done = shell(folder, "python -m stages bye", warm=warm)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python -m stages STAGE ...; STAGE is one of hello\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_ends_the_command_and_leaves_no_file(folder: Path, number: signal.Signals) -> None:
    trap = "trap 'echo told; exit 7' INT TERM; python -m stages hello a; while :; do sleep 0.1; done"
    process = start(folder, trap, warm=True)
    assert process.stdout and process.stdout.readline().startswith("True")
    assert list(folder.glob("temporary/*/stages"))
    time.sleep(0.5)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "told\n" and process.returncode == 7
    assert not list(folder.glob("temporary/tmp*"))
