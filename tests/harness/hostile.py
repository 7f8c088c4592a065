"""Archives, images, folders and checkpoints that a stranger may hand over: made small, each with what should become of it."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from quantstudy.data.prepare import prepare
from quantstudy.runtimes.library import load_model
from tests.data.conftest import encoded, folder_data

CLASSES = 3
OPENERS: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
REFUSED, ACCEPTED, EITHER = "refused", "accepted", "either"


@dataclass(frozen=True)
class Case:
    """A file that `make` writes into a folder, what reads it, and how that has to end."""

    kind: str
    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    expected: str


def cases(network: Callable[[int], nn.Module], architecture: str) -> Iterator[Case]:
    """Yield every case; checkpoints are of `network`, whose name is `architecture`."""
    for name, make, expected in [*archives(), *images(), *folders()]:
        yield Case(name.split()[0], name, make, lambda path: prepare(folder_data(path, 16), "tiny"), expected)
    torch.manual_seed(0)
    for name, make, expected, *key in checkpoints(network):
        named = {"architecture": None} if "quantstudy" in name else {"architecture": architecture, "image_size": 32}
        more: dict[str, Any] = named | ({"weights_key": key[0]} if key else {})
        yield Case("checkpoint", name, make, lambda path, more=more: load_model(path, **more), expected)


def members() -> dict[str, bytes]:
    """Return the files of a set of two classes."""
    return {
        f"{s}/{c}/{i}.png": encoded(i, (16, 16)) for s in ("train", "test") for c in ("ant", "bee") for i in range(2)
    }


def tar(*extra: tuple[str, dict[str, Any]]) -> bytes:
    """Return a tar of `members`, and of extra ones with attributes of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, attributes in extra:
            member = tarfile.TarInfo(name)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(bytes(10**4)))
    return buffer.getvalue()


