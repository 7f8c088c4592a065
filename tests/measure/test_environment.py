from typing import Any

import pytest

from quantstudy.machine import hardware
from quantstudy.measure import environment


@pytest.fixture
def facts() -> dict[str, Any]:
    """A machine that has everything."""
    return {
        "gpu": {"available": True},
        "cpu": {"architecture": "arm64", "int8_sums_saturate": False},
        "software": {"git": "2.39"},
        "native_arithmetic": {"cpu": {"float16": True, "bfloat16": True}},
        "int8_kernels": True,
    }


def test_each_missing_thing_says_what_it_disables(facts: dict[str, Any]) -> None:
    assert environment.missing(facts) == []
    facts["software"]["git"] = None
    facts["int8_kernels"] = False
    rows = environment.missing(facts)
    assert [row["what"] for row in rows] == ["int8 convolutions of oneDNN", "git"]
    assert all(row["disables"] and row["how_to_get"] for row in rows)
    sentences = hardware.remarks(False, {"float16": False}, False)
    assert any("float16 is emulated" in sentence for sentence in sentences)
    assert "VNNI" not in " ".join(sentences)
    assert any("saturation_free" in sentence for sentence in hardware.remarks(False, {}, True))


def test_a_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    versions = environment.software()
    assert versions["git"] is None and versions["torch"] and versions["python"]
