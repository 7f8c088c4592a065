"""The ablation goes on from any rows, and calibrates as the study does; a benchmark's error is one line."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import ablation
from quantstudy.data.archive import open_files
from quantstudy.data.batches import images_of
from quantstudy.data.folder import tree_sha256
from quantstudy.data.prepare import prepare
from quantstudy.errors import UserError
from quantstudy.files import read_json, write_json
from quantstudy.params import load_params
from tests.conftest import ROOT, Project


def subject(project: Project) -> tuple[ablation.Subject, torch.Tensor]:
    """Return the ablation's subject, and the calibration images of the study's stages."""
    study = load_params().study("tiny")
    fraction = study.training.validation_fraction
    splits = prepare(study.data, "tiny", study.calibration, study.seed, fraction)
    given = study.data.preprocessing, splits["train"], splits["test"]
    images = images_of(splits["calibration"], study.data.preprocessing, ablation.BATCH)
    return ablation.Subject("tiny", study, nn.Identity(), *given), torch.cat(images)


@pytest.mark.parametrize(
    "changes", [{}, {"training.validation_fraction": 0.4}, {"seed": 3}, {"calibration.path": "own"}]
)
def test_calibration_images_are_those_of_the_study(project: Project, changes: dict[str, Any]) -> None:
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (path := Path("own") / f"{number}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    sha256 = tree_sha256(open_files(Path("own")))
    for key, value in (changes | ({"calibration.sha256": sha256} if "calibration.path" in changes else {})).items():
        project.edit(f"studies.tiny.{key}", value)
    found, expected = subject(project)
    drawn = [torch.cat(found.calibration(seed).images) for seed in (found.study.seed, 5)]
    assert torch.equal(drawn[0], expected) and not torch.equal(drawn[1], expected)


def test_too_few_images_are_one_line(project: Project) -> None:
    found, _ = subject(project)
    row = found.study.calibration.model_copy(update={"batches": 1, "batch_size": 2048})
    found.study = found.study.model_copy(update={"calibration": row})
    with pytest.raises(UserError, match=r"studies\.tiny\.calibration: .* need 2048"):
        found.calibration(0)


def test_rows_of_unknown_schemes_and_techniques_stand_last(project: Project) -> None:
    found, _ = subject(project)
    found.right[()] = np.ones(4, bool)
    measured = {"top1": 1.0, "top1_ci95": 1.0, "top1_drop": 0.0, "top1_drop_std": None, "p_above": None, "seeds": 1}
    measured |= {"images": 1, "mean_bits": 4.0, "size_mb": 1.0, "seconds": 2.0}
    names = [
        ("W8A8", ["nearest"]),
        ("W4", ["nearest"]),
        ("W4", ["nearest", "GPTQ"]),
        ("W4", ["nearest", "an older one"]),
        ("W4", ["qat_w4a8"]),
        ("W1", ["nearest"]),
        ("W2A8", ["qat_w2a8"]),
        ("W2A8", ["qat_w2a8_g32"]),
    ]
    rows = [{"scheme": scheme, "techniques": steps, **measured} for scheme, steps in names]
    random.Random(0).shuffle(rows)
    ablation._write(rows, found, file := Path("ablation.json"))
    assert [(row["scheme"], row["techniques"]) for row in read_json(file)] == names
    assert "qat_w2a8_g32" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize("file", [*ROOT.glob("reports/*/ablation.json")], ids=lambda file: file.parent.name)
def test_a_committed_ablation_can_be_continued(file: Path, tmp_path: Path) -> None:
    rows = read_json(file)
    write_json(tmp_path / "sorted.json", sorted(rows, key=ablation.order))
    assert read_json(tmp_path / "sorted.json") == rows


@pytest.mark.parametrize("script", [*ROOT.glob("benchmarks/*.py")], ids=lambda script: script.name)
def test_the_error_of_a_benchmark_is_one_line(script: Path) -> None:
    text = script.read_text()
    assert "__main__" not in text or text.endswith('if __name__ == "__main__":\n    run_stage(main)\n')
