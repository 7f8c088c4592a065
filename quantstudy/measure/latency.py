"""Latency: executables timed alternately in one process.

Machines drift (clocks, neighbours), so the fp32 model and the variant take turns, and each is reported as the median
of its own calls. A turn starts with a call that is not timed: the threads of another runtime may still be waiting for
work on the same cores, and its weights fill the caches. On CUDA the clock is a pair of events around the call.

The fastest runtime of a variant is the one that is reported, and a speed-up only of kernels that are real.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantstudy.runtimes.executables import Executable

MINIMUM_ROUNDS = 3
CALLS_A_TURN = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: the median, the quartiles, and how many calls they are of."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    calls: int


Timings = Mapping[int, Mapping[str, Timing]]
"""By batch size, and then by `<variant> <runtime>`."""


@torch.no_grad()
def time_alternately(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, on_cuda: bool = False
) -> dict[str, Timing]:
    """Time each of `calls`, after two to warm up, taking turns of 3 for about `seconds` in all, or 3 rounds."""
    for call in calls.values():
        for _ in range(2):
            call()
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    stop, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or rounds < MINIMUM_ROUNDS:
        rounds += 1
        for name, call in calls.items():
            call()
            elapsed[name] += [_milliseconds(call, on_cuda) for _ in range(CALLS_A_TURN)]
    return {name: _summarize(values) for name, values in elapsed.items()}


def fastest(variant: str, executables: Sequence[Executable], timings: Timings) -> Executable:
    """Return the executable with the smallest sum of medians, of those whose kernels are real where there are any."""
    real = [executable for executable in executables if executable.real] or executables
    return min(real, key=lambda e: sum(timing[f"{variant} {e.runtime}"].median_ms for timing in timings.values()))


def latencies(variant: str, chosen: Executable, timings: Timings) -> dict[str, float | None]:
    """Return the median of each batch size on the chosen runtime, and how many times faster that is than fp32's best.

    A speed-up is None where a kernel is simulated, or fp32 was not timed.
    """
    found: dict[str, float | None] = {}
    for size, timing in timings.items():
        own = timing[f"{variant} {chosen.runtime}"].median_ms
        fp32 = [timed.median_ms for name, timed in timing.items() if name.startswith("fp32 ")]
        speedup = min(fp32) / own if chosen.real and fp32 else None
        found |= {f"latency_ms_b{size}": own, f"speedup_b{size}": 1.0 if variant == "fp32" else speedup}
    return found


def _milliseconds(call: Callable[[], object], on_cuda: bool) -> float:
    if on_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _summarize(values: list[float]) -> Timing:
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(middle, lower, upper, len(values))
