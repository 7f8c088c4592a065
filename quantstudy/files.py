"""Files written whole or not at all, and their checksums."""

import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantstudy.errors import UserError

if TYPE_CHECKING:
    import numpy as np

PARTIAL = ".partial-"
"""The prefix of a file's name while it is written; .dvcignore lists it, so no stage hashes an unfinished file."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it to `path` on success, delete it on any error.

    A writer holds a lock on its temporary file. Files that a killed writer left in the folder are deleted first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    handle, temporary = None, None
    try:
        handle, temporary = _locked(path)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        if handle is not None and temporary is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def _locked(path: Path) -> tuple[int, Path]:
    """Make a temporary file in the folder of `path`; return its open, locked file descriptor and its path."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL, suffix=path.suffix)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process swept it before it was locked


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as CSV with a header of `columns`, atomically; None and missing values become empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON; raise `ValueError` for a NaN or an infinity, which break readers."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False, default=_plain) + "\n")


def save_tensors(path: Path, content: Any) -> None:
    """Write tensors and plain values atomically with `torch.save`; equal content gives equal bytes."""
    with atomic(path) as temporary:
        write_tensors(temporary, content)


def write_tensors(path: Path, content: Any) -> None:
    """Write tensors and plain values to `path`, not atomically.

    `torch.save` gets an open file: given a path, it would write the temporary file's name into the archive. It also
    reports a full disk as a `RuntimeError`; here the `OSError` behind it is raised instead.
    """
    import torch

    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def check_records(path: Path) -> None:
    """Raise `BadZipFile` unless each record of a `torch.save` file has its CRC-32; an unchanged file is read once."""
    status = path.stat()
    _check_records(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _check_records(path: Path, *status: int) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise zipfile.BadZipFile("TorchScript")
        if any(record.compress_type or record.flag_bits & 1 for record in archive.infolist()):
            raise zipfile.BadZipFile("compressed or encrypted")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")


def seal(content: bytes, what: str) -> str:
    """Return the SHA-256 of a file's content together with `what` it is, as 64 hexadecimal digits."""
    return hashlib.sha256(f"{what}\0".encode() + content).hexdigest()


def save_array(path: Path, array: "np.ndarray", what: str) -> None:
    """Write an array, which is `what`, atomically as .npy; a seal follows, which `np.load` ignores."""
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    with atomic(path) as temporary:
        temporary.write_bytes(content + seal(content, what).encode())


def load_array(content: bytes, path: Path, what: str) -> "np.ndarray":
    """Return the array in the content of a .npy file; raise `UserError`, naming `path`, unless it is whole and finite.

    A file of `np.save` has no seal and is accepted too.
    """
    import numpy as np

    stream = io.BytesIO(content)
    try:
        array = np.load(stream, allow_pickle=False)
        end = stream.tell()
        is_whole = content[end:] in (b"", seal(content[:end], what).encode()) and bool(np.isfinite(array).all())
    except Exception:  # numpy may raise anything for damaged bytes
        is_whole = False
    if not is_whole:
        raise UserError(f"{path}: damaged, not finite, or not {what}; run evaluate again")
    return array


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def read_json(path: Path) -> Any:
    """Read a JSON file; raise `UserError` when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that writes it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


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