def zipped(*extra: tuple[Any, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of `members` and of extra ones."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in (*members().items(), *extra):
            archive.writestr(name, content)
    return buffer.getvalue()


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    """Return a function that writes one file."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def archives() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    """Yield archives."""
    packed = {".zip": zipped(), ".tar": tar()} | {f".tar{suffix}": make(tar()) for suffix, make in OPENERS.items()}
    for suffix, whole in packed.items():
        turned = bytearray(whole)
        turned[len(whole) // 2] ^= 255
        bent = {
            "whole": whole,
            "cut": whole[: len(whole) // 2],
            "nearly whole": whole[: -len(whole) // 10],
            "empty": b"",
        }
        bent |= {"garbage": os.urandom(3000), "flipped": bytes(turned), "text": b"PK\3\4 or what?\n" * 99}
        for name, content in bent.items():
            expected = ACCEPTED if name == "whole" else EITHER if (name, suffix) == ("flipped", ".tar") else REFUSED
            yield f"archive {name}{suffix}", written(f"a{suffix}", content), expected
        if suffix != ".tar":
            yield f"archive a tar named {suffix}", written(f"a{suffix}", packed[".tar"]), REFUSED
    for name in ("../x.png", "/x.png", "train/../../x.png", "C:\\x.png", "..\\x.png", "train/ant/\0/../../../x.png"):
        yield f"archive escapes to {name!r}", written("a.tar", tar((name, {"size": 1}))), REFUSED
        yield f"archive escapes to {name!r} in a zip", written("a.zip", zipped((name, b"x"))), EITHER
    types = {
        "symlink": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "pipe": tarfile.FIFOTYPE,
        "disk": tarfile.BLKTYPE,
    }
    for name, kind in (types | {"device": tarfile.CHRTYPE, "sparse": tarfile.GNUTYPE_SPARSE}).items():
        attributes = {"type": kind, "linkname": "/etc/passwd"}
        yield f"archive with a {name}", written("a.tar", tar(("train/ant/9.png", attributes))), REFUSED
    header = bytearray(tar())
    header[124:136] = b"7" * 11 + b"\0"
    yield "archive of a huge size", written("a.tar", bytes(header)), REFUSED
    yield "archive of names not in UTF-8", written("a.tar", tar(("train/ant/\udcff.png", {"size": 9}))), REFUSED
    deep = f"train/ant/{'d/' * 2000}x.png"
    yield "archive of a deep path", written("a.tar", tar((deep, {"size": 9}))), REFUSED
    yield "archive of a long name", written("a.zip", zipped((f"train/ant/{'n' * 9999}.png", b"x"))), REFUSED
    linked = zipfile.ZipInfo("train/ant/link.png")
    linked.external_attr = 0o120777 << 16
    yield "archive of a link in a zip", written("a.zip", zipped((linked, b"/etc/passwd"))), REFUSED
    for name, offset, value in (("unknown compression", 10, 99), ("encryption", 8, 1), ("version", 6, 250)):
        content = bytearray(zipped())
        at = content.index(b"PK\1\2")
        content[at + offset] = value
        yield f"archive of an {name}", written("a.zip", bytes(content)), REFUSED
    yield "archive bomb", written("a.zip", zipped(("train/ant/b.png", bytes(2**29 + 1)))), REFUSED
    yield "archive bomb in gzip", written("a.tar.gz", gzip.compress(bytes(2**20)) * 1100), REFUSED
    yield "archive in an archive", written("a.zip", zipped(("train/ant/a.zip", zipped()))), REFUSED


def images() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    """Yield folders with one image each that is not what its name says."""

    def beside(content: bytes) -> Callable[[Path], Path]:
        return lambda folder: tree(folder, content)

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        whole = buffer.getvalue()
        yield f"image {form}", beside(whole), ACCEPTED
        yield f"image {form} cut", beside(whole[: len(whole) // 3]), REFUSED
    for mode, expected in {"L": ACCEPTED, "CMYK": ACCEPTED, "P": ACCEPTED, "I;16": REFUSED, "F": REFUSED}.items():
        buffer = io.BytesIO()
        Image.new(mode, (20, 20)).save(buffer, "TIFF")
        yield f"image of mode {mode}", beside(buffer.getvalue()), expected
    large = bytearray(encoded(0, (16, 16)))
    large[16:24] = struct.pack(">II", 10**5, 10**5)
    others = {"a bomb": bytes(large), "empty": b"", "garbage": os.urandom(500), "text": b"<svg onload=alert(1)/>" * 9}
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    others |= {
        "EPS": script,
        "PDF": b"%PDF-1.4\n1 0 obj",
        "HTML": b"<html>",
        "a pickle": pickle.dumps(print),
        "zip": zipped(),
    }
    for name, content in others.items():
        yield f"image {name}", beside(content), REFUSED
    buffer = io.BytesIO()
    picture.resize((1, 3000)).save(buffer, "PNG")
    yield "image of one column", beside(buffer.getvalue()), ACCEPTED


def tree(folder: Path, content: bytes | None = None) -> Path:
    """Write `members` as a folder, with one more image of `content`."""
    for name, image in (members() | ({} if content is None else {"train/ant/9.png": content})).items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(image)
    return folder / "set"


def folders() -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    """Yield folders with what is no image in one of their classes."""

    def adding(add: Callable[[Path], Any]) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            root = tree(folder)
            add(root / "train" / "ant")
            return root

        return make

    def sparse(ant: Path) -> None:
        with (ant / "9.png").open("wb") as file:
            file.truncate(2**40)

    def listening(ant: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(ant / "9.png"))

    additions: dict[str, tuple[Callable[[Path], Any], str]] = {
        "a pipe": (lambda ant: os.mkfifo(ant / "9.png"), REFUSED),
        "a hidden pipe": (lambda ant: os.mkfifo(ant / ".9.png"), ACCEPTED),
        "a socket": (listening, REFUSED),
        "a terabyte": (sparse, REFUSED),
        "a folder called as an image": (lambda ant: (ant / "9.png").mkdir(), ACCEPTED),
        "a name that is not UTF-8": (
            lambda ant: Path(os.fsdecode(bytes(ant) + b"/\xff.png")).write_bytes(b""),
            REFUSED,
        ),
        "a class that is not UTF-8": (lambda ant: Path(os.fsdecode(bytes(ant) + b"\xff")).mkdir(), REFUSED),
        "a long name": (lambda ant: (ant / f"{'n' * 250}.png").write_bytes(b""), REFUSED),
        "a name of two lines": (lambda ant: (ant / "a\nb.png").write_bytes(b""), REFUSED),
        "an empty class": (lambda ant: (ant.parent / "wasp").mkdir(), REFUSED),
        "a deep folder": (lambda ant: (ant / ("d/" * 300)).mkdir(parents=True), ACCEPTED),
        "a pipe beside the classes": (lambda ant: os.mkfifo(ant.parents[1] / "README"), REFUSED),
    }
    ends = {
        "nothing": "/nowhere",
        "/dev/zero": "/dev/zero",
        "/dev/tty": "/dev/tty",
        "itself": "9.png",
        "its folder": ".",
    }
    for name, end in (ends | {"the top": "../..", "/proc": "/proc/self/root", "a twin": "../bee"}).items():
        expected = ACCEPTED if name == "a twin" else REFUSED
        additions[f"a link to {name}"] = (lambda ant, end=end: (ant / "9.png").symlink_to(end), expected)
    for name, (add, expected) in additions.items():
        yield f"folder with {name}", adding(add), expected
    yield "folder of nothing", lambda folder: folder, REFUSED


class Evil:
    """Touches a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def checkpoints(network: Callable[[int], nn.Module]) -> Iterator[Any]:
    """Yield checkpoints: a name, what writes it, how it ends, and the key if one is named."""
    model = network(CLASSES).eval()
    state, first = dict(model.state_dict()), "0.0.weight"
    weight = state[first]

    def saved(content: Any, name: str = "m.pth", **options: Any) -> Callable[[Path], Path]:
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return written(name, buffer.getvalue())

    def named(change: Callable[[str], str]) -> dict[str, torch.Tensor]:
        return {change(name): tensor for name, tensor in state.items()}

    double = named(lambda name: f"student.{name}") | named(lambda name: f"teacher.{name}")
    noise = {"epoch": 3, "optimizer": torch.optim.Adam(model.parameters()).state_dict(), "loss": torch.zeros(())}
    wrapped = {
        prefix: named(lambda name, prefix=prefix: prefix + name)
        for prefix in ("module.", "_orig_mod.", "model.", "net.")
    }
    wrapped |= {
        "two wrappers": named(lambda name: f"module._orig_mod.{name}"),
        "inside": named(lambda n: n.replace("0.", "0.module.", 1)),
    }
    wrapped |= {
        "a criterion": wrapped["model."] | {"criterion.weight": torch.ones(3)},
        "an average": wrapped["module."] | {"n_averaged": torch.ones(())},
    }
    wrapped |= {"half": {k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "plain": state}
    for name, content in wrapped.items():
        yield name, saved(content), ACCEPTED
    for key in ("state_dict", "model", "net", "model_ema", "state_dict_ema", "model_state_dict", "anything"):
        yield f"under {key}", saved(noise | {key: state}), ACCEPTED
    several = noise | {"state_dict": state, "state_dict_ema": state, "ema": {"module": state, "decay": 0.9}}
    for key, expected in {None: REFUSED, "state_dict_ema": ACCEPTED, "ema.module": ACCEPTED, "emma": REFUSED}.items():
        yield f"several, {key}", saved(several), expected, *([key] if key else [])
    for key, expected in {None: REFUSED, "student": ACCEPTED, "tutor": REFUSED}.items():
        yield f"two networks, {key}", saved(double), expected, *([key] if key else [])
    yield "legacy format", saved(state, _use_new_zipfile_serialization=False), ACCEPTED

    wrong: dict[str, Any] = {"a NaN": weight.clone().index_fill_(0, torch.tensor(1), float("nan"))}
    wrong |= {
        "infinite": weight / 0,
        "complex": weight + 1j,
        "integers": weight.mul(9).int(),
        "beyond float32": weight.double() * 1e300,
    }
    wrong |= {
        "sparse": weight.to_sparse(),
        "CSR": weight.flatten(1).to_sparse_csr(),
        "meta": weight.to("meta"),
        "scalar": torch.ones(()),
    }
    wrong |= {
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "expanded": torch.ones(1).expand(weight.shape),
    }
    wrong |= {
        "boolean": weight > 0,
        "nested": torch.nested.nested_tensor([weight[0], weight[1]]),
        "vast": torch.ones(1).expand(10**6, 10**6),
    }
    wrong |= {"text": "weights", "none": None, "a list": [1.0], "an array": weight.numpy()}
    for name, value in wrong.items():
        yield f"a weight that is {name}", saved(state | {first: value}), REFUSED
    yield "a negative variance", saved(state | {"0.1.running_var": torch.full((8,), -1.0)}), REFUSED
    heads = {
        "scalar": torch.ones(()),
        "empty": torch.ones(0, 8),
        "vast": torch.ones(1).expand(10**9, 8),
        "sparse": torch.eye(3, 8).to_sparse(),
    }
    for name, value in heads.items():
        yield f"a head that is {name}", saved(state | {"2.weight": value}), REFUSED
    yield "without a head", saved({k: v for k, v in state.items() if "2." not in k}), REFUSED
    yield "another architecture", saved(nn.Sequential(nn.Linear(4, 4)).state_dict()), REFUSED
    yield "a name of a megabyte", saved(state | {"n." * 10**6: weight}), REFUSED
    yield "integer keys", saved({0: weight, 1: weight}), REFUSED
    for name, content in {
        "a list": [weight],
        "a tensor": weight,
        "nothing": None,
        "a number": 3,
        "empty": {},
        "text": "x",
    }.items():
        yield f"only {name}", saved(content), REFUSED
    strange = {
        "a whole model": model,
        "a Namespace": {"state_dict": state, "args": argparse.Namespace(lr=1)},
        "code": {"model": Evil()},
    }
    strange |= {
        "a class": {"w": Case},
        "an exception": {"w": ValueError("x")},
        "a path": {"w": Path("x")},
        "a function": {"w": print},
    }
    for name, content in strange.items():
        yield name, saved(content), REFUSED
        yield f"{name}, in the legacy format", saved(content, _use_new_zipfile_serialization=False), REFUSED
    yield "a bare pickle", written("m.pth", pickle.dumps(OrderedDict(w=[1, 2]))), REFUSED
    yield "a bare pickle of code", written("m.pth", pickle.dumps(Evil())), REFUSED
    yield "deep", written("m.pth", b"\x80\x02" + b"(" * 10**6), REFUSED

    def scripted(folder: Path) -> Path:
        torch.jit.trace(model, torch.ones(1, 3, 32, 32)).save(str(folder / "m.pt"))  # noqa: TID251
        return folder / "m.pt"

    yield "TorchScript", scripted, REFUSED
    whole = saved(state)
    for name, bend in {
        "cut": lambda content: content[: len(content) // 2],
        "empty": lambda content: b"",
        "garbage": lambda content: os.urandom(len(content)),
        "flipped": lambda content: content.replace(weight.numpy().tobytes(), bytes(weight.nbytes)),
        "compressed": lambda content: repacked(content),
    }.items():
        yield f"a file that is {name}", lambda folder, bend=bend: bent(whole(folder), bend), REFUSED
    yield from safetensors(state)
    facts = {"format": "quantstudy-3", "variant": "fp32", "architecture": "resnet18", "classes": 3}
    for name, content in {
        "facts": facts,
        "a format": {"format": "quantstudy-3"},
        "tensors": facts | {"state_dict": {"w": weight}},
    }.items():
        yield f"quantstudy's, with {name} alone", saved(content), REFUSED
    yield (
        "quantstudy's, with wrong types",
        saved(facts | {"preprocessing": 3, "state_dict": 7, "variant": "int8"}),
        REFUSED,
    )


def bent(path: Path, bend: Callable[[bytes], bytes]) -> Path:
    """Change the content of a file."""
    path.write_bytes(bend(path.read_bytes()))
    return path


def repacked(content: bytes) -> bytes:
    """Return a zip's records, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def safetensors(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[Path], Path], str]]:
    """Yield files in that format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values = b""
    for name, tensor in state.items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(values), len(values) + tensor.nbytes],
        }
        values += tensor.numpy().tobytes()

    def file(header: Any, values: bytes = values) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + values

    row = header["0.0.weight"]
    yield "safetensors", written("m.safetensors", file(header)), ACCEPTED
    yield "safetensors called otherwise", written("pytorch_model.bin", file(header)), ACCEPTED
    wrong: dict[str, bytes] = {
        "cut": file(header)[:-40],
        "longer": file(header) + b"x",
        "huge": b"\xff" * 8 + b"{}",
        "only": file({}),
    }
    wrong |= {"deep": (2 * 10**5).to_bytes(8, "little") + b'{"a":' * 40000, "nan": file(header, b"\xff" * len(values))}
    changes = {
        "type": {"dtype": "F99"},
        "shape": {"shape": [8, 3, 3, 9]},
        "vast": {"shape": [10**9, 10**9]},
        "row": {"data_offsets": 3},
    }
    wrong |= {name: file(header | {"0.0.weight": row | change}) for name, change in changes.items()}
    for name, content in wrong.items():
        yield f"safetensors of wrong {name}", written("m.safetensors", content), REFUSED
