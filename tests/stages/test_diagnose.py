import json
from pathlib import Path

import pytest

from quantstudy import layout
from stages import diagnose


def test_writes_the_same_facts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    diagnose.main([])
    first = layout.ENVIRONMENT.read_bytes()
    diagnose.main([])
    assert layout.ENVIRONMENT.read_bytes() == first
    facts = json.loads(first)
    assert facts["software"]["torch"] and facts["cpu"]["torch_threads"] >= 1
    assert all(set(row) == {"what", "disables", "how_to_get"} for row in facts["missing"])
    printed = capsys.readouterr().out
    assert facts["cpu"]["model"] in printed and "int8_kernels" in printed and "missing" in printed
