"""How far a run of `tools/jobs.py` is: one live table on a terminal, a line a stage elsewhere."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tools.progress import Progress, known_seconds, save_seconds


class Board:
    """Shows what runs, waits, is done and has failed.

    Args:
        root: the project's folder, which knows what each stage took when it last ran.
        names: all stages.
        jobs: how many run at once, for the time left.
    """

    def __init__(self, root: Path, names: Sequence[str], jobs: int) -> None:
        self.root, self.total, self.jobs = root, len(names), jobs
        self.progress = Progress(names, known_seconds(root))
        self.started: dict[str, float] = {}
        self._said = ""
        self.counts = dict.fromkeys(("ran", "restored", "unchanged", "failed", "not run"), 0)
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live:
            self.live.stop()
        print(", ".join(f"{count} {word}" for word, count in self.counts.items() if count), file=sys.stderr)

    def start(self, name: str) -> None:
        """A stage starts."""
        self.started[name] = time.monotonic()

    def end(self, name: str, seconds: float | None, note: str) -> None:
        """A stage has ended well; `seconds` is what it took, None if it did not run."""
        self._leave(name, "restored" if seconds is None else "ran")
        if seconds is not None:
            self.progress.seconds[name] = seconds
        took = "" if seconds is None else f" {seconds:.1f} s"
        self._say(f"{name}{took}{', ' * bool(took and note) or ' ' * bool(note)}{note}")

    def unchanged(self, name: str) -> None:
        """A stage need not run."""
        self._leave(name, "unchanged")

    def fail(self, name: str, reason: str) -> None:
        """A stage has failed."""
        self._leave(name, "failed")
        self._say(f"{name} failed: {reason}")

    def drop(self, name: str) -> None:
        """A stage cannot run, because one that it needs has failed."""
        self._leave(name, "not run")

    def say(self, text: str) -> None:
        """Print a line, once where it would come again and again."""
        if text != self._said:
            self._say(text)
        self._said = text

    def show(self, running: Sequence[str], waiting: int) -> None:
        """Bring the table up to date."""
        if not self.live:
            return
        table = Table(
            title=f"{len(running)} running, {waiting} waiting, {self._done()} of {self.total} done, {self._left()}"
        )
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        table.add_column("last time", justify="right")
        for name in running:
            last = self.progress.seconds.get(name)
            now = time.monotonic() - self.started[name]
            table.add_row(name, f"{now:.0f}", "" if last is None else f"{last:.0f}")
        self.live.update(table)

    def save(self) -> None:
        """Keep what the stages took for the next run."""
        save_seconds(self.root, self.progress)

    def _leave(self, name: str, how: str) -> None:
        self.counts[how] += 1
        self._said = ""
        self.started.pop(name, None)
        self.progress.left.pop(name, None)

    def _done(self) -> int:
        return sum(self.counts.values())

    def _left(self) -> str:
        return self.progress.remaining(at_once=self.jobs)

    def _say(self, text: str) -> None:
        self.console.print(
            f"[{self._done()} of {self.total}, {self._left()}] {text}", markup=False, highlight=False, soft_wrap=True
        )
