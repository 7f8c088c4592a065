"""README keeps what it says: its tables are those of the committed reports, its links exist."""

import re

import pytest
import yaml

from quantstudy.__main__ import PLACE, with_tables
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
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
