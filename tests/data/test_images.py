"""How sets of each size are stored, and that what is stored is the image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantstudy.data import images, preprocessing
from quantstudy.data.container import load_split, save_split
from quantstudy.data.prepare import prepare
from tests.data.conftest import MakeTree, folder_data


def read(path: Path, image_size: int):
    return prepare(folder_data(path, image_size), "tiny")["train"]


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "image_size", "stored"),
    [
        pytest.param((16, 16), 16, (16, 16), id="as-it-is"),
        pytest.param((16, 16), 32, (16, 16), id="small-stays-small"),
        pytest.param((40, 20), 16, (16, 16), id="short-side-then-crop"),
        pytest.param((20, 16), 32, (16, 20), id="small-stays-oblong"),
    ],
)
def test_small_sets_are_stored_decoded(
    make_tree: MakeTree, monkeypatch: Any, size: tuple[int, int], image_size: int, stored: tuple[int, int]
) -> None:
    monkeypatch.setattr(images, "_PEEKED", 1)
    tree = make_tree(size=size)
    split = read(tree, image_size)
    assert split.images.shape == (8, 3, *stored) and split.images.dtype == torch.uint8
    Image.new("L", (9, 30)).save(tree / "train" / "ant" / "003.png")
    assert read(tree, image_size).images.shape == (8, 3, image_size, image_size)


def test_stored_pixels_are_the_files_pixels(make_tree: MakeTree) -> None:
    tree = make_tree()
    split = read(tree, 16)
    files = sorted((tree / "train").rglob("*.png"))
    assert torch.equal(split.images, torch.stack([pixels(file) for file in files]))
    Image.new("L", (9, 30)).save(tree / "train" / "ant" / "odd.png")
    assert read(tree, 24).images.shape == (9, 3, 24, 24)
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    assert (preprocessing.pixels(image, folder_data(tree, 20)) == 255).all()


@pytest.mark.parametrize(
    ("suffix", "size", "kept"),
    [
        pytest.param(".jpg", (100, 80), True, id="files-smaller-than-their-pixels-stay"),
        pytest.param(".png", (300, 200), False, id="pixels-where-they-are-smaller"),
    ],
)
def test_large_sets_keep_what_is_smaller(
    make_tree: MakeTree, monkeypatch: Any, tmp_path: Path, suffix: str, size: tuple[int, int], kept: bool
) -> None:
    monkeypatch.setattr(images, "_DECODED_BYTES", 1)
    tree = make_tree(size=size, suffix=suffix, train=2, test=1)
    save_split(tmp_path / "train.pt", read(tree, 72))
    split = load_split(tmp_path / "train.pt")
    files = [path.read_bytes() for path in sorted((tree / "train").rglob(f"*{suffix}"))]
    assert (split.images is None) == kept
    if kept:
        stored = [bytes(split.encoded[a:b].numpy()) for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
        assert stored == files
    seen = torch.from_numpy(np.stack([preprocessing.pixels(one, split.preprocessing) for one in files]))
    assert torch.equal(split.decode(torch.arange(4)), seen)
    assert torch.equal(split.subset([3, 1]).decode(torch.tensor([1, 0])), seen[[1, 3]])
