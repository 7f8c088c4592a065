"""The machine as facts: what a result was measured on, what is missing here and what that disables.

Nothing in the facts changes between two runs on one machine, so a second run changes no file.
"""

import importlib.metadata
import platform
import shutil
from typing import Any

from quantstudy.machine import hardware
from quantstudy.machine.hardware import arithmetic_is_native, cpu_model, instruction_sets
from quantstudy.runtimes.kernels import int8_kernels_available

PACKAGES = ("torch", "torchvision", "torchao", "dvc")


def environment() -> dict[str, Any]:
    """Return every fact as plain JSON values; `missing` lists what is not here and what that disables."""
    facts: dict[str, Any] = {"gpu": gpu(), "cpu": cpu(), "software": software()}
    facts["native_arithmetic"] = {
        device: {dtype: arithmetic_is_native(dtype, device) for dtype in ("float16", "bfloat16")}
        for device in (("cpu", "cuda") if facts["gpu"]["available"] else ("cpu",))
    }
    facts["int8_kernels"] = int8_kernels_available()
    saturates = facts["cpu"]["int8_sums_saturate"]
    remarks = hardware.remarks(facts["gpu"]["available"], facts["native_arithmetic"]["cpu"], saturates)
    return facts | {"missing": missing(facts), "remarks": remarks}


def gpu() -> dict[str, Any]:
    """Return the first CUDA GPU's name, memory and software, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no CUDA GPU was found" if built else "this build of torch is for CPUs only"
        return {"available": False, "reason": reason}
    properties = torch.cuda.get_device_properties(0)
    return {
        "available": True,
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
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
    """Return versions of the system, Python and the packages, and the path of git; None where there is none."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        **versions,
        "git": shutil.which("git"),
    }


def missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row `what`, `disables`, `how_to_get` for each useful thing that `facts` show to be missing."""
    rows = (
        (
            facts["gpu"]["available"],
            "a CUDA GPU",
            "GPU latencies and memory, fast training",
            "run on a machine with an NVIDIA GPU, its driver and a CUDA build of torch",
        ),
        (
            facts["int8_kernels"],
            "int8 convolutions of oneDNN",
            "real int8 kernels on the CPU; int8 variants are simulated and get no speed-up",
            "run on an x86 CPU, with a torch that has oneDNN; leave DNNL_MAX_CPU_ISA unset",
        ),
        (facts["software"]["git"], "git", "experiments and comparisons between them", "install the package git"),
    )
    return [dict(zip(("what", "disables", "how_to_get"), row[1:], strict=True)) for row in rows if not row[0]]
