"""Peak memory of loading a model and running one batch.

On CUDA it is the allocator's peak. On a CPU it is the growth of the peak resident memory of a fresh process: a
child forked after the libraries were imported and before a model was loaded.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

PATIENCE_SECONDS = 300


def peak_memory_mb(work: Callable[[], object], device: torch.device) -> float | None:
    """Return the peak megabytes (1e6 bytes) that `work` needs; None where the system cannot tell.

    On a CPU call this early: what the process has already loaded and shares with its child is not counted. The
    child computes on one thread, because OpenMP's threads do not survive a fork.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if not sys.platform.startswith("linux"):
        return None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_measure, args=(work, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(PATIENCE_SECONDS) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def _measure(work: Callable[[], object], sender: Connection) -> None:
    torch.set_num_threads(1)
    before = _peak_bytes()
    work()
    sender.send((_peak_bytes() - before) / 1e6)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
