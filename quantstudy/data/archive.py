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
from typing import IO, Any

from quantstudy.errors import UserError

_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".tar.gz": gzip.GzipFile,
    ".tgz": gzip.GzipFile,
    ".tar.bz2": bz2.BZ2File,
    ".tar.xz": lzma.LZMAFile,
}
_SUFFIXES = (".tar", *_DECOMPRESSORS, ".zip")
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
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: not an archive that can be read; use a folder or one of {', '.join(_SUFFIXES)}")
    try:
        return _zip(path) if suffix == ".zip" else _tar(path, _uncompressed(path, suffix))
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or corrupt ({error}); fetch it again")


def _folder(path: Path) -> Files:
    names, folders = [], []
    for top, below, inside in os.walk(path, followlinks=True):
        relative = Path(top).relative_to(path)
        folders += [(relative / name).as_posix() for name in below]
        names += [(relative / name).as_posix() for name in inside]

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{path / name}: cannot be read ({error.strerror})") from None

    return Files(sorted(names), sorted(folders), read)


def _uncompressed(path: Path, suffix: str) -> IO[bytes]:
    """Return an open, uncompressed tar that closes with its last reader."""
    if suffix == ".tar":
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with _DECOMPRESSORS[suffix](path) as stream:
        shutil.copyfileobj(stream, unpacked, 2**20)
    unpacked.seek(0)
    return unpacked


def _tar(path: Path, stream: IO[bytes]) -> Files:
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
    members, folders = {}, []
    for member in archive.infolist():
        if member.flag_bits & 1:
            raise UserError(f"{path}: member {member.filename} is encrypted; archive it without a password")
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        _check_member(path, member.filename, archive.read(member).decode(errors="replace") if is_link else None)
        if member.is_dir():
            folders.append(_plain(member.filename))
        else:
            members[_plain(member.filename)] = member
    lock = threading.Lock()

    def read(name: str) -> bytes:
        try:
            with lock:
                return archive.read(members[name])
        except _DAMAGE as error:
            raise _damaged(path, error) from None

    return Files(sorted(members), sorted(folders), read)


def _plain(name: str) -> str:
    return str(PurePosixPath(name))


def _check_member(path: Path, name: str, link: str | None) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(f"{path}: member {name} would escape the archive's folder; do not trust this archive")
    if link is not None:
        raise UserError(f"{path}: member {name} is a link to {link}; archive the file itself")
