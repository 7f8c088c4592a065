"""Parts of the evidence are made once for their code, go on where they were stopped, and say what made them."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantstudy.errors import UserError
from quantstudy.files import read_json, write_json
from tests.conftest import ROOT
from tools import evidence
from tools.evidence import RECORD, main
from tools.evidence_parts import Part, all_parts

SCRIPT = """
from pathlib import Path
if Path("early").is_file():
    raise SystemExit("stopped before it wrote")
made = Path("reports/toy.txt")
made.parent.mkdir(exist_ok=True)
made.write_text((made.read_text() if made.is_file() else Path("params.yaml").read_text()) + "row ")
if Path("stop").is_file():
    raise SystemExit("stopped")
"""
PARAMS = """
run: [own]
ptq: [one]
target: any_x86
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
    assert (root / "params.yaml").read_text() == PARAMS
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
        ("target: any_x86", "target: vnni", "target"),
        ("  own: {seed: 0}", "  own: {seed: 1}", None),
        ("ptq: [one]", "ptq: []", None),
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


def test_the_default_run_is_also_of_its_lists(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(evidence, "all_parts", lambda: {"default": replace(PART, name="default", params={})})
    main([])
    (root / "params.yaml").write_text(PARAMS.replace("ptq: [one]", "ptq: []").replace("own: {seed: 0}", "own: {}"))
    assert checked() == 1 and "settings (ptq, studies.own)" in capsys.readouterr().err


def test_every_section_of_params_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = yaml.safe_load(Path("params.yaml").read_text())
    for part in all_parts().values():
        settings = (key for key in evidence.settings_of(part, ROOT) if not key.startswith("data/external/"))
        known = {key.partition(".")[0] for key in settings}
        rest = set(params) - {"studies", *evidence.LISTS}
        assert known - {"its commands", "studies"} == rest | (set(evidence.LISTS) if part.name == "default" else set())


@pytest.mark.parametrize("key", ["settings", "code"])
def test_a_part_whose_record_lacks_a_key_is_stale(root: Path, capsys: Any, key: str) -> None:
    main([])
    record = read_json(root / RECORD)
    del record["toy"][key]
    write_json(root / RECORD, record)
    assert checked() == 1 and "toy: made by other code or settings" in capsys.readouterr().err


def test_other_commands_fail_the_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main([])
    other = replace(PART, commands=("python work/make.py --faster",))
    monkeypatch.setattr(evidence, "all_parts", lambda: {"toy": other})
    assert checked() == 1


def stopped(root: Path) -> None:
    """Run the part until it has written; then it ends with an error."""
    clone = root / ".cache" / "evidence" / "default"
    (clone / "stop").touch()
    with pytest.raises(UserError, match=r"toy: `python work/make.py` ended with status 1"):
        main([])
    (clone / "stop").unlink()
    assert not (root / RECORD).exists() or "toy" not in read_json(root / RECORD)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (None, 3),
        (("notes.txt", "other"), 3),
        (("work/make.py", SCRIPT + "# a comment\n"), 3),
        (("reports/toy.txt", "row of another machine"), 3),
        (("work/make.py", SCRIPT + "print(1)\n"), 1),
        (("params.yaml", PARAMS.replace("any_x86", "vnni")), 1),
    ],
    ids=["same-commit", "other-file", "comment", "committed-result", "code", "params"],
)
def test_a_part_that_was_stopped_goes_on_unless_its_code_or_settings_changed(
    root: Path, change: tuple[str, str] | None, rows: int
) -> None:
    main([])
    commit()
    (root / RECORD).unlink()
    stopped(root)
    stopped(root)
    if change:
        (root / change[0]).write_text(change[1])
        commit()
    main([])
    made = (root / "reports" / "toy.txt").read_text()
    assert made.count("row ") == rows and "another" not in made
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert read_json(root / RECORD)["toy"]["commit"] == head


def test_what_another_commit_has_does_not_continue_a_part(root: Path) -> None:
    main([])
    commit()
    (root / RECORD).unlink()
    (early := root / ".cache" / "evidence" / "default" / "early").touch()
    with pytest.raises(UserError):
        main([])
    early.unlink()
    (root / "notes.txt").write_text("other")
    commit()
    main([])
    assert (root / "reports" / "toy.txt").read_text().count("row ") == 1


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


def test_every_part_names_the_script_of_each_stage_and_module_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    outs = {out if isinstance(out, str) else next(iter(out)): name for name in stages for out in stages[name]["outs"]}

    def scripts(name: str) -> set[str]:
        above = [scripts(outs[dep]) for dep in stages[name].get("deps", []) if outs.get(dep, name) != name]
        return {f"stages/{stages[name]['cmd'].split()[3]}.py"}.union(*above)

    for part in all_parts().values():
        text = " ".join(part.commands)
        named = re.findall(r"-m (benchmarks\.\w+)", text)
        run = {f"{module.replace('.', '/')}.py" for module in named}
        run |= set().union(*(scripts(name) for name in re.findall(r"(\w+)@", text)))
        assert run <= set(part.scripts), part.name


def test_every_part_names_scripts_that_are_there_and_files_that_git_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for part in all_parts().values():
        assert all(Path(script).is_file() for script in part.scripts)
        assert not set(part.params) - set(yaml.safe_load(Path("params.yaml").read_text()))
        for pattern in part.writes:
            inside = subprocess.run(["git", "check-ignore", "-q", pattern.replace("*", "x")], check=False)
            assert inside.returncode == 1, f"git ignores {pattern}"


def test_what_a_part_no_longer_writes_is_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = replace(PART, writes=("reports/*.txt",))
    monkeypatch.setattr(evidence, "all_parts", lambda: {"toy": several})
    for name in ("old.txt", "own.json"):
        (root / "reports").mkdir(exist_ok=True)
        (root / "reports" / name).write_text("of an earlier run")
    git("add", "-A")
    git("commit", "-qm", "b")
    main([])
    assert sorted(path.name for path in (root / "reports").iterdir()) == ["evidence.json", "own.json", "toy.txt"]


def test_other_files_fail_the_check_where_they_are_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needy = replace(PART, needs=("photos.tar",))
    monkeypatch.setattr(evidence, "all_parts", lambda: {"toy": needy})
    photos = root / "data" / "external" / "photos.tar"
    photos.parent.mkdir(parents=True)
    photos.write_text("photos")
    main([])
    assert checked() == 0
    photos.write_text("others")
    assert checked() == 1
    photos.unlink()
    assert checked() == 0
