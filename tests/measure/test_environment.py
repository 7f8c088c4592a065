import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quantstudy.measure import environment, probes
from quantstudy.runtimes.kernels import int8_kernels_available


@pytest.fixture
def facts() -> dict[str, Any]:
    """A machine that has everything."""
    return {
        "gpu": {"available": True},
        "cpu": {"architecture": "arm64", "int8_sums_saturate": False},
        "software": {"git": "2.39"},
        "compiler": {"works": True},
        "native_arithmetic": {"cpu": {"float16": True, "bfloat16": True}},
        "kernels": {name: {"available": True, "reason": ""} for name in probes.PROBES},
    }


def test_each_missing_thing_says_what_it_disables(facts: dict[str, Any]) -> None:
    assert environment.missing(facts) == []
    facts["software"]["git"] = None
    facts["compiler"]["works"] = False
    facts["kernels"]["int8_conv_onednn"]["available"] = False
    rows = environment.missing(facts)
    assert [row["what"] for row in rows] == ["a working C++ compiler", "int8 convolutions of oneDNN", "git"]
    assert all(row["disables"] and row["how_to_get"] for row in rows)
    assert "eager" in " ".join(environment.remarks(facts))
    facts["gpu"]["available"] = False
    facts["native_arithmetic"]["cpu"]["float16"] = False
    assert any("float16 is emulated" in sentence for sentence in environment.remarks(facts))
    assert "VNNI" not in " ".join(environment.remarks(facts))
    facts["cpu"]["int8_sums_saturate"] = True
    assert any("saturation_free" in sentence for sentence in environment.remarks(facts))


def test_a_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts = {"command": "no-such-compiler", "version": None, "works": False, "reason": "not found"}
    assert environment.compiler() == facts
    monkeypatch.setenv("PATH", "")
    versions = environment.software()
    assert versions["git"] is None and versions["torch"] and versions["python"]


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_a_compiler_that_cannot_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit\n'
        'echo "p.cpp:1:10: fatal error: Python.h: No such file or directory" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    found = environment.compiler()
    assert (found["version"], found["works"]) == ("fake 1.0", False)
    assert found["reason"] == "Python.h: No such file or directory"


def test_probes_agree_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probes.probe_kernels()
    assert json.loads(json.dumps(found)) == found
    assert found["int8_conv_onednn"]["available"] == int8_kernels_available()
    assert found["int4_tile_packed_to_4d_cuda"]["available"] <= torch.cuda.is_available()
    assert all(row["reason"] for row in found.values())
    monkeypatch.setitem(probes.PROBES, "wrong", lambda: probes.wrong(torch.ones(2), torch.full((2,), 2.0), 0.1))
    monkeypatch.setitem(probes.PROBES, "broken", lambda: torch.ops.aten._int_mm(torch.ones(1), torch.ones(1)))
    found = probes.probe_kernels()
    assert found["wrong"] == {"available": False, "reason": "ran, but its result is wrong by 50.0 %"}
    assert not found["broken"]["available"] and "\n" not in found["broken"]["reason"]
