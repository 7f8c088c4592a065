"""How sets of each size are stored, and that what is stored is the image."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantstudy.data import images
from quantstudy.data.container import load_split, save_split
from quantstudy.data.decoding import square
from quantstudy.data.prepare import prepare
from tests.data.conftest import MakeTree, folder_data


def read(path: Path, image_size: int):
    return prepare(folder_data(path, image_size), "tiny")[0]


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "image_size", "side"),
    [
        pytest.param((16, 16), 16, 16, id="as-it-is"),
        pytest.param((16, 16), 32, 16, id="small-stays-small"),
        pytest.param((40, 20), 16, 16, id="short-side-then-crop"),
        pytest.param((20, 16), 32, 16, id="crop-only"),
    ],
)
def test_small_sets_are_stored_decoded(make_tree: MakeTree, size: tuple[int, int], image_size: int, side: int) -> None:
    split = read(make_tree(size=size), image_size)
    assert split.images.shape == (8, 3, side, side) and split.images.dtype == torch.uint8


def test_stored_pixels_are_the_files_pixels(make_tree: MakeTree) -> None:
    tree = make_tree()
    split = read(tree, 16)
    files = sorted((tree / "train").rglob("*.png"))
    assert torch.equal(split.images, torch.stack([pixels(file) for file in files]))
    Image.new("L", (9, 30)).save(tree / "train" / "ant" / "odd.png")
    assert read(tree, 24).images.shape == (9, 3, 24, 24)
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    assert (square(image, 20) == 255).all()


@pytest.mark.parametrize(
    ("size", "image_size", "kept"),
    [
        pytest.param((100, 80), 72, True, id="near-enough-keeps-its-bytes"),
        pytest.param((90, 70), 100, True, id="smaller-keeps-its-bytes"),
        pytest.param((300, 200), 72, False, id="larger-is-encoded-again"),
    ],
)
def test_large_sets_stay_encoded(
    make_tree: MakeTree, monkeypatch: Any, tmp_path: Path, size: tuple[int, int], image_size: int, kept: bool
) -> None:
    monkeypatch.setattr(images, "_DECODED_BYTES", 1)
    tree = make_tree(size=size, suffix=".jpg", train=2, test=1)
    save_split(tmp_path / "train.pt", read(tree, image_size))
    split = load_split(tmp_path / "train.pt")
    files = [path.read_bytes() for path in sorted((tree / "train").rglob("*.jpg"))]
    stored = [bytes(split.encoded[a:b].numpy()) for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
    assert (stored == files) == kept
    if not kept:
        assert {min(Image.open(io.BytesIO(one)).size) for one in stored} == {split.side}
    direct = torch.from_numpy(np.stack([square(one, split.side) for one in stored])).permute(0, 3, 1, 2)
    assert torch.equal(split.decode(torch.arange(4)), direct)
    assert torch.equal(split.subset([3, 1]).decode(torch.tensor([1, 0])), direct[[1, 3]])
