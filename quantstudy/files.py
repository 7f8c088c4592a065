"""Files written whole or not at all, and their checksums."""

import contextlib
import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantstudy.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there on success, delete it on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as CSV with a header of `columns`, atomically; null and what a row lacks are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON; raise `ValueError` for a NaN or an infinity, which break readers."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, default=_plain) + "\n")


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors and plain values atomically with `torch.save`; equal content gives equal bytes.

    Given a path, `torch.save` would write the temporary file's name into the archive, and report a full disk as a
    `RuntimeError`; given an open file it does neither, once the error behind its own is raised.
    """
    import torch

    with atomic(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `UserError` when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None, key: str) -> None:
    """Raise `UserError` when the file is missing, or its SHA-256 is not `expected`, the value of `key`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file (named by the params beside {key}); put or link it there")
    expect_sha256(path, sha256(path), expected, key)


def expect_sha256(path: Path, found: str, expected: str | None, key: str) -> None:
    """Raise `UserError` when `found`, the SHA-256 of `path`, is not `expected`, the value of `key`."""
    if expected != found:
        raise UserError(f"{key}: {expected!r} is not the SHA-256 of {path}; the one found is {found}")
