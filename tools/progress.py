"""Show how far a run of DVC is, '[12 of 118, about 6 minutes left]', from the time each stage took when it last ran.

DVC logs for each stage that it runs it, or that the stage did not change. These messages are counted. It is not known
in advance whether a later stage will run. So the time left counts all stages that are left, and the run takes at most
that long.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from quantstudy.files import write_text

SECONDS = Path(".cache") / "seconds.json"
"""The file of the seconds that each stage took when it last ran, by its name."""
_RUNS = "Running stage '%s':"
_DONE = ("Stage '%s' didn't change, skipping", "Stage '%s' is cached - skipping run, checking out outputs")


class Progress(logging.Filter):
    """Count the stages that DVC logs, and put the progress before the message of each.

    Args:
        stages: the names of all stages that DVC may run.
        seconds: how long each stage took when it last ran, if that is known.
    """

    def __init__(self, stages: Sequence[str], seconds: dict[str, float]) -> None:
        super().__init__()
        self.left, self.total, self.seconds = dict.fromkeys(stages), len(stages), seconds
        self._running: tuple[str, float] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message of a stage; let every message through."""
        if record.msg in (_RUNS, *_DONE) and isinstance(record.args, tuple) and len(record.args) == 1:
            name = str(record.args[0])
            self.end()
            self.left.pop(name, None)
            number = self.total - len(self.left)
            if record.msg == _RUNS:
                self._running = (name, time.monotonic())
                record.msg = f"[{number} of {self.total}, {self.remaining(name)}] {_RUNS}"
        return True

    def remaining(self, running: str | None = None, at_once: int = 1) -> str:
        """Return the time left in words, with the `running` stage, if `at_once` stages run at the same time."""
        kinds: dict[str, list[float]] = {}
        for name, taken in self.seconds.items():
            kinds.setdefault(name.partition("@")[0], []).append(taken)
        found = 0.0
        for name in (*([running] if running else []), *self.left):
            alike = kinds.get(name.partition("@")[0], [])
            if name not in self.seconds and not alike:
                return "time left not known yet"
            found += self.seconds.get(name, sum(alike) / max(len(alike), 1))
        minutes = round(found / at_once / 60)
        return f"about {minutes} minute{'s' * (minutes != 1)} left" if minutes else "less than a minute left"

    def end(self) -> None:
        """Note how long the stage took that ran until now."""
        if self._running:
            name, started = self._running
            self.seconds[name], self._running = time.monotonic() - started, None


def known_seconds(root: Path) -> dict[str, float]:
    """Return how many seconds each stage of a project took when it last ran; empty if no file says it."""
    try:
        found = json.loads((root / SECONDS).read_text(encoding="utf-8"))
        return {str(name): float(taken) for name, taken in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save_seconds(root: Path, progress: Progress) -> None:
    """Keep what the stages took for the next run."""
    write_text(root / SECONDS, json.dumps(progress.seconds, indent=1) + "\n")
