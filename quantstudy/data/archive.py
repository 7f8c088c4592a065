"""The files of an archive or a folder, read in memory.

Nothing is extracted, so no member can be written outside a folder; a member whose path would escape, or that is
a link, is refused all the same, since the archive is not what it says. A compressed tar is decompressed once,
into an unnamed temporary file, so that its members can be read in any order and from threads.
"""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from quantstudy.errors import UserError

_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".tar": lambda path: path.open("rb"),
    ".tar.gz": lambda path: gzip.open(path),
    ".tgz": lambda path: gzip.open(path),
    ".tar.bz2": lambda path: bz2.open(path),
    ".tar.xz": lambda path: lzma.open(path),
}
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass(frozen=True, eq=False)
class Files:
    """Regular files by their `/`-separated path, the folders, and a reader that threads may call."""

    names: list[str]
    folders: list[str]
    read: Callable[[str], bytes]


def open_files(path: Path) -> Files:
    """List a folder or an archive, sorted by path.

    Raise `UserError` for a path that is missing, an archive of an unknown type, truncated or corrupt, and for a
    member that is a link or whose path escapes.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; put or link it there")
    try:
        if path.name.endswith(".zip"):
            return _zip(path)
        for suffix, opener in _OPENERS.items():
            if path.name.endswith(suffix):
                return _tar(path, opener(path), compressed=suffix != ".tar")
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from None
    choices = ", ".join([*_OPENERS, ".zip"])
    raise UserError(f"{path}: not a type of archive that is read; use a folder or one of {choices}")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or corrupt ({error}); fetch it again")


def _folder(path: Path) -> Files:
    names, folders = [], []
    for found in path.rglob("*"):
        target = folders if found.is_dir() else names
        target.append(found.relative_to(path).as_posix())
    return Files(sorted(names), sorted(folders), lambda name: (path / name).read_bytes())


def _tar(path: Path, stream: IO[bytes], *, compressed: bool) -> Files:
    if compressed:
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  (it stays open for the reader)
        with stream:
            shutil.copyfileobj(stream, unpacked, 2**20)
        unpacked.seek(0)
        stream = unpacked
    spans: dict[str, tuple[int, int]] = {}
    folders = []
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        for member in archive:
            _check_member(path, member.name, member.linkname if member.issym() or member.islnk() else None)
            if member.isdir():
                folders.append(_plain(member.name))
            elif member.isreg():
                spans[_plain(member.name)] = member.offset_data, member.size
            else:
                raise UserError(f"{path}: member {member.name} is not a file or a folder; leave it out")
        end = archive.offset
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end of archive after {len(spans)} files")

    def read(name: str) -> bytes:
        offset, size = spans[name]
        return os.pread(stream.fileno(), size, offset)

    return Files(sorted(spans), sorted(folders), read)


def _zip(path: Path) -> Files:
    archive = zipfile.ZipFile(path)
    names, folders = [], []
    for member in archive.infolist():
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        _check_member(path, member.filename, archive.read(member).decode(errors="replace") if is_link else None)
        (folders if member.is_dir() else names).append(member.filename)
    lock = threading.Lock()

    def read(name: str) -> bytes:
        try:
            with lock:
                return archive.read(name)
        except _DAMAGE as error:
            raise _damaged(path, error) from None

    return Files(sorted(names), sorted(_plain(name) for name in folders), read)


def _plain(name: str) -> str:
    return str(PurePosixPath(name))


def _check_member(path: Path, name: str, link: str | None) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(f"{path}: member {name} would escape the archive's folder; do not trust this archive")
    if link is not None:
        raise UserError(f"{path}: member {name} is a link to {link}; archive the file itself")
