"""What this machine's processors can do: instruction sets, and which float types they compute in natively.

A 16-bit type that the hardware lacks is emulated: correct, but several times slower than float32. Its accuracy is worth
reporting; its latency is worth reporting only with that remark.
"""

import functools
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    **{name: (name.lower(),) for name in ("AVX2", "AVX512F")},
    "VNNI": ("avx512_vnni", "avx_vnni"),
    **{name: (name.lower(),) for name in ("AVX512_BF16", "AVX512_FP16", "AMX_INT8", "AMX_BF16", "AMX_FP16")},
}
"""Instruction sets that matter to low-bit arithmetic, each with its Linux flags: any one of them means it is there."""

_NATIVE: dict[str, tuple[str, ...]] = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's features as Linux names them (`avx512_vnni`, `amx_int8`, `asimdhp`); elsewhere none."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").lower().split())


def cpu_model() -> str:
    """Return the CPU's name, or its architecture if the system does not tell."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def describe_machine() -> str:
    """Return the processor, the threads, the GPU and the versions that a measurement is made with, as one line."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = f"{cpu_model()} without VNNI" if int8_sums_saturate() else cpu_model()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "torchao"))
    return f"{cpu}, {torch.get_num_threads()} threads, {gpu}; {versions}, Python {platform.python_version()}"


def instruction_sets() -> dict[str, bool]:
    """Return which of `INSTRUCTION_SETS` this CPU has."""
    flags = cpu_flags()
    return {name: not flags.isdisjoint(any_of) for name, any_of in INSTRUCTION_SETS.items()}


def int8_sums_saturate() -> bool:
    """Return whether int8 kernels here add two products of uint8 and int8 in 16 bits: on an x86 CPU without VNNI.

    `vpmaddubsw` then gives 32767 for 255 * 127 + 255 * 127; `quantization.saturation` says which weights are safe. See
    https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html.
    """
    return is_x86() and not instruction_sets()["VNNI"]


def is_x86() -> bool:
    """Return whether this is a 64-bit x86 CPU."""
    return platform.machine() in ("x86_64", "AMD64")


def arithmetic_is_native(dtype: str, device: str) -> bool:
    """Return whether the hardware multiplies in `dtype`; if not, PyTorch emulates it through float32.

    `device` is `cpu` or `cuda`. On `cuda`, float16 is always native, bfloat16 from compute capability 8.0.

    Raises:
        ValueError: `dtype` is not float32, float16 or bfloat16.
    """
    if dtype == "float32":
        return True
    if dtype not in _NATIVE:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of float32, {', '.join(_NATIVE)}")
    if device == "cpu":
        return not cpu_flags().isdisjoint(_NATIVE[dtype])
    if dtype == "float16":
        return True
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def remarks(has_gpu: bool, native_on_cpu: Mapping[str, bool], saturates: bool) -> list[str]:
    """Return the remarks that a reader of figures measured here has to know.

    `native_on_cpu` is `arithmetic_is_native` on the CPU, by dtype; `saturates` is `int8_sums_saturate` here.
    """
    if has_gpu:
        return ["fp32 is float32: without TF32, which PyTorch lets convolutions use, and which is faster."]
    emulated = [dtype for dtype, native in native_on_cpu.items() if not native]
    found = ["No GPU latency or memory was taken: every figure is the CPU's."]
    found += [f"{dtype} is emulated on this CPU: its latency is not the type's." for dtype in emulated]
    if saturates:
        found.append(
            "This CPU has no VNNI: int8 sums saturate unless weights are saturation_free or have fewer than 8 bits; "
            "eager mode simulates what may saturate, OpenVINO and inductor do not."
        )
    return found


def _cpuinfo() -> Mapping[str, str]:
    """Return the first processor's block of /proc/cpuinfo; empty where there is none."""
    try:
        block = CPUINFO.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
