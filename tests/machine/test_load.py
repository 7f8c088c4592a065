import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest

from quantstudy.machine import load

Times = namedtuple("Times", "user system idle iowait steal guest")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The machine's CPU seconds by kind, the process's own and the time; nothing but a test moves them."""
    counts = dict.fromkeys(Times._fields, 0.0) | {"own": 0.0, "now": 0.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(*(counts[kind] for kind in Times._fields)))
    monkeypatch.setattr(load.time, "process_time", lambda: counts["own"])
    monkeypatch.setattr(load.time, "perf_counter", lambda: counts["now"])
    return counts


def test_others_are_all_that_is_busy_and_not_ours(machine: dict[str, float]) -> None:
    others = load.Others()
    machine.update(user=5.0, system=1.0, idle=9.0, iowait=7.0, own=4.0, now=2.0)
    assert others.processors() == pytest.approx(1.0, abs=0.02)
    machine.update(steal=2.0, user=6.0, guest=1.0)  # what the host takes; a guest's seconds are the user's too
    assert others.processors() == pytest.approx(2.5, abs=0.02)
    machine.update(own=9.0)
    assert others.processors() == 0


def test_room_is_left_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    assert load.leaves_room(0.5, 8) and not load.leaves_room(1.0, 8)
    assert load.leaves_room(4.0, 4) and not load.leaves_room(5.0, 4)
    assert load.leaves_room(0.0, 99)


def test_a_process_that_computes_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            others = load.Others()
            time.sleep(0.5)
            assert others.processors() > 0.3
        finally:
            other.kill()
