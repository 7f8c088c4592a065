"""Benchmarks read networks as the library does, and import all code that they run, so its digest counts."""

import argparse
import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quantstudy as qs
from benchmarks import low_bits
from quantstudy.network.architectures import build
from quantstudy.network.source_code import transitive_imports
from tests.conftest import ROOT

SCRIPTS = [path for folder in ("benchmarks", "stages", "tools", "docs") for path in ROOT.glob(f"{folder}/**/*.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_script_uses_names_that_the_package_imports_unseen(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_bytes())):
        if isinstance(node, ast.Import):
            assert "quantstudy" not in [alias.name for alias in node.names], "import the module that defines it"
        if isinstance(node, ast.ImportFrom) and node.module == "quantstudy":
            assert not {alias.name for alias in node.names} & set(qs.__all__), "import the module that defines it"


@pytest.mark.parametrize("name", ["ablation", "budget_front", "low_bits", "peers", "search"])
def test_a_benchmark_does_not_depend_on_the_tables_of_studies(name: str) -> None:
    found = transitive_imports(Path("benchmarks") / f"{name}.py", ROOT)
    assert not {Path("quantstudy/report/results.py"), Path("quantstudy/report/tables.py")} & set(found)


def test_the_network_of_photos_is_the_one_that_the_library_loads(tmp_path: Path) -> None:
    architecture, pixels = "tests.families:small_efficientnet", np.random.default_rng(0)
    for number in range(4):
        (folder := tmp_path / "photos" / str(number)).mkdir(parents=True)
        Image.fromarray(pixels.integers(0, 256, (240, 240, 3), dtype=np.uint8)).save(folder / "photo.png")
    torch.manual_seed(0)
    torch.save(build(architecture, 5).state_dict(), tmp_path / "weights.pth")
    given = {"photos": tmp_path / "photos", "weights": tmp_path / "weights.pth", "mean": [0.5], "std": [0.5]}
    subject = low_bits.of_photos(argparse.Namespace(architecture=architecture, **given))
    calibrating, judging = subject.draw(0)
    assert sorted([*calibrating.labels.tolist(), *judging.labels.tolist()]) == [0, 1, 2, 3]
    model = qs.load_model(given["weights"], architecture, preprocessing=subject.preprocessing)
    assert torch.equal(subject.logits(subject.network, judging), subject.logits(model.network, judging))
