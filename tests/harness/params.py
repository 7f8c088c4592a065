"""Mutates params files by the hundred: each is taken as DVC reads it, or refused in lines of at most 200 characters.

    python -m tests.harness.params --count 1000 --seed 0

writes its counts to reports/reliability/params.json, and ends with status 1 where a file led to anything else. A file
that failed is made again by its number: `--first 417 --count 1`.
"""

import argparse
import collections
import copy
import io
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torchvision.models  # noqa: F401 - what a preset asks; its import is no hang
from dvc.utils.serialize import parse_yaml
from ruamel.yaml import YAML

from quantstudy.errors import UserError
from quantstudy.params import METHOD_ROWS, load_methods, load_params
from quantstudy.params.reading import read_params
from quantstudy.params.studies import Calibration, Data, Model, Qat, Study, Training
from tests.harness.record import record
from tests.params import FEW, TINY_PARAMS

LONGEST, SECONDS = 200, 60
"""Characters of a line, and when a file counts as a hang."""
ROOT = Path(__file__).parents[2]
SECTIONS = (Calibration, Data, Model, Qat, Study, Training, *METHOD_ROWS.values())
KEYS = sorted({key for section in SECTIONS for key in section.model_fields} | {"preprocessing"})
EXTREME: list[Any] = [
    *(None, True, False, [], {}, "", " ", [[]], {"": {}}, -1, 0, 1, 2, 8, 9, 2**31, 2**32, 2**63, 10**12, -(10**40)),
    *(0.0, 1.0, -1.0, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan"), 10**4000, [0.5] * 5000),
    *("0", "fp32", "a" * 100_000, "/" * 5000, "x" * 300, "é" * 200, "sys:exit", ":", "a..b:c", "imagenet", "digits"),
    *("torchvision", "\x00", "a\nb", "../..", "/dev/zero", "nan", "${run}", {"kind": []}, {"kind": "x" * 9999}),
]
WRITTEN = [
    *("010", "1:30", "1_000", "0x" + "f" * 9000, "1e400", ".nan", "2001-13-45", "2001-01-01", "!!int x", "!!bool x"),
    *("!!float x", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!!python/object:os.system x"),
    *("*nothing", "&a [*a]", "&a {<<: *a}", "[" * 5000, "{a: " * 500, '"\\ud800"', '"\\0"', "'", "|", "? a", "!!int"),
    "[" + ", ".join(["&a0 xxxxxxxxxx", *(f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12))]) + "]",
]
"""Values as they are written in YAML, nested aliases that stand for 10^12 letters among them."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key or index) below a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def change_values(params: Any, random: Random) -> None:
    """Delete, rename, replace, move or add one key or value."""
    holder, key = random.choice(list(places(params)))
    other, another = random.choice(list(places(params)))
    action = random.choice(("delete", "rename", "extreme", "extreme", "move", "add"))
    if action == "delete":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        at = random.randrange(len(key) + 1)
        names = (key[:at] + key[at + 1 :], key[:at] + "é" + key[at:], key.upper(), key * 999, 7)
        holder[random.choice(names)] = holder.pop(key)
    elif action == "move":
        holder[key] = copy.deepcopy(other[another])
    elif action == "add" and isinstance(holder, dict):
        holder[random.choice(KEYS)] = random.choice(EXTREME)
    else:
        holder[key] = random.choice(EXTREME)


def change_text(text: str, random: Random) -> bytes:
    """Damage the file as editors, merges and disks do."""
    lines = text.split("\n")
    at = random.randrange(len(lines))
    action = random.randrange(9)
    if action == 0:
        lines.insert(at, lines[at])
    elif action == 1:
        lines.insert(random.randrange(len(lines)), lines.pop(at))
    elif action == 2:
        lines[at] = random.choice((" ", "\t", "- ", "#", "? ", "\ufeff")) + lines[at]
    elif action in (3, 4):
        lines[at] = f"{lines[at].partition(':')[0]}: {random.choice(WRITTEN)}"
    elif action == 5:
        lines.insert(0, random.choice(("%YAML 1.1\n---", "%YAML 9.9\n---", "---\na: 1\n---", "<<<<<<< HEAD", "\x00")))
    content = "\n".join(lines).encode()
    if action == 6:
        return content.decode().encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
    if action == 7:
        return content[: random.randrange(len(content))]
    if action == 8:
        at = random.randrange(len(content))
        return content[:at] + random.randbytes(random.choice((1, 4, 64))) + content[at:]
    return content


def mutated(number: int, seed: int) -> bytes:
    """Return the content of one file: one to three changes of one of two params files."""
    random = Random(f"{seed} {number}")
    params = random.choice((TINY_PARAMS | FEW, read_params(ROOT / "params.yaml")))
    params, stream = copy.deepcopy(params), io.StringIO()
    in_text = random.random() < 0.4
    for _ in range(0 if in_text else random.choice((1, 1, 2, 3))):
        change_values(params, random)
    YAML(typ="rt").dump(params, stream)
    return change_text(stream.getvalue(), random) if in_text else stream.getvalue().encode()


class HangError(BaseException):
    """A file took longer than it may."""


def _alarm(*_: object) -> None:
    raise HangError


def judged(path: Path, load: Callable[[Path], Any]) -> str:
    """Return what becomes of a file: accepted, refused, or what should not have been."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        load(path)
        seen = parse_yaml(path.read_text(encoding="utf-8"), path)
        return "accepted" if pickle.dumps(read_params(path)) == pickle.dumps(seen) else "not as DVC reads it"
    except UserError as error:
        lines = [str(line) for line in error.args]
        good = lines and all(line and "\n" not in line and len(line) <= LONGEST for line in lines)
        return "refused" if good else "long lines"
    except HangError:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(count: int, seed: int = 0, first: int = 0) -> dict[str, Any]:
    """Return how many files came to what, and the numbers of those that came to what they should not."""
    found: collections.Counter[str] = collections.Counter()
    failures = {}
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ruamel.yaml's, of anchors that are used twice
        path = Path(folder) / "params.yaml"
        for number in range(first, first + count):
            path.write_bytes(mutated(number, seed))
            for load in (load_params, load_methods):
                outcome = judged(path, load)
                found[outcome] += load is load_params or outcome not in ("accepted", "refused")
                if outcome not in ("accepted", "refused"):
                    failures[number] = outcome
    return {"files": count, **found, "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 1000), ("seed", 0), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    counts = run(**vars(parser.parse_args()))
    failures = counts.pop("failures")
    record("params", counts | {"wrong": len(failures)})
    sys.exit("\n".join(f"file {number}: {outcome}" for number, outcome in failures.items()))
