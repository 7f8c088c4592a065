"""Read `params.yaml` as DVC reads it, with ruamel.yaml in YAML 1.2, up to a size that any machine can bear.

So `010` is ten, `1:30` and `yes` are text, `1e-5` is a number, and a repeated key is a mistake.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from quantstudy.errors import UserError, cut, one_line, shown

LARGEST = 1_000_000
"""The most characters of a file, with its aliases written out."""
DEEPEST = 20
"""The most levels of lists and mappings."""


def read_params(path: Path) -> dict[str, Any]:
    """Return the sections of a `params.yaml` as DVC sees them.

    Raises:
        UserError: there is no such file, DVC could not read it, or it is too large.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; run from the project's root")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: has more than {LARGEST} bytes")
        return parse_params(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start} is not); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def parse_params(text: str, path: Path) -> dict[str, Any]:
    """Return the sections of the text of a `params.yaml`; `path` is what an error calls it."""
    try:
        _check_size(YAML(typ="safe").parse(text), path)
        found = YAML(typ="safe").load(text)
        _check_keys(found, path)
    except UserError:
        raise
    except Exception as error:  # ruamel's, or Python's for odd dates, numbers and tags
        raise UserError(cut(f"{path}: not valid YAML{_reason(error)}")) from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {shown(found)} is not a mapping of sections")
    return found


def _check_keys(value: Any, path: Path) -> None:
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise UserError(f"{path}: the key {shown(key)} is not text; write it in quotes")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_keys(part, path)


def _check_size(events: Iterable[Any], path: Path) -> None:
    """Refuse a file that is too large or too deep before it is built: aliases of aliases can stand for billions."""
    sizes: dict[str | None, int] = {}  # of each anchor's value; an anchor that is still open has none
    opened: list[str | None] = []
    size = [0]  # of each level
    for event in events:
        if isinstance(event, AliasEvent):
            size[-1] += sizes.get(event.anchor, LARGEST)
        elif isinstance(event, ScalarEvent):
            size[-1] += 1 + len(event.value)
            sizes[event.anchor] = 1 + len(event.value)
        elif isinstance(event, CollectionStartEvent):
            opened.append(event.anchor)
            size.append(1)
        elif isinstance(event, CollectionEndEvent):
            closed = size.pop()
            sizes[opened.pop()] = closed
            size[-1] += closed
        if len(opened) > DEEPEST:
            raise UserError(f"{path}: lists and mappings lie more than {DEEPEST} levels deep")
        if size[-1] > LARGEST:
            raise UserError(f"{path}: its aliases stand for more than {LARGEST} characters, or for themselves")


def _reason(error: Exception) -> str:
    """Return where and why ruamel.yaml stopped; for a repeated key, without its two values."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{place}: {problem.partition(' with value')[0] if problem else one_line(error)}"
