import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

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
if sys.argv[1] == "long":
    import subprocess
    started = subprocess.Popen(["sleep", "60"], start_new_session=True)
    print(os.getpid(), started.pid, flush=True)
    started.wait()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    shutil.copy(ROOT / "stages" / "__main__.py", tmp_path / "stages")
    (tmp_path / "stages" / "hello.py").write_text(STAGE)
    return tmp_path


def start(folder: Path, script: str, *, warm: bool, temporary: str = "temporary") -> subprocess.Popen[str]:
    """Start a shell script in `folder`, whose temporary files lie there too."""
    command = [sys.executable, "-m", "tools.warm"] if warm else []
    (folder / temporary).mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(folder / temporary), "PYTHONPATH": str(ROOT)}
    script = script.replace("python", sys.executable)
    command += ["sh", "-c", script]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1)


def shell(folder: Path, script: str, *, warm: bool, temporary: str = "temporary") -> subprocess.CompletedProcess[str]:
    process = start(folder, script, warm=warm, temporary=temporary)
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
    assert text in done.stderr and "Traceback" not in done.stderr
    assert argument == "mistake" or "ValueError: broken" in (folder / ".cache/logs/hello.log").read_text()


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
    time.sleep(0.5)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "told\n" and process.returncode == 7
    assert not list(folder.glob("temporary/tmp*"))


def gone(*pids: int) -> bool:
    """Wait until processes have ended."""
    until = time.monotonic() + 15
    while time.monotonic() < until and any(map(runs, pids)):
        time.sleep(0.1)
    return not any(map(runs, pids))


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started(process: subprocess.Popen[str]) -> list[int]:
    """Return the ids of a long stage and of the process it started."""
    assert process.stdout
    process.stdout.readline()
    return [int(number) for number in process.stdout.readline().split()]


@pytest.mark.parametrize(
    ("number", "warm"),
    [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
    ids=["int-warm", "term-warm", "term-cold", "hup-warm"],
)
def test_a_signal_to_the_outer_process_ends_dvc_the_stage_and_what_it_started(
    folder: Path, number: signal.Signals, warm: bool
) -> None:
    dag = {"stages": {"a": {"cmd": "python -m stages hello long"}}}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(dag))
    (folder / "code.yaml").touch()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    process = start(folder, "exec python -m tools.dvc repro", warm=warm)
    assert process.stdout
    while not (line := process.stdout.readline()).startswith(("True", "False")):
        assert line
    stage = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(number)
    assert process.wait(20) in (128 + number, 252, 255)
    assert gone(*stage)
    assert not json.loads((folder / ".dvc/tmp/rwlock").read_text())["write"]


def test_a_signal_during_the_imports_ends_at_once(folder: Path) -> None:
    process = start(folder, "echo told; exec sleep 60", warm=True)
    assert process.stdout and process.stdout.readline() == "told\n"
    told = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - told < 1


def test_the_death_of_the_outer_process_ends_the_stage_and_leaves_no_file(folder: Path) -> None:
    process = start(folder, "python -m stages hello long", warm=True)
    pids = started(process)
    process.kill()
    assert gone(*pids) and not list(folder.glob("temporary/tmp*"))


def test_a_temporary_folder_of_a_long_name_is_no_matter(folder: Path) -> None:
    (folder / ("long" * 40)).mkdir()
    done = shell(folder, "python -m stages hello a", warm=True, temporary="long" * 40)
    assert done.stdout.startswith("True")


HOLDER = """
import os, socket, time
connection = socket.socket(socket.AF_UNIX)
connection.connect(chr(0) + os.environ["QUANTSTUDY_WARM"])
connection.send({sent})
print("connected", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("sent", ["b''", "bytes(7)", "(10**6).to_bytes(8)", "bytes(range(8)) * 99"])
def test_who_connects_and_holds_does_not_wedge_the_run(folder: Path, sent: str) -> None:
    (folder / "hold.py").write_text(HOLDER.format(sent=sent))
    done = shell(folder, "python hold.py > held & sleep 3; python -m stages hello a; kill $!", warm=True)
    assert (folder / "held").read_text() == "connected\n"
    assert done.stdout.startswith("True") and done.returncode == 0
