"""Damaged and hostile files: each is refused in one line, or accepted because it does no harm.

`python -m tests.harness.files` tries all of them and prints its counts as JSON; `tests/test_files.py` tries some.
A file of a study is cut, emptied, flipped, replaced by another's and by noise, and the stage that reads it run: it may
end well only with the result of the whole file. Archives, images, folders and checkpoints of many kinds are read by what
reads a user's.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.network.architectures import code_sha256
from stages import calibrate, download, evaluate, export, finetune, outliers, page, plots, ptq, qat, report, trace
from tests.harness import hostile
from tests.params import FEW, TINY, TINY_PARAMS

SECONDS, LONGEST = 60, 700
"""What a case may take, and the characters that its line may have."""
NETWORK = "tests.harness.files:network"
JSON_OF = ("details/int8_static.json", "metrics/int8_static.json", "activation_stats.json")
READERS: dict[str, tuple[Any, tuple[str, ...], str, str]] = {
    "data/tiny/train.pt": (finetune, (), "models/tiny/fp32.pth", "data/tiny/test.pt"),
    "data/tiny/calibration.pt": (calibrate, (), "models/tiny/calibration.pt", "data/tiny/train.pt"),
    "data/tiny/test.pt": (evaluate, ("--variant", "fp32"), "models/tiny/reference.npy", "data/tiny/train.pt"),
    "models/tiny/fp32.pth": (calibrate, (), "models/tiny/calibration.pt", "models/other/fp32.pth"),
    "models/tiny/int8_static.pth": (
        *(evaluate, ("--variant", "int8_static"), "models/tiny/predictions/int8_static.npy"),
        "models/tiny/int4_weight_only.pth",
    ),
    "models/tiny/calibration.pt": (
        *(ptq, ("--method", "int8_static"), "models/tiny/int8_static.pth", "models/other/calibration.pt"),
    ),
    "models/tiny/graph.onnx": (
        *(export, ("--variant", "int8_static"), "models/tiny/onnx/int8_static.onnx", "models/other/graph.onnx"),
    ),
    "models/tiny/reference.npy": (
        *(evaluate, ("--variant", "int8_static"), "models/tiny/predictions/int8_static.npy"),
        "models/other/reference.npy",
    ),
    "models/tiny/predictions/int8_static.npy": (
        *(page, (), "reports/pages/tiny.json", "models/tiny/predictions/int4_weight_only.npy"),
    ),
    "reports/tiny/curves/finetune.csv": (plots, (), "reports/tiny/results.csv", "reports/tiny/results.csv"),
    **{f"reports/tiny/{name}": (page, (), "reports/pages/tiny.json", "params.yaml") for name in JSON_OF},
    "reports/pages/tiny.json": (report, None, "reports/report.html", "params.yaml"),
}
"""By file: the stage that reads it, its flags, what it writes, and the file that takes its place."""


def network(num_classes: int) -> nn.Module:
    """A network that trains in a moment."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(8, num_classes))


def make_studies() -> None:
    """Run two tiny studies, but for their export, in the working directory."""
    model = {"architecture": NETWORK, "code_sha256": code_sha256(NETWORK)}
    studies = {"tiny": TINY | {"model": model}, "other": TINY | {"model": model, "seed": 1}}
    budget = {"budget": {"studies": [], "methods": []}, "export": FEW["export"] | {"budget": []}}
    params = TINY_PARAMS | FEW | budget | {"run": list(studies), "studies": studies}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for study in studies:
        for stage in (download, finetune, calibrate, outliers, trace):
            stage.main(["--study", study])
        for stage, method in ((ptq, "int8_static"), (ptq, "int4_weight_only"), (qat, "qat_int8")):
            stage.main(["--study", study, "--method", method])
        for variant in ("fp32", "int8_static", "int4_weight_only", "qat_int8"):
            evaluate.main(["--study", study, "--variant", variant])
        for stage in (plots, page):
            stage.main(["--study", study])
    report.main([])


