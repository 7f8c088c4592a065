"""The download stage: what it writes, that it writes the same again, and that a mistake writes nothing."""

import os
import subprocess
import sys
from pathlib import Path

from quantstudy.data.container import Split, load_split
from stages import download
from tests.conftest import HALVES

SPLITS = ["data/tiny/calibration.pt", "data/tiny/test.pt", "data/tiny/train.pt"]


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


def test_the_seed_draws_the_calibration_images_and_nothing_else(project) -> None:
    download.main(["--study", "tiny"])
    assert project.files() == SPLITS
    first = {name: Path(name).read_bytes() for name in SPLITS}
    download.main(["--study", "tiny"])
    assert first == {name: Path(name).read_bytes() for name in SPLITS}
    project.edit("studies.tiny.seed", 1)
    download.main(["--study", "tiny"])
    assert [name for name in SPLITS if Path(name).read_bytes() != first[name]] == ["data/tiny/calibration.pt"]


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
