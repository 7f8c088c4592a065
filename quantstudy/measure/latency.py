"""Latency: executables timed alternately in one process.

Machines drift (clocks, neighbours), so the fp32 model and the variant take turns, call by call, and each is
reported as the median of its own calls. On CUDA the clock is a pair of events around the call.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MINIMUM_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: the median, the quartiles, and how many calls they are of."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    calls: int


@torch.no_grad()
def time_alternately(
    calls: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, seconds: float
) -> dict[str, Timing]:
    """Time each of `calls` on `images`, taking turns for about `seconds` in all, at least 5 rounds."""
    for call in calls.values():
        for _ in range(2):
            call(images)
    elapsed: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(elapsed.values()))) < MINIMUM_ROUNDS:
        for name, call in calls.items():
            elapsed[name].append(_milliseconds(call, images))
    return {name: _summarize(values) for name, values in elapsed.items()}


def _milliseconds(call: Callable[[Tensor], Tensor], images: Tensor) -> float:
    if images.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    call(images)
    return 1000 * (time.perf_counter() - started)


def _summarize(values: list[float]) -> Timing:
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(middle, lower, upper, len(values))
