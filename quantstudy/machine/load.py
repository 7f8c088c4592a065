"""How busy the machine is with other work: a latency that was taken beside it is not the model's."""

import time

import psutil

PROBE_SECONDS = 0.25
RESOLUTION = 0.03
"""CPU seconds by which the system's own counts are off: they come in hundredths, one for each processor."""
TOLERANCE = 0.1
"""Processors, for each thread of ours, that others may take."""


class Others:
    """Counts from its making on how many processors all other processes keep busy, or the host of this one takes."""

    def __init__(self) -> None:
        self._start, self._seconds = time.perf_counter(), _seconds_of_others()

    def processors(self) -> float:
        """Return how many were busy on average."""
        seconds = max(_seconds_of_others() - self._seconds - RESOLUTION, 0.0)
        return seconds / max(time.perf_counter() - self._start, 1e-9)


def others_now() -> float:
    """Return how many processors others keep busy while this process does nothing."""
    others = Others()
    time.sleep(PROBE_SECONDS)
    return others.processors()


def leaves_room(others: float, threads: int) -> bool:
    """Return whether the processors that `others` leave are enough for `threads` of ours."""
    processors = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return others <= max(processors - threads, 0) + TOLERANCE * threads


def _seconds_of_others() -> float:
    counts = psutil.cpu_times()._asdict()
    idle = sum(counts.get(kind, 0.0) for kind in ("idle", "iowait", "guest", "guest_nice"))  # user has the guests'
    return sum(counts.values()) - idle - time.process_time()
