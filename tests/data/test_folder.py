"""Image folders and archives: the same images from each, and one line for each way they can be wrong."""

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from quantstudy.data.archive import open_files
from quantstudy.data.container import Split
from quantstudy.data.folder import tree_sha256
from quantstudy.data.prepare import prepare
from quantstudy.errors import UserError
from quantstudy.files import sha256
from quantstudy.params import Calibration
from tests.data.conftest import MakeTree, Pack, folder_data


def read(path: Path, image_size: int = 16, **keys: object) -> tuple[Split, Split]:
    splits = prepare(folder_data(path, image_size, **keys), "tiny")
    return splits["train"], splits["test"]


def message(path: Path, **keys: object) -> str:
    with pytest.raises(UserError) as error:
        read(path, **keys)
    text = str(error.value)
    assert "\n" not in text
    return text.replace(str(path), "PATH")


def with_member(archive: Path, name: str, link: str | None = None) -> Path:
    """Append a member to a tar or zip: one byte, or a symbolic link."""
    if archive.suffix == ".zip":
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if link else 0o100644) << 16
        with zipfile.ZipFile(archive, "a") as target:
            target.writestr(info, link or "x")
        return archive
    member = tarfile.TarInfo(name)
    member.size = 0 if link else 1
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    with tarfile.open(archive, "a") as target:
        target.addfile(member, io.BytesIO(b"x"))
    return archive


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "one-top-folder"])
def test_archive_gives_the_folders_images(make_tree: MakeTree, pack: Pack, suffix: str, wrapped: bool) -> None:
    tree = make_tree(name="outer/tree")
    archive = pack(tree.parent if wrapped else tree, suffix)
    for ours, theirs in zip(read(archive), read(tree), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.classes == theirs.classes == ("ant", "bee")


def test_linked_class_folders_are_read_and_files_beside_the_images_left_out(make_tree: MakeTree) -> None:
    tree = make_tree()
    for name in ("README.txt", "train/labels.csv", "train/ant/.DS_Store", ".cache/x"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("x")
    train, test = read(tree)
    assert (len(train), len(test)) == (8, 4)
    moved = tree.parent / "elsewhere"
    (tree / "train" / "bee").rename(moved)
    (tree / "train" / "bee").symlink_to(moved)
    assert read(tree)[0].labels.tolist() == [0] * 4 + [1] * 4


def test_caps_are_balanced_and_deterministic(make_tree: MakeTree) -> None:
    tree = make_tree(train=6, test=4)
    train, test = read(tree, max_train=5, max_test=2)
    assert sorted(train.labels.bincount().tolist()) == [2, 3]
    assert test.labels.bincount().tolist() == [1, 1]
    assert torch.equal(train.images, read(tree, max_train=5)[0].images)


@pytest.mark.parametrize("name", ["../evil.png", "train/../../evil.png", "/evil.png", "C:\\evil.png", "..\\evil.png"])
@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_escaping_member_is_refused(make_tree: MakeTree, pack: Pack, tmp_path: Path, suffix: str, name: str) -> None:
    archive = with_member(pack(make_tree(), suffix), name)
    before = sorted(tmp_path.rglob("*"))
    assert message(archive).startswith(f"PATH: member {name} would escape")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_link_is_refused_by_name(make_tree: MakeTree, pack: Pack, suffix: str) -> None:
    archive = with_member(pack(make_tree(), suffix), "train/ant/9.png", link="../../../secret")
    assert message(archive) == ("PATH: member train/ant/9.png is a link to ../../../secret; archive the file itself")


def test_a_path_that_is_no_archive(tmp_path: Path) -> None:
    assert message(tmp_path / "none.tar").startswith("PATH: no such file (named by the params beside studies.tiny")
    path = tmp_path / "images.rar"
    path.write_bytes(b"Rar!")
    assert message(path).startswith("PATH: not an archive that can be read; use a folder or one of .tar, ")


def test_wrong_checksum_shows_the_one_found(make_tree: MakeTree, pack: Pack) -> None:
    archive = pack(make_tree(), ".tar")
    text = message(archive, sha256="0" * 64)
    assert text.startswith("studies.tiny.data.sha256: '000") and text.endswith(sha256(archive))
    text = message(archive, sha256=None)
    assert text.startswith("studies.tiny.data.sha256: None is not") and text.endswith(sha256(archive))


def test_a_tree_s_checksum_is_that_of_sha256sum_and_of_a_changed_tree_another(make_tree: MakeTree) -> None:
    tree = make_tree()
    before = tree_sha256(open_files(tree))
    (tree / ".hidden").write_text("left out")
    assert tree_sha256(open_files(tree)) == before
    image = tree / "train" / "ant" / "000.png"
    image.rename(image.with_name("100.png"))
    found = tree_sha256(open_files(tree))
    assert found != before
    line = f"studies.tiny.data.sha256: {before!r} is not the SHA-256 of PATH; the one found is {found}"
    assert message(tree, sha256=before) == line
    tree = make_tree(name="other")
    script = "find . -type f | LC_ALL=C sort | sed 's|^./||' | xargs sha256sum | sha256sum"
    printed = subprocess.run(["sh", "-c", script], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert tree_sha256(open_files(tree)) == printed.split()[0]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, "blocks", "garbage"])
def test_truncated_archive(make_tree: MakeTree, pack: Pack, suffix: str, keep: float | str) -> None:
    archive = pack(make_tree(train=20), suffix)
    size = archive.stat().st_size
    if keep == "garbage":
        archive.write_bytes(b"not an archive" * 100)
    else:
        os.truncate(archive, size // 1024 * 512 if keep == "blocks" else int(keep * size))
    assert message(archive).startswith("PATH: truncated or corrupt (")


def test_a_cut_tar_and_a_damaged_zip(make_tree: MakeTree, pack: Pack) -> None:
    archive = pack(make_tree(), ".tar")
    with tarfile.open(archive) as content:
        member = content.getmembers()[6]
    os.truncate(archive, member.offset)
    assert message(archive) == "PATH: truncated or corrupt (no end of archive after 2 files); fetch it again"
    archive = pack(make_tree(name="zipped"), ".zip")
    content = bytearray(archive.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    archive.write_bytes(content)
    assert message(archive).startswith("PATH: truncated or corrupt (")


def test_a_tree_of_another_layout(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / "test").rename(tree / "val")
    hint = "give the folder of the test images this name"
    assert message(tree) == f"PATH: no folder test/; found train, val; {hint}"
    hint = "to draw the test split from folders of classes set studies.tiny.data.test_fraction"
    assert message(tree / "train") == f"PATH: no folder test/; found ant, bee; {hint}"
    assert message(tree.parent).startswith("PATH: no folder test/ in tree/; found train, val")
    tree = make_tree(name="empty")
    (tree / "train" / "cat").mkdir()
    assert message(tree) == "PATH: no images in train/cat/; add some or remove the class"
    tree = make_tree(name="other")
    (tree / "train" / "bee").rename(tree / "train" / "wasp")
    assert message(tree) == "PATH: train/ and test/ have different classes; only train/ has wasp"
    tree = make_tree(test=1, name="flat")
    for found in list((tree / "test").rglob("*.png")):
        found.rename(tree / "test" / f"{found.parent.name}.png")
        found.parent.rmdir()
    assert message(tree) == "PATH: test/ has no class folders with images"


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
@pytest.mark.parametrize("suffix", [".tar", None], ids=["archive", "folder"])
def test_image_that_does_not_decode_is_named(make_tree: MakeTree, pack: Pack, suffix: str | None, damage: str) -> None:
    tree = make_tree()
    bad = tree / "test" / "bee" / "001.png"
    bad.write_bytes(b"x" if damage == "garbage" else bad.read_bytes()[:100])
    source = pack(tree, suffix) if suffix else tree
    assert message(source).startswith("PATH: test/bee/001.png: not an image that can be decoded (")


def test_pixels_of_more_than_8_bits_are_refused(make_tree: MakeTree) -> None:
    tree = make_tree()
    Image.new("I;16", (16, 16), 40_000).save(tree / "train" / "ant" / "000.png")
    line = "PATH: train/ant/000.png: not an image that can be decoded (its pixels have more than 8 bits (mode I;16)"
    assert message(tree).startswith(line)


def test_a_test_split_is_drawn_from_folders_of_classes(make_tree: MakeTree, pack: Pack) -> None:
    tree = make_tree(train=8)
    train, test = read(tree / "train", test_fraction=0.25)
    assert train.classes == test.classes == ("ant", "bee")
    assert train.labels.bincount().tolist() == [6, 6] and test.labels.bincount().tolist() == [2, 2]
    assert train.images is not None and test.images is not None
    seen = [image.numpy().tobytes() for image in (*train.images, *test.images)]
    assert len(set(seen)) == 16
    again = read(pack(tree / "train", ".zip"), test_fraction=0.25)[1].images
    assert again is not None and torch.equal(again, test.images)
    line = message(tree, test_fraction=0.25)
    assert line == "studies.tiny.data.test_fraction: PATH has a folder test/; remove the key"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_folders_around_the_classes_are_not_taken_for_classes(make_tree: MakeTree, depth: int) -> None:
    tree = make_tree(name="a/b/tree")
    (tree / "test").rename(tree.parents[2] / "test")
    (tree / "train").rename(tree.with_name("flowers"))
    (tree.parent / "LICENSE.txt").write_text("x")
    (tree.parent / "tree").rmdir()
    top = [tree.parent / "flowers", *tree.parents][depth]
    assert read(top, test_fraction=0.25)[0].classes == ("ant", "bee")


def test_splits_are_not_taken_for_classes_and_one_class_is_refused(make_tree: MakeTree, capsys: Any) -> None:
    tree = make_tree()
    (tree / "train").rename(tree / "training")
    (tree / "test").rename(tree / "validation")
    line = "studies.tiny.data.test_fraction: PATH has folders of splits, training, validation, not of classes; "
    assert message(tree, test_fraction=0.25).startswith(line)
    tree = make_tree(name="other")
    (tree / "test" / "ant").rename(tree / "val")
    shutil.rmtree(tree / "train" / "ant")
    read(make_tree(name="whole"))
    assert "left out" not in capsys.readouterr().out
    assert message(tree) == "PATH: bee/ is the only class folder; two are needed at least"
    assert capsys.readouterr().out == f"{tree}: left out beside train/ and test/: val\n"


@pytest.mark.parametrize("end", ["000.png", ".", "../..", "/dev/zero", "/nowhere", "pipe", "socket"])
def test_what_is_no_file_ends_in_a_line_and_hangs_nobody(make_tree: MakeTree, end: str) -> None:
    odd = make_tree() / "train" / "ant" / "9.png"
    tree = odd.parents[2]
    if end == "pipe":
        os.mkfifo(odd)
    elif end == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(odd))
    else:
        odd.symlink_to("9.png" if end == "000.png" else end)
    found = message(tree)
    assert re.search("link that loops|links loop|cannot be read: a folder, a pipe or a device|to nothing", found)


def test_a_name_that_is_not_utf8_is_refused(make_tree: MakeTree, pack: Pack) -> None:
    tree = make_tree()
    odd = tree / "train" / "ant" / "\udcff.png"
    odd.write_bytes(b"x")
    assert message(tree).endswith("\\xff.png' is not UTF-8; rename it")
    assert "is not UTF-8" in message(pack(tree, ".tar"))


def test_bombs_and_unknown_compression_are_refused(make_tree: MakeTree, pack: Pack, monkeypatch: Any) -> None:
    archive = pack(make_tree(), ".zip")
    content = bytearray(archive.read_bytes())
    for entry in re.finditer(b"PK\1\2", bytes(content)):
        content[entry.start() + 10] = 99
    archive.write_bytes(content)
    assert "truncated or corrupt (" in message(archive)
    monkeypatch.setattr("quantstudy.data.archive._LARGEST", 500)
    assert "MB; an image has at most" in message(pack(make_tree(name="a"), ".zip"))
    assert "MB; an image has at most" in message(pack(make_tree(name="b"), ".tar"))
    assert "MB; an image has at most" in message(make_tree(name="c"))
    monkeypatch.setattr("quantstudy.data.archive._SWOLLEN", 500)
    monkeypatch.setattr("quantstudy.data.archive._RATIO", 1)
    assert "unpacks to more than" in message(pack(make_tree(name="d"), ".tar.gz"))


def test_no_program_outside_decodes_an_image(make_tree: MakeTree, monkeypatch: Any) -> None:
    tree = make_tree()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    (tree / "train" / "ant" / "9.png").write_bytes(script)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    assert "not an image that can be decoded (cannot identify" in message(tree)


@pytest.mark.parametrize("place", ["", "test", "test/ant", "link", "links"])
def test_images_that_test_do_not_calibrate(place: str, make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree()
    (tmp_path / "link").symlink_to(tree / "test")
    (tmp_path / "links").mkdir()
    for number, image in enumerate(sorted((tree / "test").rglob("*.png"))):
        (tmp_path / "links" / f"{number}.png").symlink_to(image)
    path = tmp_path / place if place.startswith("link") else tree / place

    def splits(path: Path) -> dict[str, Split]:
        checksum = tree_sha256(open_files(path))
        return prepare(
            folder_data(tree, 16), "own", Calibration(path=str(path), sha256=checksum, batches=1, batch_size=2)
        )

    with pytest.raises(UserError, match=r"own\.calibration\.path: \d+ of its images are test images, .* for one"):
        splits(path)
    with pytest.raises(UserError, match=r"own\.calibration\.path: 1 of its images are validation images, .* for one"):
        splits(tree / "train")
    own = make_tree(name="own")
    assert len(splits(own / "train")["calibration"]) == 2
