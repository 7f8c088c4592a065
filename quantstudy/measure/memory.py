"""Peak memory of loading a model and running one batch.

On CUDA this is the allocator's peak. On a CPU it is the growth of the peak resident memory. Linux lets a process reset
that peak (`man proc_pid_clear_refs`), so the libraries imported before are not counted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
PROCESS = Path("/proc/self")


def with_peak_memory_mb(work: Callable[[], T], device: torch.device) -> tuple[T, float | None]:
    """Return the result of `work` and its peak megabytes (1e6 bytes), or None if the system does not tell them.

    Memory that was freed before the call and is used again is not counted, so call it early in a fresh process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        (PROCESS / "clear_refs").write_text("5")
        before = _kilobytes("VmRSS")
    except (OSError, KeyError):
        return work(), None
    result = work()
    return result, 1024 * (_kilobytes("VmHWM") - before) / 1e6


def _kilobytes(field: str) -> int:
    lines = (line.partition(":") for line in (PROCESS / "status").read_text(encoding="ascii").splitlines())
    return int({name: value for name, _, value in lines}[field].split()[0])
