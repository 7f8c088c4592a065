"""Stages side by side: real Ray and DVC, on a DAG of commands that take no time to speak of."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from quantstudy.errors import UserError
from quantstudy.params.project import Runtime
from tests.harness.processes import running
from tests.params import TINY_PARAMS
from tools.pool import Pool, Size

pytestmark = pytest.mark.slow  # each starts Ray

COMMAND = """
import json, os, sys, time
name, seconds, *reads = sys.argv[1:]
began = time.time()
for path in reads:
    open(path).read()
time.sleep(float(seconds))
if os.path.exists(f"fail-{name}"):
    sys.exit(f"error: {name} was told to fail")
text = json.dumps({"began": began, "ended": time.time(), "threads": os.environ.get("OMP_NUM_THREADS")})
open(f"times-{name}.json", "w").write(text)
open(f"{name}.txt", "w").write(name)
"""
DAG = {"first": (0, []), "left": (2, ["first"]), "right": (2, ["first"]), "after": (0, ["left", "right"])}


def stage(name: str, seconds: float, needs: list[str], **meta: object) -> dict[str, Any]:
    reads = [f"{need}.txt" for need in needs]
    command = " ".join(["python", "stage.py", name, str(seconds), *reads])
    return {"cmd": command, "deps": ["stage.py", *reads], "outs": [f"{name}.txt"], **({"meta": meta} if meta else {})}


def make(root: Path, dag: dict[str, dict[str, Any]]) -> Path:
    """Write a project of the stages, with a git and a DVC repository."""
    root.mkdir()
    (root / "stage.py").write_text(COMMAND)
    (root / "code.yaml").write_text("")
    (root / "stages").mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(TINY_PARAMS, sort_keys=False))
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": dag}))
    (root / ".gitignore").write_text("/.cache\n")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make(tmp_path / "project", {name: stage(name, *what) for name, what in DAG.items()})


def start(root: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", *(arguments or ("tools.jobs", "--jobs", "2"))]
    environment = os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"} | variables
    return subprocess.Popen(command, cwd=root, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)


def run(root: Path, *arguments: str, status: int = 0) -> str:
    process = start(root, *arguments)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == status, output
    return output


def times(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / f"times-{name}.json").read_text())


def lock(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "dvc.lock").read_text())["stages"]


def is_clean(root: Path) -> bool:
    return "up to date" in run(root, "dvc", "status") and "didn't change" in run(root, "dvc", "repro")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_can_runs_at_once_and_the_lock_file_is_that_of_a_plain_repro(project: Path, tmp_path: Path) -> None:
    run(project)
    left, right = times(project, "left"), times(project, "right")
    assert max(left["began"], right["began"]) < min(left["ended"], right["ended"])
    assert left["threads"] == "1"
    assert is_clean(project)
    plain = make(tmp_path / "plain", {name: stage(name, *what) for name, what in DAG.items()})
    run(plain, "dvc", "repro")
    assert lock(plain) == lock(project)


def test_a_second_run_runs_nothing_and_what_was_run_before_comes_from_the_run_cache(project: Path) -> None:
    run(project)
    assert "4 unchanged" in run(project)
    before = (project / "stage.py").read_text()
    (project / "stage.py").write_text(before + "# another\n")
    assert "4 ran" in run(project)
    (project / "stage.py").write_text(before)
    assert "4 restored" in run(project)
    assert is_clean(project)


def test_only_targets_and_what_they_need_run(project: Path) -> None:
    assert "2 ran" in run(project, "tools.jobs", "--jobs", "2", "left")
    assert not (project / "right.txt").exists()


def test_a_stage_that_fails_stops_what_needs_it_and_nothing_else(project: Path) -> None:
    (project / "fail-left").touch()
    output = run(project, status=1)
    assert "failed: left: status 1: error: left was told to fail" in output
    assert "2 ran, 1 failed, 1 not run" in output
    log = Path(output.partition("its log: ")[2].strip())
    assert "told to fail" in (project / log).read_text()
    (project / "fail-left").unlink()
    assert "2 ran, 2 unchanged" in run(project)
    assert is_clean(project)


def test_who_times_shares_the_machine_with_nothing(tmp_path: Path) -> None:
    dag = {name: stage(name, 1, []) for name in ("a", "b", "c")}
    dag |= {name: stage(name, 1, [], takes="machine") for name in ("t", "u")}
    root = make(tmp_path / "project", dag)
    run(root)
    found = {name: times(root, name) for name in dag}
    for timed in ("t", "u"):
        others = [found[name] for name in dag if name != timed]
        assert all(each["ended"] <= found[timed]["began"] or found[timed]["ended"] <= each["began"] for each in others)
        assert found[timed]["threads"] is None or "OMP_NUM_THREADS" in os.environ


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_within_five_seconds_and_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    root = make(tmp_path / "project", {"quick": stage("quick", 0, []), "long": stage("long", 60, ["quick"])})
    process = start(root)
    wait_for(lambda: (root / "quick.txt").exists())
    started = psutil.Process(process.pid).children(recursive=True)
    wait_for(lambda: any("stage.py" in word for found in _commands(process.pid) for word in found))
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=5)
    assert process.returncode == 128 + number
    assert not running(started)
    assert list(lock(root)) == ["quick"]


@pytest.mark.parametrize("seconds", [1, 2, 3, 4])
def test_a_signal_while_ray_starts_leaves_nothing_running(tmp_path: Path, seconds: int) -> None:
    root = make(tmp_path / "project", {"long": stage("long", 60, [])})
    process = start(root)
    time.sleep(seconds)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=8)
    assert process.returncode  # Ray has a handler of its own for a while
    assert not running(started)


def test_a_second_run_in_a_folder_is_refused_and_does_not_disturb_the_first(tmp_path: Path) -> None:
    root = make(tmp_path / "project", {"long": stage("long", 8, [])})
    first = start(root)
    wait_for(lambda: any("stage.py" in word for found in _commands(first.pid) for word in found))
    assert "error: --jobs: another run" in run(root, status=1)
    assert "1 ran" in first.communicate(timeout=60)[0]


def test_a_run_waits_for_another_dvc_command(project: Path) -> None:
    hold = "import time; from dvc.repo import Repo; repo = Repo(); repo.lock.lock(); open('held', 'w'); time.sleep(25)"
    process = start(project)
    wait_for((project / "first.txt").exists)
    with subprocess.Popen([sys.executable, "-c", hold], cwd=project) as other:
        wait_for((project / "held").exists)
        time.sleep(10)
        assert process.poll() is None
        other.kill()
    output = process.communicate(timeout=120)[0]
    assert "4 ran" in output and output.count("another DVC command works") == 1
    assert is_clean(project)


def test_a_run_waits_for_a_stage_that_a_plain_repro_runs(tmp_path: Path) -> None:
    root = make(tmp_path / "project", {"long": stage("long", 25, []), "after": stage("after", 0, ["long"])})
    plain = start(root, "dvc", "repro")
    wait_for(lambda: any("stage.py" in word for found in _commands(plain.pid) for word in found))
    process = start(root)
    output = plain.communicate(timeout=120)[0]
    assert plain.returncode == 0, output
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "another DVC command works" in output, output
    assert is_clean(root)


def _commands(pid: int) -> list[list[str]]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.append(child.cmdline())
        except psutil.Error:
            continue
    return found


def test_a_stage_whose_process_is_killed_is_tried_again(tmp_path: Path) -> None:
    root = make(tmp_path / "project", {"long": stage("long", 4, [])})
    process = start(root)

    def victims() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "stage.py" in " ".join(child.cmdline())]

    wait_for(lambda: bool(victims()))
    victims()[-1].kill()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert is_clean(root)


def test_two_machines_with_folders_of_their_own_finish_though_one_is_killed(tmp_path: Path) -> None:
    """Two Ray nodes on this machine: work trees apart, only a DVC remote between them."""
    names = [f"s{number}" for number in range(6)]
    dag = {"first": stage("first", 0, []), **{name: stage(name, 3, ["first"]) for name in names}}
    root = make(tmp_path / "project", dag)
    remote = tmp_path / "remote"
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-d", "all", str(remote)], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"], cwd=root, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(root), str(clone)], check=True)
    run(root, "tools.jobs", "--jobs", "1", "first")  # the remote does not have it
    temporary = Path("/tmp") / f"qs{os.getpid()}"
    program = str(Path(sys.executable).parent / "ray")
    ray = [program, "start", "--num-cpus=1", "--disable-usage-stats", "--block"]
    head = [*ray, "--head", "--port=6390", "--include-dashboard=false", f"--temp-dir={temporary}"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def joined(count: int) -> bool:
        asked = [program, "status", "--address=127.0.0.1:6390"]
        status = subprocess.run(asked, env=os.environ | secret, text=True, capture_output=True, timeout=60)
        return status.stdout.count(" node_") >= count

    nodes = [subprocess.Popen(head, cwd=root, env=os.environ | secret, **quiet)]
    try:
        wait_for(lambda: joined(1), 120)
        apart = os.environ | secret | {"QUANTSTUDY_FOLDER": str(clone)}
        nodes.append(subprocess.Popen([*ray, "--address=127.0.0.1:6390"], cwd=clone, env=apart, **quiet))
        wait_for(lambda: joined(2), 120)
        (clone / "stages").mkdir(exist_ok=True)
        (clone / "stages" / "more.py").write_text("MORE = 1\n")
        refused = start(root, "tools.jobs", "--address", "127.0.0.1:6390", **secret)
        assert f"{clone} has other code than the driver" in refused.communicate(timeout=120)[0]
        (clone / "stages" / "more.py").unlink()
        process = start(root, "tools.jobs", "--address", "127.0.0.1:6390", **secret)
        wait_for(lambda: any((clone / f"times-{name}.json").exists() for name in names), 120)
        for child in [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]:
            child.kill()
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
        assert is_clean(root)
        ran_here = {path.name for path in root.glob("times-*.json")}
        ran_there = {path.name for path in clone.glob("times-*.json")}
        assert ran_here and ran_there
    finally:
        for node in nodes:
            for child in psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []:
                child.kill()
            node.kill()


def test_a_stage_gets_its_gpu_or_as_many_cores_as_it_would_have_alone() -> None:
    box = Pool(machines=((16, 8),), local=True)
    some, four = Runtime(), Runtime(threads=4)
    assert box.size("device", some) == box.size("machine", some) == Size(2, gpus=1, threads=2)
    assert box.size("devices", Runtime(processes=4)) == Size(8, gpus=4, threads=2)
    plain = Pool(machines=((16, 0),), local=True)
    assert plain.size("device", some) == plain.size("devices", Runtime(processes=2)) == Size(16)
    assert plain.size("device", four) == plain.size("devices", four) == Size(4)
    assert plain.size("machine", four) == Size(16, alone=True)
    assert plain.size(None, four) == Size(1, threads=1)


def test_on_unlike_machines_no_stage_asks_for_more_than_one_of_them_has() -> None:
    unlike = Pool(machines=((64, 0), (12, 4), (16, 2)), local=False)
    assert unlike.size("device", Runtime()) == Size(3, gpus=1, threads=3)
    assert unlike.size("devices", Runtime(processes=4)) == Size(12, gpus=4, threads=3)
    assert unlike.size("devices", Runtime(processes=2)) == Size(6, gpus=2, threads=3)
    with pytest.raises(UserError, match="processes: 5 is more than the 4 GPUs that a machine"):
        unlike.size("devices", Runtime(processes=5))
    assert Pool(machines=((4, 0), (32, 0)), local=False).size("device", Runtime(threads=64)) == Size(32)


@pytest.mark.parametrize("arguments", [("--jobs", "0"), ("nothing",)])
def test_a_mistake_is_one_line(project: Path, arguments: tuple[str, ...]) -> None:
    output = run(project, "tools.jobs", *arguments, status=1)
    assert output.startswith("error: ") and "Traceback" not in output
