"""Latency: executables timed alternately in one process.

Machines drift (clocks, neighbours), so the fp32 model and the variant take turns, and each is reported as the median
of its own calls. A turn starts with a call that is not timed: the threads of another runtime may still be waiting for
work on the same cores, and its weights fill the caches. On CUDA the clock is a pair of events around the call.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MINIMUM_ROUNDS = 3
CALLS_A_TURN = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: the median, the quartiles, and how many calls they are of."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    calls: int


@torch.no_grad()
def time_alternately(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    on_cuda: bool = False,
    minimum_rounds: int = MINIMUM_ROUNDS,
) -> dict[str, Timing]:
    """Time each of `calls`, after two to warm up, taking turns of 3 for about `seconds` in all or `minimum_rounds`."""
    for call in calls.values():
        for _ in range(2):
            call()
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    stop, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or rounds < minimum_rounds:
        rounds += 1
        for name, call in calls.items():
            call()
            elapsed[name] += [_milliseconds(call, on_cuda) for _ in range(CALLS_A_TURN)]
    return {name: _summarize(values) for name, values in elapsed.items()}


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
