from collections.abc import Iterator
from pathlib import Path

import pytest

from quantstudy.machine import hardware
from quantstudy.machine.hardware import arithmetic_is_native, cpu_flags, cpu_model, instruction_sets


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "CPUINFO", path)
    cpu_flags.cache_clear()
    yield path
    cpu_flags.cache_clear()


def test_flags_of_the_first_processor(cpuinfo: Path) -> None:
    block = "processor\t: {}\nmodel name\t: A CPU: fast\nflags\t\t: fpu AVX2 avx512f avx_vnni{}\n\n"
    cpuinfo.write_text(block.format(0, " avx512_bf16") + block.format(1, ""))
    assert cpu_flags() == {"fpu", "avx2", "avx512f", "avx_vnni", "avx512_bf16"}
    assert cpu_model() == "A CPU: fast"
    assert [name for name, here in instruction_sets().items() if here] == ["AVX2", "AVX512F", "VNNI", "AVX512_BF16"]
    assert arithmetic_is_native("bfloat16", "cpu") and not arithmetic_is_native("float16", "cpu")


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [("avx2", 0, 0), ("avx512_fp16", 0, 1), ("amx_bf16 amx_int8", 1, 0), ("amx_fp16", 0, 1), ("asimdhp bf16", 1, 1)],
)
def test_native_types(cpuinfo: Path, flags: str, bfloat16: int, float16: int) -> None:
    cpuinfo.write_text(f"Features : {flags}\n")
    assert arithmetic_is_native("bfloat16", "cpu") == bool(bfloat16)
    assert arithmetic_is_native("float16", "cpu") == bool(float16)
    assert arithmetic_is_native("float32", "cpu")


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="choose one of float32, bfloat16, float16"):
        arithmetic_is_native("int3", "cpu")
