"""Small image folders, and archives of them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantstudy.data.archive import open_files
from quantstudy.data.folder import tree_sha256
from quantstudy.files import sha256
from quantstudy.params import Data
from tests.conftest import HALVES

MakeTree = Callable[..., Path]
Pack = Callable[[Path, str], Path]


def folder_data(path: Path, image_size: int, **keys: Any) -> Data:
    """Return the params of a folder source at `path`, with its checksum unless `keys` holds another."""
    checksum: dict[str, Any] = {}
    if path.exists():
        checksum = {"sha256": sha256(path) if path.is_file() else tree_sha256(open_files(path))}
    return Data(source="folder", path=str(path), image_size=image_size, **{**HALVES, **checksum, **keys})


def encoded(seed: int, size: tuple[int, int], suffix: str = ".png") -> bytes:
    """Return an image file of random pixels, `size` wide and high."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return buffer.getvalue()


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """A function that writes train/<class>/<file> and test/<class>/<file> and returns their parent."""

    def make(
        classes: tuple[str, ...] = ("ant", "bee"),
        train: int = 4,
        test: int = 2,
        size: tuple[int, int] = (16, 16),
        suffix: str = ".png",
        name: str = "tree",
    ) -> Path:
        root = tmp_path / name
        for split, count in (("train", train), ("test", test)):
            for label, class_name in enumerate(classes):
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for i in range(count):
                    seed = 1000 * label + 2 * i + (split == "test")
                    (folder / f"{i:03}{suffix}").write_bytes(encoded(seed, size, suffix))
        return root

    return make


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """A function that archives a folder's content and returns the archive; the suffix picks its type."""

    def make(folder: Path, suffix: str) -> Path:
        kind = {".tar": "tar", ".tar.gz": "gztar", ".zip": "zip"}[suffix]
        return Path(shutil.make_archive(str(tmp_path / "packed"), kind, root_dir=folder))

    return make
