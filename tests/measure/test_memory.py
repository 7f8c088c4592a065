"""Peak memory: what was used at once, not what is left."""

import subprocess
import sys

import pytest
import torch

from quantstudy.measure import memory

CPU = torch.device("cpu")


IN_A_FRESH_PROCESS = """
import numpy as np
import torch
from quantstudy.measure import memory

assert np.ones(400_000_000, np.uint8).sum()  # an earlier, higher peak
kept = np.ones(20_000_000, np.uint8)

def work():
    return int(np.ones(100_000_000, np.uint8).sum()) + len(kept)

print(*memory.with_peak_memory_mb(work, torch.device("cpu")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_the_peak_is_counted_and_not_what_was_there() -> None:
    """In a process of its own: one that has freed memory uses that again, which does not count."""
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], capture_output=True, text=True, check=True)
    result, peak = done.stdout.split()
    assert result == "120000000" and 95 < float(peak) < 115


def test_a_system_that_does_not_tell_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "proc")
    assert memory.with_peak_memory_mb(lambda: "done", CPU) == ("done", None)
