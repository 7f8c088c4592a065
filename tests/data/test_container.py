"""Split files: round trips, equal bytes, and damaged files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantstudy.data.container import Split, load_split, save_split, save_splits
from quantstudy.errors import UserError
from quantstudy.params import Preprocessing

SEEN = Preprocessing(image_size=(8, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")


def decoded_split(labels: list[int], side: int = 4) -> Split:
    generator = torch.Generator().manual_seed(len(labels))
    images = torch.randint(0, 256, (len(labels), 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(torch.tensor(labels), ("a", "b", "é"), SEEN, images=images)


def encoded_split(parts: list[bytes]) -> Split:
    lengths = torch.tensor([0, *map(len, parts)])
    encoded = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    return Split(torch.zeros(len(parts), dtype=torch.int64), ("a",), SEEN, encoded=encoded, offsets=lengths.cumsum(0))


def assert_same(left: Split, right: Split) -> None:
    assert (left.classes, left.preprocessing) == (right.classes, right.preprocessing)
    for field in ("labels", "images", "encoded", "offsets"):
        ours, theirs = getattr(left, field), getattr(right, field)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=1, max_size=9), side=st.integers(1, 9))
def test_decoded_split_round_trips(tmp_path_factory: pytest.TempPathFactory, labels: list[int], side: int) -> None:
    path = tmp_path_factory.mktemp("split") / "train.pt"
    split = decoded_split(labels, side)
    save_split(path, split)
    assert_same(load_split(path), split)


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6), data=st.data())
def test_encoded_split_round_trips_and_subsets(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("split") / "train.pt"
    chosen = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=8))
    split = encoded_split(parts)
    save_split(path, split)
    assert_same(load_split(path), split)
    assert_same(load_split(path).subset(chosen), encoded_split([parts[i] for i in chosen]))


def test_equal_splits_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.pt", "another.pt"):
        save_split(tmp_path / name, decoded_split([0, 1, 2]))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_save_splits_writes_all_or_none_and_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    unwritable = Split(torch.zeros(1), (), SEEN, images=lambda: None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        save_splits({tmp_path / "train.pt": decoded_split([0]), tmp_path / "test.pt": unwritable})
    assert not list(tmp_path.iterdir())
    torch.save({"version": print}, tmp_path / "train.pt")
    with pytest.raises(UserError, match="not a split file"):
        load_split(tmp_path / "train.pt")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(None, "no such file; run the stage `download`", id="missing"),
        pytest.param(lambda content: content[:-50], "not a whole split file", id="truncated"),
        pytest.param(flipped, "not a whole split file (bad checksum of", id="flipped-bit"),
        pytest.param(lambda content: b"label,pixel\n", "not a whole split file", id="another-format"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "train.pt"
    if damage:
        save_split(path, decoded_split([0, 1, 2] * 20))
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        load_split(path)
    assert str(error.value).startswith(f"{path}: {message}")
