"""A run says how far it is, from what its stages took before."""

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from dvc.cli import main

from tests.conftest import Project
from tools import progress
from tools.dvc import count_stages
from tools.progress import Progress, known_seconds, save_seconds

RUNS, SKIPS = "Running stage '%s':", "Stage '%s' didn't change, skipping"


def said(counted: Progress, message: str, name: str) -> str:
    record = logging.LogRecord("dvc.stage", logging.INFO, "", 0, message, (name,), None)
    assert counted.filter(record)
    return record.getMessage()


def test_it_counts_stages_and_adds_up_what_they_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.chain([0.0, 90.0, 90.0, 100.0], itertools.repeat(0.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    counted = Progress(["ptq@a", "ptq@b", "evaluate@a", "report"], {"ptq@a": 60.0, "evaluate@a": 170.0, "report": 5.0})
    assert said(counted, SKIPS, "ptq@a") == "Stage 'ptq@a' didn't change, skipping"
    assert said(counted, RUNS, "ptq@b") == "[2 of 4, about 4 minutes left] Running stage 'ptq@b':"  # like ptq@a
    assert said(counted, RUNS, "evaluate@a") == "[3 of 4, about 3 minutes left] Running stage 'evaluate@a':"
    counted.end()
    save_seconds(tmp_path, counted)
    assert known_seconds(tmp_path) == {"ptq@a": 60.0, "evaluate@a": 10.0, "report": 5.0, "ptq@b": 90.0}
    assert "not known yet" in said(Progress(["a"], {}), RUNS, "a")
    assert "less than a minute left" in said(Progress(["a"], {"a": 1.0}), RUNS, "a")


def test_a_damaged_file_of_seconds_is_none(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"a": "x"}', "\0"):
        (tmp_path / ".cache").mkdir(exist_ok=True)
        (tmp_path / progress.SECONDS).write_text(text)
        assert known_seconds(tmp_path) == {}


def test_dvc_still_says_what_is_counted(
    project: Project, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages are no interface: with others nothing would be counted."""
    Path("dvc.yaml").write_text("stages: {one: {cmd: 'true'}, two: {cmd: 'true', always_changed: true}}")
    assert main(["init", "--no-scm", "-q"]) == 0 and count_stages(Path()) is not None
    loggers = [logging.getLogger(name) for name in ("dvc.stage", "dvc.stage.run", "dvc.stage.cache")]
    try:
        with caplog.at_level(logging.INFO, "dvc"):
            monkeypatch.setattr(logging.getLogger("dvc"), "propagate", True)
            assert main(["repro"]) == 0 and main(["repro"]) == 0
    finally:
        for logger in loggers:
            logger.filters.clear()
    assert sum("of 2, " in record.getMessage() for record in caplog.records) >= 3
