"""The machine as facts: what a result was measured on, what is missing here and what that disables.

The facts hold nothing that changes between two runs on one machine, so that a second run changes no file.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from quantstudy.machine import hardware
from quantstudy.machine.hardware import arithmetic_is_native, cpu_flags, cpu_model, instruction_sets

PACKAGES = ("torch", "torchvision", "torchao", "thop", "dvc")
TOOLS = {"git": "--version"}

_HEADERS = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"


def environment() -> dict[str, Any]:
    """Return every fact as plain JSON values; see `missing` and `null_metrics` for the two lists in it."""
    from quantstudy.measure.probes import probe_kernels

    facts: dict[str, Any] = {
        "gpu": gpu(),
        "cpu": cpu(),
        "software": software(),
        "compiler": compiler(),
        "native_arithmetic": {
            device: {dtype: arithmetic_is_native(dtype, device) for dtype in ("float16", "bfloat16")}
            for device in ("cpu", "cuda")
        },
        "kernels": probe_kernels(),
    }
    if not facts["gpu"]["available"]:
        del facts["native_arithmetic"]["cuda"]
    return facts | {"missing": missing(facts), "null_metrics": null_metrics(facts), "remarks": remarks(facts)}


def gpu() -> dict[str, Any]:
    """Return the first CUDA GPU's name, memory and software, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no CUDA GPU was found" if built else "this build of torch is for CPUs only"
        return {"available": False, "reason": f"{reason} (nvidia-smi {'found' if _driver() else 'not found'})"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "available": True,
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }


def cpu() -> dict[str, Any]:
    """Return the CPU's model, cores, instruction sets and memory (GB), and the threads PyTorch uses."""
    import psutil
    import torch

    return {
        "model": cpu_model(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "instruction_sets": instruction_sets(),
        "int8_sums_saturate": hardware.int8_sums_saturate(),
    }


def software() -> dict[str, str | None]:
    """Return versions: the system, Python, the packages and the command-line tools; None for what is missing."""
    versions: dict[str, str | None] = {"os": _system(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {tool: first_line(tool, flag) for tool, flag in TOOLS.items()}


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def compiler() -> dict[str, Any]:
    """Return the C++ compiler that `torch.compile` would call, and whether it compiles what inductor writes.

    A compiler alone is not enough: Python's headers and OpenMP have to be there, so a file that includes both is
    compiled.
    """
    command = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    version = first_line(command, "--version")
    if version is None:
        return {"command": command, "found": False, "version": None, "works": False, "reason": "not found"}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_HEADERS, encoding="utf-8")
        flags = ["-fopenmp", "-I", sysconfig.get_path("include"), "-c", str(source), "-o", os.devnull]
        done = subprocess.run([command, *flags], capture_output=True, text=True, errors="replace", check=False)
    errors = [line.partition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line]
    works = done.returncode == 0
    reason = "compiles Python's headers with OpenMP" if works else (errors or ["failed"])[0]
    return {"command": command, "found": True, "version": version, "works": works, "reason": reason}


def first_line(command: str, flag: str) -> str | None:
    """Return the first line that `command flag` prints; None when it is not there or fails."""
    if shutil.which(command) is None:
        return None
    try:
        done = subprocess.run([command, flag], capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row `what`, `disables`, `how_to_get` for everything useful that `facts` say is not here."""
    rows = []

    def lacks(present: object, what: str, disables: str, how_to_get: str) -> None:
        if not present:
            rows.append({"what": what, "disables": disables, "how_to_get": how_to_get})

    tools, has_gpu = facts["software"], facts["gpu"]["available"]
    x86 = facts["cpu"]["architecture"].lower() in ("x86_64", "amd64")
    kernels = facts["kernels"]
    lacks(
        has_gpu,
        "a CUDA GPU",
        "GPU latencies and memory, fast training",
        "run on a machine with an NVIDIA GPU, its driver and a CUDA build of torch",
    )
    lacks(
        facts["compiler"]["works"],
        "a working C++ compiler",
        "torch.compile: the inductor runtime and its fused int8 kernels; everything is timed in eager mode",
        "install g++ (or set CXX) and Python's headers, e.g. the packages g++ and python3-dev",
    )
    lacks(
        kernels["int8_conv_onednn"]["available"],
        "int8 convolutions of oneDNN",
        "real int8 kernels on the CPU; int8 variants are simulated and get no speed-up",
        "run on an x86 CPU, with a torch that has oneDNN; leave DNNL_MAX_CPU_ISA unset",
    )
    lacks(
        not x86 or not cpu_flags().isdisjoint(("amx_int8", "amx_bf16")),
        "AMX instructions",
        "the fastest int8 and bfloat16 kernels of a CPU",
        "run on a Xeon from Sapphire Rapids on; a virtual machine may hide them",
    )
    lacks(tools["git"], "git", "experiments and comparisons between them", "install the package git")
    lacks(tools["dvc"], "dvc", "running the pipeline", "pip install dvc")
    lacks(tools["torchao"], "torchao", "compiled int8 kernels on the runtime inductor", "pip install torchao")
    return rows


def null_metrics(facts: dict[str, Any]) -> dict[str, str]:
    """Return why a metric can be null on this machine, by its key in the metrics files."""
    simulated = "null for a variant whose low-bit kernel is simulated here: its time says nothing about the method"
    emulated = [dtype for dtype, native in facts["native_arithmetic"]["cpu"].items() if not native]
    if emulated and not facts["gpu"]["available"]:
        simulated += f"; so for {' and '.join(emulated)}, which this CPU emulates"
    return {"speedup_b1": simulated, "speedup_b16": simulated}


def remarks(facts: dict[str, Any]) -> list[str]:
    """Return sentences that a reader of the figures measured here has to know."""
    saturates = facts["cpu"]["int8_sums_saturate"]
    sentences = hardware.remarks(facts["gpu"]["available"], facts["native_arithmetic"]["cpu"], saturates)
    if not facts["compiler"]["works"]:
        sentences.append("No working C++ compiler: latencies are of eager mode.")
    return sentences
