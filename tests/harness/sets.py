"""Sets of images that a stranger may hand over, as archives and folders, each with how reading it has to end."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import socket
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.conftest import encoded

REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"
Make = Callable[[Path], Path]
Case = tuple[str, Make, str]
PICTURES = {f"{s}/{c}/{i}.png": encoded(i, (16, 16)) for s in ("train", "test") for c in ("ant", "bee") for i in (0, 1)}
ODD = "train/ant/9.png"
"""Where what is no picture lies."""


def written(name: str, content: bytes) -> Make:
    """Return a function that writes one file into a folder."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def tar(name: str = "", **attributes: Any) -> bytes:
    """Return a tar of the pictures, and of a member with attributes of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for own, content in PICTURES.items():
            member = tarfile.TarInfo(own)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if name:
            member = tarfile.TarInfo(name)
            vars_of = {"size": 9, "linkname": "/etc/passwd"} | attributes
            for key, value in vars_of.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(bytes(9)))
    return buffer.getvalue()


def zipped(name: Any = "", content: bytes = b"x", **directory: int) -> bytes:
    """Return a zip of the pictures and of another member; `directory` are bytes of its first entry by their place."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for own, picture in (PICTURES | ({name: content} if name else {})).items():
            archive.writestr(own, picture)
    found = bytearray(buffer.getvalue())
    for place, value in directory.items():
        found[found.index(b"PK\1\2") + int(place[1:])] = value
    return bytes(found)


