"""Parts of the evidence are made once for their code, go on where they were stopped, and say what made them."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy.errors import UserError
from quantstudy.files import read_json
from tests.conftest import ROOT
from tools import evidence
from tools.evidence import RECORD, Part, all_parts, main

SCRIPT = """
from pathlib import Path
rows = Path("rows.txt")
rows.write_text((rows.read_text() if rows.is_file() else "") + "row ")
if Path("stop").is_file():
    raise SystemExit("stopped")
Path("reports").mkdir(exist_ok=True)
Path("reports/toy.txt").write_text(Path("params.yaml").read_text() + rows.read_text())
"""
PARAMS = """
run: [own]
methods:
  one: {bits: 8}
studies:
  own: {seed: 0}
  other: {seed: 0}
"""
PART = Part("toy", ("python work/make.py",), ("reports/toy.txt",), ("work/make.py",), params={"run": ["other"]})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / "work").mkdir()
    for name, text in (
        ("work/make.py", SCRIPT),
        ("params.yaml", PARAMS),
        ("dvc.lock", "{}\n"),
        (".gitignore", "/.cache\n/data/external\n"),
        (".dvc/.gitignore", "/config.local\n"),
    ):
        (root / name).write_text(text)
    monkeypatch.chdir(root)
    monkeypatch.setattr(evidence, "all_parts", lambda: {"toy": PART})
    git("init", "-q")
    commit()
    return root


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


def commit() -> None:
    git("add", "-A")
    git("commit", "-qm", "a")


def checked() -> int:
    return evidence.check(evidence.all_parts(), Path.cwd())


def test_a_part_is_made_once_for_its_code_in_a_clone_with_its_params(root: Path, capsys: Any) -> None:
    main([])
    made = root / "reports" / "toy.txt"
    assert yaml.safe_load(made.read_text().partition("row ")[0])["run"] == ["other"]
    assert (root / "params.yaml").read_text() == PARAMS and not (root / "rows.txt").exists()
    noted = read_json(root / RECORD)["toy"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert noted["commit"] == head and noted["seconds"] > 0 and noted["code"].keys() == {"work/make.py"}
    made.write_text("kept")
    main([])
    assert made.read_text() == "kept" and "toy: current" in capsys.readouterr().out and checked() == 0


def test_a_comment_changes_nothing_and_other_code_fails_the_check(root: Path, capsys: Any) -> None:
    main([])
    (root / "work" / "make.py").write_text(SCRIPT + "# a comment\n")
    assert checked() == 0
    (root / "work" / "make.py").write_text(SCRIPT + "print(1)\n")
    assert checked() == 1 and "toy: made by other code or settings (work/make.py)" in capsys.readouterr().err
    commit()
    main([])
    assert checked() == 0


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ("  one: {bits: 8}", "  one: {bits: 4}", "methods.one"),
        ("  other: {seed: 0}", "  other: {seed: 1}", "studies.other"),
        ("  one: {bits: 8}", "  none: {bits: 8}", "methods.one"),
        ("  own: {seed: 0}", "  own: {seed: 1}", None),
        ("  one: {bits: 8}", "  one: {bits: 8}\n  new: {bits: 4}", None),
    ],
)
def test_other_settings_fail_the_check_and_new_ones_do_not(
    root: Path, capsys: Any, then: str, now: str, said: str | None
) -> None:
    main([])
    (root / "params.yaml").write_text(PARAMS.replace(then, now))
    assert checked() == (said is not None)
    assert said is None or f"settings ({said})" in capsys.readouterr().err


def test_other_commands_fail_the_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main([])
    other = replace(PART, commands=("python work/make.py --faster",))
    monkeypatch.setattr(evidence, "all_parts", lambda: {"toy": other})
    assert checked() == 1


def test_a_part_that_was_stopped_goes_on_at_the_same_commit_and_begins_anew_at_another(root: Path) -> None:
    clone = root / ".cache" / "evidence" / "default"
    stop: Callable[[], Path] = lambda: clone / "stop"  # noqa: E731
    main([])
    stop().touch()
    (root / RECORD).unlink()
    with pytest.raises(UserError, match=r"toy: `python work/make.py` ended with status 1"):
        main([])
    assert not (root / RECORD).exists()
    stop().unlink()
    main([])
    assert (root / "reports" / "toy.txt").read_text().count("row") == 3
    (root / "work" / "make.py").write_text(SCRIPT + "print(1)\n")
    commit()
    stop().touch()
    with pytest.raises(UserError):
        main([])
    assert not (clone / "reports" / "toy.txt").exists()  # what other code wrote is gone


def test_what_no_commit_has_makes_no_evidence(root: Path) -> None:
    (root / "work" / "make.py").write_text(SCRIPT + "print(1)\n")
    with pytest.raises(UserError, match=r"work/make.py: has changes that are not committed"):
        main([])
    with pytest.raises(UserError, match="part: 'toys' is unknown"):
        main(["toys"])


def test_a_file_that_is_missing_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, line in (
        (Part("toy", (), (), (), needs=("photos.tar",)), "toy: photos.tar: no such file in data/external"),
        (Part("toy", ("true",), ("reports/none.*",), ()), "toy: its commands wrote no reports/none"),
    ):
        monkeypatch.setattr(evidence, "all_parts", lambda part=part: {"toy": part})
        with pytest.raises(UserError, match=line):
            main([])


def test_every_part_names_scripts_that_are_there_and_files_that_git_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for part in all_parts().values():
        assert all(Path(script).is_file() for script in part.scripts)
        assert not set(part.params) - set(yaml.safe_load(Path("params.yaml").read_text()))
        for pattern in part.writes:
            inside = subprocess.run(["git", "check-ignore", "-q", pattern.replace("*", "x")], check=False)
            assert inside.returncode == 1, f"git ignores {pattern}"
