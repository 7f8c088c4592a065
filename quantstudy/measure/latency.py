"""Latency: executables timed alternately in one process.

Machines drift (clocks, neighbours), so the fp32 model and the variant take turns, and each is reported as the median
of its own calls. A turn starts with a call that is not timed: the threads of another runtime may still be waiting for
work on the same cores, and its weights fill the caches. On CUDA the clock is a pair of events around the call.

A timing is busy if other processes took processors that it needed, or if its quartiles lie too far apart. A busy timing
is repeated a few times. If it stays busy, it is marked and gives no speed-up.

The fastest runtime of a variant is reported. Only real kernels get a speed-up.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantstudy.machine import load
from quantstudy.runtimes.executables import Executable

MINIMUM_ROUNDS = 3
CALLS_A_TURN = 3
ATTEMPTS = 3
WIDEST_SPREAD = 0.5
"""The largest distance of the quartiles, as a share of the median, of a timing that can be trusted."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per batch: the median, the quartiles, and the number of timed calls."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    calls: int
    busy: bool = False
    """Whether the timing cannot be trusted."""

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median."""
        return (self.upper_quartile_ms - self.lower_quartile_ms) / self.median_ms


@dataclass(frozen=True)
class Load:
    """How many processors other processes kept busy before and during a timing; `busy` if they left too few."""

    before: float
    during: float
    busy: bool


Timings = Mapping[int, Mapping[str, Timing]]
"""By batch size, and then by `<variant> <runtime>`."""


@torch.no_grad()
def time_alternately(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, on_cuda: bool = False
) -> dict[str, Timing]:
    """Warm up each of `calls` twice, then time it in turns of 3, for about `seconds` in all and at least 3 rounds."""
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


def time_calmly(
    calls: Mapping[str, Callable[[], object]], seconds: float, *, on_cuda: bool = False
) -> tuple[dict[str, Timing], Load]:
    """Return the timings of `time_alternately`, and the load, of the first attempt not busy or else of the calmest."""
    taken: list[tuple[dict[str, Timing], Load]] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(seconds)
        before, others = load.others_now(), load.Others()
        timings = time_alternately(calls, seconds, on_cuda=on_cuda)
        during = others.processors()
        full = not load.leaves_room(max(before, during), torch.get_num_threads())
        marked = {name: replace(timing, busy=full or timing.spread > WIDEST_SPREAD) for name, timing in timings.items()}
        taken.append((marked, Load(before, during, full)))
        if not any(timing.busy for timing in marked.values()):
            break
    return min(taken, key=lambda one: (sum(timing.busy for timing in one[0].values()), one[1].during))


def fastest(variant: str, executables: Sequence[Executable], timings: Timings) -> Executable:
    """Return the executable with the smallest sum of medians; only real kernels count, if there are any."""
    real = [executable for executable in executables if executable.real] or executables
    return min(real, key=lambda e: sum(timing[f"{variant} {e.runtime}"].median_ms for timing in timings.values()))


def latencies(variant: str, chosen: Executable, timings: Timings) -> dict[str, float | None]:
    """Return the median of each batch size on the chosen runtime, and how many times faster that is than fp32's best.

    A speed-up is None if a kernel is simulated, if fp32 was not timed, or if either timing is busy.
    """
    found: dict[str, float | None] = {}
    busy = busy_sizes(variant, chosen, timings)
    for size, timing in timings.items():
        own, fp32 = timing[f"{variant} {chosen.runtime}"].median_ms, _fp32(timing)
        speedup = 1.0 if variant == "fp32" else fp32.median_ms / own if chosen.real and fp32 else None
        found |= {f"latency_ms_b{size}": own, f"speedup_b{size}": None if size in busy else speedup}
    return found


def busy_sizes(variant: str, chosen: Executable, timings: Timings) -> list[int]:
    """Return the batch sizes at which the variant, or the fp32 that it is compared with, could not be timed well."""
    used = {size: (timing[f"{variant} {chosen.runtime}"], _fp32(timing)) for size, timing in timings.items()}
    return [size for size, pair in used.items() if any(timing and timing.busy for timing in pair)]


def _fp32(timing: Mapping[str, Timing]) -> Timing | None:
    """Return fp32's fastest timing."""
    found = [timed for name, timed in timing.items() if name.startswith("fp32 ")]
    return min(found, key=lambda timed: timed.median_ms, default=None)


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
