import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from quantstudy import layout
from quantstudy.data.batches import Batches
from quantstudy.data.container import load_split
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.params import Preprocessing
from stages import download
from tests.conftest import ROOT, Project
from tests.harness.processes import running

pytestmark = pytest.mark.slow

PREPROCESSING = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def run(project: Project, processes: int) -> subprocess.CompletedProcess[str]:
    project.edit("runtime.processes", processes)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.finetune", "--study", project.study]
    return subprocess.run(command, cwd=project.root, env=environment, text=True, capture_output=True, check=False)


def finetune(project: Project, processes: int) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    done = run(project, processes)
    assert done.returncode == 0, done.stderr
    return pd.read_csv("reports/tiny/curves/finetune.csv"), load_checkpoint(Path("models/tiny/fp32.pth"))["state_dict"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_the_model_that_one_trains(project: Project) -> None:
    download.main(["--study", project.study])
    project.edit("studies.tiny.training.augmentation", "none")
    one, one_weights = finetune(project, 1)
    two, two_weights = finetune(project, 2)
    assert list(two.epoch) == list(one.epoch)
    for column, tolerance in (("train_loss", 0.1), ("validation_loss", 0.1), ("learning_rate", 1e-6)):
        assert two[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=tolerance), column
    assert abs(two.validation_top1.iloc[-1] - one.validation_top1.iloc[-1]) <= 10
    assert two_weights.keys() == one_weights.keys()


def test_the_shares_of_a_batch_are_the_batch(project: Project) -> None:
    download.main(["--study", project.study])
    split = load_split(Path("data/tiny/train.pt"))
    whole = Batches(split, PREPROCESSING, 16, "cpu", shuffle=True, seed=3)
    parts = [Batches(split, PREPROCESSING, 16, "cpu", shuffle=True, seed=3, share=(part, 2)) for part in range(2)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


def test_failed_processes_are_one_line(project: Project) -> None:
    done = run(project, 2)
    assert done.returncode == 1
    assert "train.pt: no such file" in done.stderr
    assert done.stderr.rstrip().endswith("error: runtime.processes: 2 processes of finetune failed with status 1")


def test_a_signal_ends_every_process(project: Project) -> None:
    download.main(["--study", project.study])
    for key, value in (("runtime.processes", 2), ("studies.tiny.training.epochs", 10_000)):
        project.edit(key, value)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.finetune", "--study", project.study]
    stage = subprocess.Popen(command, cwd=project.root, env=environment, text=True, stderr=-1)
    while not layout.curve("tiny", "finetune").is_file():
        assert stage.poll() is None
        time.sleep(0.1)
    processes = psutil.Process(stage.pid).children(recursive=True)
    assert len(processes) >= 3  # torchrun and two of the stage
    stage.terminate()
    errors = stage.communicate(timeout=60)[1]
    assert stage.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors
    assert not running(processes, seconds=1)