def archives() -> Iterator[Case]:
    """Yield archives."""
    packers = {".zip": zipped(), ".tar": tar(), ".tar.gz": gzip.compress(tar()), ".tar.bz2": bz2.compress(tar())}
    for suffix, whole in (packers | {".tar.xz": lzma.compress(tar())}).items():
        half, name = len(whole) // 2, f"a{suffix}"
        flipped = whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :]
        wrong = {"cut": whole[:half], "empty": b"", "noise": os.urandom(3000), "text": b"PK\3\4 what?\n" * 99}
        yield f"whole {name}", written(name, whole), ACCEPTED
        yield f"flipped {name}", written(name, flipped), EITHER if suffix == ".tar" else REFUSED
        yield f"nearly whole {name}", written(name, whole[: -len(whole) // 10]), EITHER if suffix == ".tar" else REFUSED
        for kind, content in (wrong | ({} if suffix == ".tar" else {"tar": tar()})).items():
            yield f"{kind} {name}", written(name, content), REFUSED
    for name in ("../x.png", "/x.png", "train/../../x.png", "C:\\x.png", "..\\x.png", "train/ant/../9.png"):
        yield f"escape to {name} from a tar", written("a.tar", tar(name)), REFUSED
        yield f"escape to {name} from a zip", written("a.zip", zipped(name)), REFUSED
    for kind in ("SYM", "LNK", "FIFO", "BLK", "CHR", "CONT", "GNUTYPE_SPARSE"):
        found = getattr(tarfile, kind if "_" in kind else f"{kind}TYPE")
        yield f"a member of type {kind}", written("a.tar", tar(ODD, type=found)), REFUSED
    size = tar()
    link = zipfile.ZipInfo(ODD)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    wrong = {
        "a huge size.tar": size[:124] + b"7" * 11 + b"\0" + size[136:],
        "no UTF-8.tar": tar("train/ant/\udcff.png"),
        "a deep path.tar": tar(f"train/ant/{'d/' * 2000}x.png"),
        "a long name.zip": zipped(f"train/ant/{'n' * 9999}.png"),
        "a link.zip": zipped(link, b"/etc/passwd"),
        "a compression that is unknown.zip": zipped(_10=99),
        "a password.zip": zipped(_8=1),
        "another version.zip": zipped(_6=250),
        "a bomb.zip": zipped(ODD, bytes(2**29 + 1)),
        "a bomb.tar.gz": gzip.compress(bytes(2**20)) * 1100,
        "a zip.zip": zipped(ODD, zipped()),
    }
    for name, content in wrong.items():
        yield f"archive with {name}", written(f"a{name[name.index('.') :]}", content), REFUSED


def folder_with(add: Callable[[Path], Any]) -> Make:
    """Return a function that writes the pictures, and has `add` put something at a picture's path."""

    def make(folder: Path) -> Path:
        for name, content in PICTURES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        add(folder / ODD)
        return folder

    return make


def images() -> Iterator[Case]:
    """Yield folders with one image that is not what its name says."""
    found: dict[str, tuple[bytes, str]] = {}
    for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.effect_noise((20, 20), 99).convert("RGB").save(buffer, form)
        found |= {form: (buffer.getvalue(), ACCEPTED), f"a cut {form}": (buffer.getvalue()[:150], REFUSED)}
    for mode, expected in {"L": ACCEPTED, "CMYK": ACCEPTED, "P": ACCEPTED, "I;16": REFUSED, "F": REFUSED}.items():
        buffer = io.BytesIO()
        Image.new(mode, (1, 3000)).save(buffer, "TIFF")
        found[f"mode {mode}"] = buffer.getvalue(), expected
    picture = PICTURES["train/ant/0.png"]
    wrong = {
        "a bomb": picture[:16] + struct.pack(">II", 10**5, 10**5) + picture[24:],
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "nothing": b"",
        "noise": os.urandom(500),
        "SVG": b"<svg onload=alert(1)/>" * 9,
        "PDF": b"%PDF-1.4\n1 0 obj",
        "code": pickle.dumps(print),
        "zip": zipped(),
    }
    for name, (content, expected) in (found | {name: (content, REFUSED) for name, content in wrong.items()}).items():
        yield f"an image of {name}", folder_with(lambda odd, content=content: odd.write_bytes(content)), expected


def folders() -> Iterator[Case]:
    """Yield folders with what is no file of images in one of their classes."""

    def terabyte(odd: Path) -> None:
        with odd.open("wb") as file:
            file.truncate(2**40)

    def listening(odd: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(odd))

    bad: dict[str, Callable[[Path], Any]] = {
        "a pipe": os.mkfifo,
        "a pipe beside the classes": lambda odd: os.mkfifo(odd.parents[2] / "README"),
        "a socket": listening,
        "a terabyte": terabyte,
        "a name that is not UTF-8": lambda odd: odd.with_name("\udcff.png").write_bytes(b""),
        "a class that is not UTF-8": lambda odd: odd.parent.with_name("\udcff").mkdir(),
        "a long name": lambda odd: odd.with_name("n" * 255).write_bytes(b""),
        "a name of two lines": lambda odd: odd.with_name("a\nb.png").write_bytes(b""),
        "an empty class": lambda odd: odd.parent.with_name("wasp").mkdir(),
    }

    def multiplied(odd: Path) -> None:
        for level in range(20):
            folder = odd.parents[2] / f"level{level}"
            folder.mkdir()
            for number in range(9):
                (folder / str(number)).symlink_to(f"../level{level + 1}")

    bad["links that multiply"] = multiplied
    for end in ("/nowhere", "/dev/zero", "/dev/tty", "9.png", ".", "..", "../..", "/proc/self/root"):
        bad[f"a link to {end}"] = lambda odd, end=end: odd.symlink_to(end)
    good: dict[str, Callable[[Path], Any]] = {
        "a hidden pipe": lambda odd: os.mkfifo(odd.with_name(".9.png")),
        "a folder called as an image": lambda odd: odd.mkdir(),
        "a folder 300 deep": lambda odd: odd.joinpath(*"d" * 300).mkdir(parents=True),
        "a link to another class": lambda odd: odd.symlink_to("../bee"),
    }
    for add, expected in ((bad, REFUSED), (good, ACCEPTED)):
        for name, one in add.items():
            yield f"folder with {name}", folder_with(one), expected
    yield "folder of nothing", lambda folder: folder, REFUSED
