"""The stage `search` ends in a folder that can be deployed: the file, its figures, a script that runs it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.container import load_split
from quantstudy.data.preprocessing import pixels
from quantstudy.files import read_json
from quantstudy.measure.sequential import PairedTest
from quantstudy.quantization.variant import load_variant
from quantstudy.runtimes.sessions import why_missing
from quantstudy.search.judging import Judge
from quantstudy.search.ship import run_script
from stages import calibrate, download, finetune, search, trace
from tests.conftest import Project

pytestmark = pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
GOAL: dict[str, Any] = {"max_drop": 60.0, "confidence": 0.6}
"""Which a network of one epoch can keep, on few images."""


@pytest.fixture
def study(project: Project) -> Project:
    """A study with a trained network, whose search has two methods to try."""
    project.edit("studies.tiny.data.max_train", 400)
    project.edit("studies.tiny.training.validation_fraction", 0.2)
    project.edit("studies.tiny.goal", GOAL)
    project.edit("measure.threads", 1)
    methods = P.load_params().model_dump(mode="json", exclude_unset=True)["methods"]
    for key in ("ptq", "qat", "export.ptq", "export.qat", "scaling_law.ptq", "scaling_law.qat"):
        project.edit(key, [])
    project.edit("methods", {name: methods[name] for name in ("bf16", "int8_weight_only", "clip_int8")})
    for stage in (download, finetune, calibrate, trace):
        stage.main(["--study", "tiny"])
    return project


@pytest.mark.slow
def test_the_winner_is_made_ready_to_ship(study: Project, capsys: pytest.CaptureFixture[str]) -> None:
    search.main(["--study", "tiny"])
    folder = layout.ship("tiny")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.pth", "model.onnx", "model.json", "ship.json", "run.py", "README.md"}
    facts, figures = read_json(folder / "ship.json"), read_json(layout.ship_metrics("tiny"))
    assert facts["variant"] == "int8_weight_only" and facts["goal_met"] and figures["goal_met"] == 1
    assert figures["size_mb"] == pytest.approx((folder / "model.onnx").stat().st_size / 1e6, rel=0.01)
    assert all(value is None or np.isfinite(value) for value in figures.values())
    assert figures["top1_drop"] == pytest.approx(facts["test"]["fp32_top1"] - facts["test"]["top1"])
    assert facts["test"]["images"] == 48 and facts["validation"]["images"] == 80
    load_variant(folder / "model.pth")
    tried = {trial["name"]: trial["verdict"] for trial in read_json(layout.search("tiny"))["trials"]}
    assert tried["int8_weight_only"] == "accepted" and tried["clip_int8"] == "a row of the outlier study"
    assert not layout.searching("tiny").exists()
    card = (folder / "README.md").read_text()
    assert facts["sentence"] in card and "weight_bits: 8" in card
    assert facts["sentence"] in capsys.readouterr().out

    test = load_split(layout.split("tiny", "test"))
    Image.fromarray(test.decode(torch.tensor([0]))[0].permute(1, 2, 0).numpy()).save("photo.png")
    command = [sys.executable, str(folder / "run.py"), "photo.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in test.classes
    assert len((folder / "run.py").read_text().splitlines()) <= 14


@pytest.mark.slow
def test_a_killed_search_goes_on_and_one_without_a_winner_says_so(
    study: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study.edit("studies.tiny.goal", {"max_drop": 8.0})
    with monkeypatch.context() as patch:
        patch.setattr(search, "ship", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search.main(["--study", "tiny"])
    left = {path.name for path in layout.searching("tiny").glob("*/*.pth")}
    assert left == {"bf16.pth", "int8_weight_only.pth"}
    with monkeypatch.context() as patch:
        patch.setattr("quantstudy.search.search.quantize", lambda *_: 1 / 0)  # nothing is made again
        patch.setattr(Judge, "judge", rejected)
        search.main(["--study", "tiny"])
    assert {path.name for path in layout.ship("tiny").iterdir()} == {"ship.json", "README.md"}
    figures = read_json(layout.ship_metrics("tiny"))
    assert figures["goal_met"] == 0 and figures["size_mb"] is None
    assert "no candidate is shown to lose no more than 8 points" in capsys.readouterr().out
    study.edit("studies.tiny.goal", None)
    assert "studies.tiny.goal: missing" in study.failure(search.main)


def rejected(judge: Judge, shipped: Any, error: float) -> PairedTest:
    test = PairedTest(8.0, 80, error)
    test.look([True] * 4, [False] * 4)
    test.verdict = "rejected"
    return test


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "seen",
    [
        P.Preprocessing(image_size=32, mean=HALF, std=HALF),
        P.Preprocessing(image_size=(24, 40), crop_fraction=0.875, interpolation="bicubic", mean=HALF, std=HALF),
        P.Preprocessing(image_size=40, resize="exact", mean=HALF, std=HALF),
        P.Preprocessing(image_size=20, resize="none", mean=HALF, std=HALF),
        P.Preprocessing(image_size=28, channels=1, exif=True, mean=(0.2,), std=(0.3,)),
    ],
    ids=lambda seen: f"{seen.resize}-{seen.image_size}",
)
@pytest.mark.parametrize("size", [(61, 90), (90, 61), (47, 47)])
def test_the_script_shows_the_network_what_the_study_does(seen: P.Preprocessing, size: Any, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    code = (
        run_script(seen, "onnxruntime")
        .partition("names =")[0]
        .replace("sys.argv[1]", repr(str(tmp_path / "photo.png")))
    )
    found: dict[str, Any] = {"__file__": str(tmp_path / "run.py")}
    exec(code, found)
    wanted = pixels((tmp_path / "photo.png").read_bytes(), seen) / 255
    shown = found["pixels"].transpose(2, 0, 1) * np.reshape(seen.std, (-1, 1, 1)) + np.reshape(seen.mean, (-1, 1, 1))
    np.testing.assert_allclose(shown, wanted, atol=1e-6)
