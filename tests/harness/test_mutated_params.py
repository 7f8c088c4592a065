"""A small form of the mutated params files."""

from pathlib import Path

import pytest

from quantstudy.errors import UserError
from tests.harness import params


@pytest.mark.slow
def test_a_mutated_file_is_read_as_dvc_reads_it_or_refused_in_short_lines() -> None:
    counts = params.run(50, seed=1)
    assert not counts["failures"]
    assert counts["accepted"] >= 2 and counts["refused"] >= 20


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(UserError("x" * 201), "long lines"), (UserError(), "long lines"), (KeyError("x"), "KeyError: 'x'")],
)
def test_what_should_not_be_is_told(error: Exception, outcome: str, tmp_path: Path) -> None:
    def load(path: Path) -> None:
        raise error

    assert params.judged(tmp_path, load) == outcome
