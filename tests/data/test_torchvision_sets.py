"""CIFAR-100 and Food-101 end to end, from miniature archives in their own formats on a local server."""

import hashlib
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from quantstudy.data.container import load_split
from stages import download
from tests.conftest import HALVES

KEY = "studies.tiny.data"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def write_tar_gz(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return md5(path.read_bytes())


def cifar_part(count: int, seed: int) -> dict[str, object]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": pixels, "fine_labels": [i % 3 for i in range(count)], "coarse_labels": [0] * count}


@pytest.fixture
def cifar100(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """Serve a CIFAR-100 of three classes and point torchvision at it; return its parts."""
    folder, url = server
    parts = {"train": cifar_part(40, 0), "test": cifar_part(12, 1), "meta": {"fine_label_names": ["a", "b", "c"]}}
    files = {name: pickle.dumps(part) for name, part in parts.items()}
    archive = {f"cifar-100-python/{name}": content for name, content in files.items()}
    checksum = write_tar_gz(folder / "cifar-100-python.tar.gz", archive)
    monkeypatch.setattr(datasets.CIFAR100, "url", f"{url}/cifar-100-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", checksum)
    for name in ("train", "test"):
        monkeypatch.setattr(datasets.CIFAR100, f"{name}_list", [[name, md5(files[name])]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": md5(files["meta"])}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return parts


@pytest.fixture
def food101(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Serve a Food-101 of two classes and point torchvision at it; return the archive's files."""
    folder, url = server
    listing = {
        "train": {name: [f"{name}/{i}" for i in range(4)] for name in ("apple_pie", "waffles")},
        "test": {name: [f"{name}/{i}" for i in range(4, 6)] for name in ("apple_pie", "waffles")},
    }
    files = {f"food-101/meta/{split}.json": json.dumps(rows).encode() for split, rows in listing.items()}
    files["food-101/meta/classes.txt"] = b"apple_pie\nwaffles\n"
    files["food-101/meta/labels.txt"] = b"Apple pie\nWaffles\n"
    generator = np.random.default_rng(0)
    for rows in listing.values():
        for one in (one for names in rows.values() for one in names):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
            files[f"food-101/images/{one}.jpg"] = buffer.getvalue()
    checksum = write_tar_gz(folder / "food-101.tar.gz", files)
    monkeypatch.setattr(datasets.Food101, "_URL", f"{url}/food-101.tar.gz")
    monkeypatch.setattr(datasets.Food101, "_MD5", checksum)
    return files


def choose(project, dataset: str, **keys: object) -> None:
    project.edit(KEY, {"source": "torchvision", "dataset": dataset, "image_size": 32, **HALVES, **keys})
    project.edit("studies.tiny.calibration", {"batches": 2, "batch_size": 3})


def test_cifar100(project, cifar100) -> None:
    choose(project, "CIFAR100")
    download.main(["--study", "tiny"])
    train, test = (load_split(Path(f"data/tiny/{name}.pt")) for name in ("train", "test"))
    assert train.classes == ("a", "b", "c")
    for split, part in ((train, cifar100["train"]), (test, cifar100["test"])):
        assert torch.equal(split.images, torch.from_numpy(part["data"]).view(-1, 3, 32, 32))
        assert split.labels.tolist() == part["fine_labels"]


def test_food101_needs_no_network_once_downloaded(project, food101, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(project, "Food101")
    download.main(["--study", "tiny"])
    train = load_split(Path("data/tiny/train.pt"))
    assert train.classes == ("apple_pie", "waffles")
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.images.shape == (8, 3, 32, 32)
    assert len(load_split(Path("data/tiny/test.pt"))) == 4
    before = Path("data/tiny/train.pt").read_bytes()
    monkeypatch.setattr(datasets.Food101, "_URL", "http://127.0.0.1:9/none")
    download.main(["--study", "tiny"])
    assert Path("data/tiny/train.pt").read_bytes() == before
    image = Path("data/external/Food101/food-101/images/waffles/5.jpg")
    image.unlink()
    line = f"error: {image}: no such file; delete data/external/Food101 and run the stage again"
    assert project.failure(download.main) == line


def test_an_archive_put_there_by_hand_is_used(project, cifar100, server, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(project, "CIFAR100")
    root = project.root / "data" / "external" / "CIFAR100"
    root.mkdir(parents=True)
    (server[0] / "cifar-100-python.tar.gz").rename(root / "cifar-100-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/none")
    download.main(["--study", "tiny"])
    assert len(load_split(Path("data/tiny/train.pt"))) == 40
    choose(project, "CIFAR-100")
    line = project.failure(download.main)
    assert line.startswith(f"error: {KEY}.dataset: 'CIFAR-100' is unknown (did you mean CIFAR100?); choose one of ")
    assert "Food101" in line


@pytest.mark.parametrize("failure", ["no-server", "not-found", "wrong-checksum"])
def test_failed_download_is_one_line(project, food101, server, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    choose(project, "Food101")
    if failure == "wrong-checksum":
        monkeypatch.setattr(datasets.Food101, "_MD5", "0" * 32)
    else:
        base = "http://127.0.0.1:9" if failure == "no-server" else server[1]
        monkeypatch.setattr(datasets.Food101, "_URL", f"{base}/none.tar.gz")
    line = project.failure(download.main)
    assert line.startswith(f"error: {KEY}.dataset: Food101 could not be downloaded or read (")
    assert line.endswith("or put its archive there, and run the stage again")
    assert project.files() == []
