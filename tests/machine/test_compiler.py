"""Where the kernels of this project cannot be compiled there are none, and a warning says why."""

import os
from pathlib import Path

import pytest

from quantstudy import normalization
from quantstudy.machine import compiler
from quantstudy.machine.compiler import library
from quantstudy.runtimes import avx2


@pytest.mark.skipif(os.name != "posix", reason="runs a compiler of that system")
@pytest.mark.parametrize("source", [avx2._SOURCE, normalization._SOURCE], ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("command", "reason"), [("false", "false failed"), ("/no/compiler", "No such file"), ("g++ '", "quotation")]
)
def test_without_a_compiler_there_are_none(
    command: str, reason: str, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.warns(UserWarning, match=f"{source.name} is not used, which is slower: .*{reason}"):
        assert library.__wrapped__(source) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
def test_a_cpu_without_avx2_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"fma"}))
    assert library.__wrapped__(avx2._SOURCE) is None
