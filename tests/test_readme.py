"""README keeps what it says: its tables are those of the committed reports, its links exist."""

import re
import subprocess

import pytest
import yaml

from quantstudy.__main__ import PLACE
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def committed(path: str) -> str:
    """Return a file as git has it: a run of one's own writes other timings."""
    shown = subprocess.run(["git", "show", f":{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip(f"git does not tell {path}: {shown.stderr.strip()}")
    return shown.stdout


def test_the_tables_are_those_of_the_committed_reports() -> None:
    found = PLACE.findall(README)
    assert len(found) >= 1
    for start, study, _ in found:
        assert f"{start}{committed(f'reports/{study}/results.md')}<!-- end -->" in README


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_row_is_valid() -> None:
    from quantstudy.params import Study

    block = re.search(r"```yaml\nstudies:\n(.*?)```", README, re.DOTALL)
    assert block
    text = "studies:\n" + block[1].replace("<its SHA-256>", "ab" * 32)
    Study.model_validate(yaml.safe_load(text)["studies"]["my_flowers"])
