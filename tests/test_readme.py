"""README keeps what it says: its tables are those of the committed reports, its links exist."""

import re
import subprocess

import pytest
import yaml

from quantstudy.__main__ import PLACE, with_tables
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the committed ones: a run of one's own writes other timings."""
    monkeypatch.chdir(ROOT)
    changed = subprocess.run(["git", "status", "--porcelain", "reports"], capture_output=True, text=True, check=True)
    if changed.stdout:
        pytest.skip("the reports have changed since the last commit")
    assert len(PLACE.findall(README)) >= 1
    assert with_tables(README) == README


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_row_is_valid() -> None:
    from quantstudy.params import Study

    block = re.search(r"```yaml\nstudies:\n(.*?)```", README, re.DOTALL)
    assert block
    text = "studies:\n" + block[1].replace("<its SHA-256>", "ab" * 32)
    Study.model_validate(yaml.safe_load(text)["studies"]["my_flowers"])