def damages(path: Path, other: Path, rng: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    """Yield five kinds of damage, the flipped bytes `flips` times; text has no checksum that could tell those."""
    whole = path.read_bytes()
    yield "cut", whole[: rng.randrange(len(whole) // 4, len(whole) - 1)]
    yield "empty", b""
    yield "garbage", rng.randbytes(len(whole))
    yield "another's", other.read_bytes()
    for _ in range(flips if path.suffix not in (".json", ".csv") else 0):
        flipped = bytearray(whole)
        for place in rng.sample(range(len(whole)), 4):
            flipped[place] ^= rng.randrange(1, 256)
        yield "flipped", bytes(flipped)


def attempt(run: Callable[[], Any]) -> str:
    """Run what reads a file; return `accepted`, `refused`, or what is wrong with how it ended."""

    def expired(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run_stage(run)
        return "accepted"
    except SystemExit as end:
        line = str(end.code)
        long = len(line) > LONGEST or "\n" in line or "\x1b" in line or not line.startswith("error: ")
        return f"a bad line: {line[:300]}" if long else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)


def listing(folder: Path) -> set[str]:
    """Return what lies in a folder."""
    return {
        os.fsdecode(os.path.relpath(Path(top) / name, folder)) for top, _, names in os.walk(folder) for name in names
    }


def try_damages(flips: int = 4, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damage each file of a study; return counts by outcome, and what went wrong."""
    rng, counts, wrong = random.Random(seed), Counter[str](), []
    for name, (stage, flags, output, other) in READERS.items():
        path, result = Path(name), Path(output)
        arguments = [] if flags is None else ["--study", "tiny", *flags]
        stage.main(arguments)
        expected, whole, before = result.read_bytes(), path.read_bytes(), listing(Path())
        for kind, content in damages(path, Path(other), rng, flips):
            path.write_bytes(content)
            outcome = attempt(lambda stage=stage, arguments=arguments: stage.main(arguments))
            if outcome == "accepted" and result.read_bytes() != expected:
                outcome = "taken in silence"
            path.write_bytes(whole)
            left = listing(Path()) - before
            counts[kind] += 1
            counts[outcome if outcome in ("accepted", "refused") else "wrong"] += 1
            if outcome not in ("accepted", "refused") or left:
                wrong.append(f"{name}, {kind}: {outcome} {sorted(left)}")
            result.write_bytes(expected)
    return counts, wrong


def try_hostile(share: int = 1) -> tuple[Counter[str], list[str]]:
    """Read each hostile archive, image, folder and checkpoint, or one in `share` of them; return as `try_damages` does."""
    counts, wrong = Counter[str](), []
    for number, case in enumerate(hostile.cases(network, NETWORK)):
        if number % share:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path, started = case.make(Path(folder)), time.perf_counter()
            before = listing(Path(folder))
            outcome = attempt(lambda case=case, path=path: case.read(path))
            left = listing(Path(folder)) - before
            counts[case.kind] += 1
            counts[outcome if outcome in ("accepted", "refused") else "wrong"] += 1
            if (outcome != case.expected and case.expected != "either") or left:
                wrong.append(f"{case.kind} {case.name}: {outcome}, {case.expected} expected {sorted(left)}")
            counts["seconds"] = max(counts["seconds"], round(time.perf_counter() - started))
    return counts, wrong


def main() -> None:
    """Try everything; print the counts, and exit with 1 where something went wrong."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path.cwd()))
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        scratch = Path(temporary) / "scratch"
        scratch.mkdir()
        tempfile.tempdir = str(scratch)
        root = Path(temporary) / "project"
        root.mkdir()
        os.chdir(root)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_studies()
        damaged, first = try_damages()
        attempts, second = try_hostile()
        left = [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]
        tempfile.tempdir = None
    print(json.dumps({"damaged": damaged, "hostile": attempts, "wrong": [*first, *second], "left": left}, indent=2))
    sys.exit(bool(first or second or left))


if __name__ == "__main__":
    main()
