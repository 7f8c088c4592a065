"""What every test may use: a project in a temporary folder, with one tiny study."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy.errors import run_stage

ROOT = Path(__file__).parents[1]

HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
"""Brings pixels to -1 … 1."""
TINY = {
    "model": {"architecture": "mobilenet_v2"},
    "data": {
        "source": "digits",
        "image_size": 32,
        **HALVES,
        "max_train": 96,
        "max_test": 48,
    },
    "training": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 16, "optimizer": "adamw"},
    "calibration": {"batches": 2, "batch_size": 16},
    "qat": {"epochs": 1, "learning_rate": 1e-5, "batch_size": 16},
    "seed": 0,
}


@dataclass(frozen=True)
class Project:
    """A project root with a `params.yaml` that is the repository's, but for its only study, `tiny`."""

    root: Path
    study: str = "tiny"

    def edit(self, key: str, value: Any) -> None:
        """Set a dotted key of params.yaml, e.g. `studies.tiny.data.max_train`; None for `value` writes null."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section[parent]
        section[last] = value
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def failure(self, main: Callable[[Sequence[str]], None], *flags: str) -> str:
        """Run a stage's `main` on the study; it must exit with one line on stderr and status 1. Return the line."""
        with pytest.raises(SystemExit) as stop:
            run_stage(lambda: main(["--study", self.study, *flags]))
        line = stop.value.code
        assert isinstance(line, str) and "\n" not in line
        return line

    def files(self) -> list[str]:
        """Return every file below the root but params.yaml, relative to it, sorted."""
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(name for name in found if name != "params.yaml")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A fresh project root as the working directory."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["run"], params["studies"] = ["tiny"], {"tiny": TINY}
    params["measure"].update(runtimes=[], seconds=0.05)
    root = tmp_path / "project"
    root.mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    monkeypatch.chdir(root)
    return Project(root)
