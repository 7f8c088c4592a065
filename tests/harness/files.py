"""Damaged and hostile files: each is refused in one line, or accepted because it does no harm.

`python -m tests.harness.files` tries all of them and prints its counts as JSON; `tests/test_files.py` tries some.
A file of a study is cut, emptied, flipped, replaced by another's and by noise, and the stage that reads it run: it may
end well only with the result of the whole file. Archives, images, folders and checkpoints of many kinds are read as a
user's are.
"""

import contextlib
import io
import itertools
import os
import random
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

from quantstudy.data.prepare import prepare
from quantstudy.errors import run_stage
from quantstudy.network.architectures import code_sha256
from quantstudy.runtimes.library import load_model
from stages import calibrate, download, evaluate, export, finetune, outliers, page, plots, ptq, qat, report, trace
from tests.data.conftest import folder_data
from tests.harness.checkpoints import checkpoints
from tests.harness.record import record
from tests.harness.sets import EITHER, Make, archives, folders, images
from tests.params import FEW, TINY, TINY_PARAMS

SECONDS, LONGEST = 60, 700
"""What a case may take, and the characters that its line may have."""
ENDS = ("accepted", "refused")
NETWORK = "tests.harness.files:network"
_FP32, _INT8 = ("--variant", "fp32"), ("--variant", "int8_static")
_PAGE, _CLASSES = "reports/pages/tiny.json", "models/tiny/predictions"
_JSON = ("details/int8_static.json", "metrics/int8_static.json", "activation_stats.json")
READERS: dict[str, tuple[Any, tuple[str, ...], str, str]] = {
    "data/tiny/train.pt": (finetune, (), "models/tiny/fp32.pth", "data/tiny/test.pt"),
    "data/tiny/calibration.pt": (calibrate, (), "models/tiny/calibration.pt", "data/tiny/train.pt"),
    "data/tiny/test.pt": (evaluate, _FP32, "models/tiny/reference.npy", "data/tiny/train.pt"),
    "models/tiny/fp32.pth": (calibrate, (), "models/tiny/calibration.pt", "models/other/fp32.pth"),
    "models/tiny/int8_static.pth": (evaluate, _INT8, f"{_CLASSES}/int8_static.npy", "models/tiny/int4_weight_only.pth"),
    "models/tiny/calibration.pt": (outliers, (), "reports/tiny/activation_stats.json", "models/other/calibration.pt"),
    "models/tiny/graph.onnx": (export, _INT8, "models/tiny/onnx/int8_static.onnx", "models/other/graph.onnx"),
    "models/tiny/reference.npy": (evaluate, _INT8, f"{_CLASSES}/int8_static.npy", "models/other/reference.npy"),
    f"{_CLASSES}/int8_static.npy": (page, (), _PAGE, f"{_CLASSES}/int4_weight_only.npy"),
    "reports/tiny/curves/finetune.csv": (plots, (), "reports/tiny/results.csv", "reports/tiny/results.csv"),
    **{f"reports/tiny/{name}": (page, (), _PAGE, "reports/tiny/details/fp32.json") for name in _JSON},
    _PAGE: (report, (), "reports/report.html", "reports/tiny/details/fp32.json"),
}
"""By file: the stage that reads it, its flags, what it writes, and the file that takes its place."""


def network(num_classes: int) -> nn.Module:
    """A network that trains in a moment."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(8, num_classes))


def make_studies() -> None:
    """Run a tiny study, but for its export, in the working directory, and some stages of another."""
    model = {"architecture": NETWORK, "code_sha256": code_sha256(NETWORK)}
    studies = {"tiny": TINY | {"model": model}, "other": TINY | {"model": model, "seed": 1}}
    budget = {"budget": {"studies": [], "methods": []}, "export": FEW["export"] | {"budget": []}}
    params = TINY_PARAMS | FEW | budget | {"studies": studies}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for study in studies:
        for stage in (download, finetune, calibrate, outliers, trace):
            stage.main(["--study", study])
        evaluate.main(["--study", study, "--variant", "fp32"])
    for stage, variant in ((ptq, "int8_static"), (ptq, "int4_weight_only"), (qat, "qat_int8")):
        stage.main(["--study", "tiny", "--method", variant])
        evaluate.main(["--study", "tiny", "--variant", variant])
    for stage in (plots, page):
        stage.main(["--study", "tiny"])


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
        arguments = [] if stage is report else ["--study", "tiny", *flags]
        stage.main(arguments)
        expected, whole, before = result.read_bytes(), path.read_bytes(), listing(Path())
        for kind, content in damages(path, Path(other), rng, flips):
            path.write_bytes(content)
            outcome = attempt(lambda stage=stage, arguments=arguments: stage.main(arguments))
            if outcome == "accepted" and result.read_bytes() != expected:
                outcome = "taken in silence"
            path.write_bytes(whole)
            left = listing(Path()) - before
            counts.update([kind, outcome if outcome in ENDS else "wrong"])
            if outcome not in ENDS or left:
                wrong.append(f"{name}: {kind}: {outcome}; left {sorted(left)}")
            result.write_bytes(expected)
    return counts, wrong


def hostile() -> Iterator[tuple[str, str, Make, Callable[[Path], Any], str]]:
    """Yield the kind and the name of each hostile file, what writes it, what reads it, and how that has to end."""
    for kind, made in {"archives": archives(), "images": images(), "folders": folders()}.items():
        for name, make, expected in made:
            yield kind, name, make, lambda path: prepare(folder_data(path, 16), "tiny"), expected
    torch.manual_seed(0)
    for name, make, expected, key in checkpoints(network(3).eval()):
        named: dict[str, Any] = {"architecture": NETWORK, "image_size": 32, "weights_key": key}
        options = {} if "this project" in name else named
        yield "checkpoints", name, make, lambda path, options=options: load_model(path, **options), expected


def try_hostile(share: int = 1) -> tuple[Counter[str], list[str]]:
    """Read each hostile file, or one in `share` of them; return as `try_damages` does."""
    counts, wrong = Counter[str](), []
    for kind, name, make, read, expected in itertools.islice(hostile(), 0, None, share):
        with tempfile.TemporaryDirectory() as temporary:
            folder, started = Path(temporary), time.perf_counter()
            path, before = make(folder), listing(folder)
            outcome, left = attempt(lambda read=read, path=path: read(path)), listing(folder) - before
        counts["longest_seconds"] = max(counts["longest_seconds"], round(time.perf_counter() - started))
        counts.update([kind, outcome if outcome in ENDS else "wrong"])
        if outcome not in ENDS or expected not in (outcome, EITHER) or left or Path("executed").exists():
            wrong.append(f"{kind}: {name}: {outcome}, not {expected}; left {sorted(left)}")
    return counts, wrong


def main() -> None:
    """Try everything; write the counts to reports/reliability/files.json, exit with what went wrong."""
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
    said = {"accepted": "accepted, nothing else came of it", "longest_seconds": "seconds that the longest took"}
    counts = {f"damaged files: {said.get(what, what)}": count for what, count in damaged.items()}
    counts |= {f"hostile files: {said.get(what, what)}": count for what, count in attempts.items()}
    record("files", counts | {"wrong": len(first) + len(second), "left behind": len(left)})
    sys.exit("\n".join([*first, *second, *left]))


if __name__ == "__main__":
    main()
