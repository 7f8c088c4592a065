"""A small form of the harness of killed runs; its module says how to run all of it."""

import pytest

from tests.harness.runs import STAGES, harness

pytestmark = pytest.mark.slow


def test_a_run_that_was_killed_or_ran_out_of_room_is_made_up_for() -> None:
    counts = harness(2, 1, STAGES[:3])
    disks = counts.get("disks", 0)  # filling one takes root
    assert counts["kills"] == 2 and counts["as undisturbed"] == 2 + disks == 2 + counts.get("disks that were full", 0)
