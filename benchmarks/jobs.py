"""Run stages side by side on a simulated box of GPUs: `python -m benchmarks.jobs --seconds .cache/seconds.json`.

The DAG, the params, Ray, DVC and its lock file are real. A stage's command is replaced by one that writes the stage's
outputs after a sleep. The sleep is as long as a stage of its kind took in a real run, from the file that `make repro`
keeps. Ray is told that the machine has the GPUs and cores of the simulated box; sleeping needs neither. Every method of
params.yaml runs in every given study. The result is reports/jobs/box.json; `python -m docs.drawing box` draws it.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from dvc.repo import Repo

from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.machine.hardware import describe_machine
from quantstudy.params import load_params
from quantstudy.params.methods import METHOD_ROWS
from tests.harness.runs import make_project

RECORD = Path("reports") / "jobs" / "box.json"
STUDIES = (
    "vgg11_digits",
    "mobilenetv2_digits",
    "vgg11_cifar100",
    "mobilenetv2_food101",
    "vgg11_cifar100_32px",
    "mobilenetv2_food101_64px",
)
CORES_OF_A_GPU = 2
PORT = 6391
COMMAND = """
import json, os, pathlib, time
seconds, outs = json.loads(pathlib.Path("plan.json").read_text())[os.environ["DVC_STAGE"]]
time.sleep(seconds)
for out in map(pathlib.Path, outs):
    if not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        out = out / "file"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(os.environ["DVC_STAGE"])
"""


def usual_seconds(path: Path) -> dict[str, float]:
    """Return how many seconds a stage of each kind takes: the median over the stages of a real run."""
    kinds: dict[str, list[float]] = {}
    for name, seconds in json.loads(path.read_text()).items():
        kinds.setdefault(name.partition("@")[0], []).append(seconds)
    return {kind: statistics.median(found) for kind, found in kinds.items()}


def prepare(root: Path, studies: Sequence[str], usual: dict[str, float]) -> dict[str, float]:
    """Make a project whose stages sleep; return the seconds of each."""
    params: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    rows = params["methods"].items()
    kinds = {name: METHOD_ROWS[row["kind"]] for name, row in rows}
    trained = [name for name, kind in kinds.items() if kind.trains]
    untrained = [name for name, kind in kinds.items() if not kind.trains and not kind.needs_sensitivity]
    dag = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    make_project(root, list(dag))
    for stage in dag.values():
        stage["cmd"] = "python sleep.py"
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": dag}))
    (root / "params.yaml").write_text(
        yaml.safe_dump(params | {"run": list(studies), "ptq": untrained, "qat": trained, "ship": []})
    )
    (root / "sleep.py").write_text(COMMAND)
    plan = {}
    with Repo(root) as repo:
        for stage in repo.index.stages:
            kind = stage.name.partition("@")[0]
            seconds = usual.get(kind, usual.get(kind.partition("_")[0] + "_ptq", 1.0))
            plan[stage.name] = (seconds, [str(Path(out.fs_path).relative_to(root)) for out in stage.outs])
    (root / "plan.json").write_text(json.dumps(plan))
    return {name: seconds for name, (seconds, _) in plan.items()}


def run_box(root: Path, gpus: int) -> float:
    """Return the seconds that the project takes on a box with `gpus` GPUs."""
    binary, path = Path(sys.executable).parent, os.environ["PATH"]
    environment = os.environ | {"PATH": f"{binary}{os.pathsep}{path}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [str(binary / "ray"), "start", "--head", f"--port={PORT}", "--include-dashboard=false", "--block"]
    start += [f"--num-gpus={gpus}", f"--num-cpus={gpus * CORES_OF_A_GPU}", f"--temp-dir=/tmp/box{os.getpid()}"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(start, env=environment, **quiet)
    try:
        time.sleep(10)
        began = time.perf_counter()
        command = [sys.executable, "-m", "tools.jobs", "--address", f"127.0.0.1:{PORT}"]
        subprocess.run(command, cwd=root, env=environment, check=True)
        return time.perf_counter() - began
    finally:
        for process in psutil.Process(head.pid).children(recursive=True):
            process.kill()
        head.kill()
        head.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the boxes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=Path, required=True, help="what stages took, by name, as make repro keeps it")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 4, 2, 1], help="of each box (%(default)s)")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES))
    given = parser.parse_args(argv)
    usual = usual_seconds(given.seconds)
    load_params()
    found = json.loads(RECORD.read_text())["boxes"] if RECORD.is_file() else {}
    for gpus in given.gpus:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "box"
            seconds = prepare(root, given.studies, usual)
            taken = run_box(root, gpus)
            status = subprocess.run(
                [sys.executable, "-m", "dvc", "status"], cwd=root, capture_output=True, text=True, check=True
            )
        found[str(gpus)] = taken
        variants = sum(name.startswith("evaluate") for name in seconds)
        record = {
            "boxes": found,
            "stages": len(seconds),
            "variants": variants,
            "sum_of_stages": sum(seconds.values()),
            "usual_seconds": usual,
            "clean": "up to date" in status.stdout,
            "machine": describe_machine(),
        }
        write_json(RECORD, record)
        print(f"{gpus} GPUs: {taken:.0f} s for {len(seconds)} stages that sleep {sum(seconds.values()):.0f} s")


if __name__ == "__main__":
    run_stage(main)
