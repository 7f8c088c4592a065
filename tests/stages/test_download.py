"""The download stage: what it writes, that it writes the same again, and that a mistake writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantstudy import layout
from quantstudy.data.archive import open_files
from quantstudy.data.container import Split, load_split
from quantstudy.data.folder import tree_sha256
from quantstudy.files import read_json, sha256
from quantstudy.network.architectures import build, code_sha256
from quantstudy.network.checkpoint import load_checkpoint
from stages import calibrate, download, evaluate, export, finetune, outliers, page, plots, ptq, qat, sensitivity, trace
from tests.conftest import HALVES, Project
from tests.data.conftest import MakeTree, folder_data, make_tree
from tests.params import FEW

__all__ = ["make_tree"]

SPLITS = [f"data/tiny/{name}.pt" for name in ("calibration", "test", "train", "validation")]


def rows(split: Split) -> set[bytes]:
    assert split.images is not None
    return {bytes(image.flatten().tolist()) for image in split.images}


def load(name: str) -> Split:
    return load_split(Path("data/tiny") / f"{name}.pt")


def test_calibration_comes_from_train_and_never_from_test(project) -> None:
    project.edit("studies.tiny.data.max_train", None)
    project.edit("studies.tiny.data.max_test", None)
    download.main(["--study", "tiny"])
    train, calibration, test = (load(name) for name in ("train", "calibration", "test"))
    assert (len(train), len(calibration), len(test)) == (1258, 32, 539)
    assert rows(calibration) <= rows(train)
    assert not rows(calibration) & rows(test) and not rows(train) & rows(test)


def test_the_seed_draws_calibration_and_validation_images_and_nothing_else(project) -> None:
    download.main(["--study", "tiny"])
    assert project.files() == SPLITS
    first = {name: Path(name).read_bytes() for name in SPLITS}
    download.main(["--study", "tiny"])
    assert first == {name: Path(name).read_bytes() for name in SPLITS}
    project.edit("studies.tiny.seed", 1)
    download.main(["--study", "tiny"])
    assert [name for name in SPLITS if Path(name).read_bytes() != first[name]] == [SPLITS[0], SPLITS[3]]


def test_a_mistake_in_the_params_is_one_line_and_writes_nothing(project) -> None:
    project.edit("studies.tiny.data.max_train", 31)
    line = "error: studies.tiny.calibration: 2 batches of 16 need 32 images, but"
    assert project.failure(download.main).startswith(line)
    assert project.files() == []


def test_a_failed_run_keeps_the_splits_of_the_last_one(project) -> None:
    download.main(["--study", "tiny"])
    before = {name: Path(name).read_bytes() for name in SPLITS}
    project.edit("studies.tiny.data", {"source": "folder", "path": "none", "image_size": 32, **HALVES})
    assert "none: no such file" in project.failure(download.main)
    assert before == {name: Path(name).read_bytes() for name in SPLITS}


def test_a_full_disk_is_one_line_and_leaves_nothing(project) -> None:
    """The largest file that may be written stands in for the disk; it is set in a process of its own."""
    script = (
        "import resource; from quantstudy.errors import run_stage; from stages import download;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "run_stage(lambda: download.main(['--study', 'tiny']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(download.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    line = "error: the disk is full while writing data/tiny/train.pt; free some space and run the stage again\n"
    assert (done.returncode, done.stderr) == (1, line)
    assert project.files() == []


@pytest.mark.slow
def test_a_study_without_training_images_calibrates_on_its_own(project: Project, make_tree: MakeTree) -> None:
    """Its classes are those of test/, of which a calibration image may be none."""
    tree, bad = make_tree(train=20, size=(40, 32)), "studies.tiny.training.epochs"
    (tree / "train" / "bee").rename(tree / "train" / "unknown")
    (tree / "train").rename(tree.parent / "photos")
    torch.save(build("mobilenet_v2", 2).state_dict(), "weights.pth")
    weights = {"weights": "weights.pth", "weights_sha256": sha256(Path("weights.pth"))}
    project.edit("studies.tiny.model", {"architecture": "mobilenet_v2", **weights})
    project.edit("studies.tiny.data", folder_data(tree, 32).model_dump(exclude_none=True, mode="json"))
    assert "name a folder of images in calibration.path" in project.failure(download.main)
    project.edit("studies.tiny.calibration.path", str(tree.parent / "photos"))
    assert f"studies.tiny.calibration.sha256: None is not the SHA-256 of {tree.parent}" in project.failure(
        download.main
    )
    checksum = tree_sha256(open_files(tree.parent / "photos"))
    project.edit("studies.tiny.calibration.sha256", checksum)
    download.main(["--study", "tiny"])
    assert (len(load("train")), len(load("test")), set(load("calibration").labels.tolist())) == (0, 4, {0, -1})
    assert f"{bad}: 1 would train, but 2 of 2 classes have no training images, ant for one" in project.failure(
        finetune.main
    )
    project.edit(bad, 0)
    for stage in (finetune, calibrate, sensitivity):
        stage.main(["--study", "tiny"])
    ptq.main(["--study", "tiny", "--method", "int8_static"])
    for variant in ("fp32", "int8_static"):
        evaluate.main(["--study", "tiny", "--variant", variant])
        assert load_checkpoint(layout.model("tiny", variant))["class_names"] == ["ant", "bee"]
    assert "studies.tiny.qat.epochs: 1 would train, but 2 of 2 classes" in project.failure(
        qat.main, "--method", "qat_int8"
    )


@pytest.mark.slow
def test_a_study_of_grey_oblong_images(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage shows the network what its row says, in training, the export and the page too."""
    lines = [
        "def net(num_classes):",
        "    conv, head = nn.Conv2d(1, 8, 3, stride=2), nn.Linear(8 * 7 * 11, num_classes)",
    ]
    lines += ["    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), head)"]
    Path("grey_network.py").write_text("\n".join(["from torch import nn", "", "", *lines, ""]))
    monkeypatch.syspath_prepend(project.root)
    own = {"architecture": "grey_network:net", "code_sha256": code_sha256("grey_network:net")}
    project.edit("studies.tiny.model", own)
    data = {"image_size": [16, 24], "channels": 1, "mean": [0.5], "std": [0.5], "resize": "exact"}
    project.edit("studies.tiny.data", {"source": "digits", "max_train": 96, "max_test": 48, **data})
    project.edit("studies.tiny.training.augmentation", "crop_flip")
    for key, value in FEW.items():
        project.edit(key, value)
    for stage in (download, finetune, calibrate, sensitivity, outliers, trace):
        stage.main(["--study", "tiny"])
    for method in ("int8_static", "int4_weight_only", "mixed_budget"):
        ptq.main(["--study", "tiny", "--method", method])
    qat.main(["--study", "tiny", "--method", "qat_int8"])
    for variant in ("fp32", "int8_static", "int4_weight_only", "mixed_budget", "qat_int8"):
        evaluate.main(["--study", "tiny", "--variant", variant])
    export.main(["--study", "tiny", "--variant", "int8_static"])
    about = read_json(layout.onnx("tiny", "int8_static").with_suffix(".json"))
    assert about["class_names"] == list("0123456789") and about["preprocessing"]["image_size"] == [16, 24]
    assert load("test").images.shape == (48, 1, 8, 8)
    plots.main(["--study", "tiny"])
    page.main(["--study", "tiny"])
