"""How busy the machine is with other work: a latency measured during that work is not the model's own."""

import time

import psutil

PROBE_SECONDS = 0.25
RESOLUTION = 0.03
"""CPU seconds by which the system's own counts may be off: each processor's count comes in hundredths."""
TOLERANCE = 0.1
"""How many processors others may take for each thread of ours."""


class Others:
    """Counts, from its creation on, how many processors other processes keep busy or the host of this machine takes."""

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
    """Return whether `others` leave enough processors for `threads` of ours."""
    processors = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return others <= max(processors - threads, 0) + TOLERANCE * threads


def _seconds_of_others() -> float:
    counts = psutil.cpu_times()._asdict()
    idle = sum(counts.get(kind, 0.0) for kind in ("idle", "iowait", "guest", "guest_nice"))  # user includes the guests'
    return sum(counts.values()) - idle - time.process_time()
