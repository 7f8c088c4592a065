"""The files of an archive or a folder, read in memory.

Nothing is extracted, so no member can be written outside a folder. A member that is a link, or whose path would escape,
is refused all the same: such an archive cannot be trusted. A compressed tar is decompressed once, into an unnamed
temporary file, so that threads can read its members in any order. Archives that unpack to far more than images would,
folders that loop, and entries that are neither a file nor a folder are refused too.
"""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import tempfile
import threading
import zipfile
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
_LARGEST = 2**29
"""The most bytes of one image file."""
_MOST_FOLDERS = 10**5
_SWOLLEN, _RATIO = 2**30, 100
"""A compressed tar may unpack to this many bytes, or to this many times its own size; images hardly compress."""


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
    files = _folder(path) if path.is_dir() else _archive(path)
    for name in (*files.names, *files.folders):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: the name {os.fsencode(name)[:100]!r} is not UTF-8; rename it") from None
    return files


def _archive(path: Path) -> Files:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; put or link it there")
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: not an archive that can be read; use a folder or one of {', '.join(_SUFFIXES)}")
    try:
        return _zip(path) if suffix == ".zip" else _tar(path, _uncompressed(path, suffix))
    except Exception as error:  # the libraries may raise anything for damaged bytes
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> Exception:
    """Return what to raise: a user's mistake and a full disk as they are, anything else as damage."""
    if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
        return error
    return UserError(f"{path}: truncated or corrupt ({str(error)[:100] or type(error).__name__}); fetch it again")


def _folder(path: Path) -> Files:
    names: list[str] = []
    folders: list[str] = []
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(path, ())]
    while waiting:
        folder, above = waiting.pop()
        here = folder.resolve()
        if here in above or len(folders) > _MOST_FOLDERS:
            raise UserError(f"{path}: {folder.relative_to(path)!s:.100}: links loop or multiply folders; remove them")
        for entry in folder.iterdir():
            is_folder = entry.is_dir()
            (folders if is_folder else names).append(entry.relative_to(path).as_posix())
            if is_folder:
                waiting.append((entry, (*above, here)))

    def read(name: str) -> bytes:
        file = path / name
        try:
            if not file.is_file():
                what = "a folder, a pipe or a device" if file.exists() else "a link to nothing, or gone"
                raise UserError(f"{file}: cannot be read: {what}; remove it")
            _checked_size(path, name, file.stat().st_size)
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None

    return Files(sorted(names), sorted(folders), read)


def _checked_size(path: Path, name: str, size: int) -> None:
    if size > _LARGEST:
        raise UserError(f"{path}: {name[:100]} has {size / 1e6:,.0f} MB; an image has at most {_LARGEST / 1e6:,.0f}")


def _uncompressed(path: Path, suffix: str) -> IO[bytes]:
    """Return an open, uncompressed tar that closes with its last reader."""
    if suffix == ".tar":
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
    with _DECOMPRESSORS[suffix](path) as stream:
        most = max(_SWOLLEN, _RATIO * path.stat().st_size)
        while block := stream.read(2**20):
            unpacked.write(block)
            if unpacked.tell() > most:
                raise UserError(f"{path}: unpacks to more than {most / 1e9:.1f} GB, as no images do; do not trust it")
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
            elif member.isreg() and not member.issparse():
                _checked_size(path, member.name, member.size)
                spans[_plain(member.name)] = member.offset_data, member.size
            else:
                raise UserError(f"{path}: member {member.name[:100]} is not a plain file or a folder; leave it out")
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
            raise UserError(f"{path}: member {member.filename[:100]} is encrypted; archive it without a password")
        _checked_size(path, member.filename, member.file_size)
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
        except Exception as error:
            raise _damaged(path, error) from None

    return Files(sorted(members), sorted(folders), read)


def _plain(name: str) -> str:
    return str(PurePosixPath(name))


def _check_member(path: Path, name: str, link: str | None) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(f"{path}: member {name[:100]} would escape the archive's folder; do not trust this archive")
    if link is not None:
        raise UserError(f"{path}: member {name[:100]} is a link to {link[:100]}; archive the file itself")
