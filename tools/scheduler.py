"""Which stage runs when and where, while `tools/jobs.py` runs several at once with Ray."""

import collections
import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from dvc.exceptions import DvcException
from dvc.lock import LockError

from quantstudy.errors import UserError
from quantstudy.files import write_text
from quantstudy.params import PARAMS_FILE
from quantstudy.params.project import Runtime
from tools import worker
from tools.code import CODE_FILE
from tools.ledger import RESTORED, TO_RUN, UNCHANGED, WAITING, Ledger, when_free
from tools.live import Board
from tools.pool import Pool, at
from tools.processes import end
from tools.repair import keep_lock_file

TRIES = 3
"""How often a stage is tried whose worker or process is killed, or whose machine cannot run it."""
PATIENCE = 1.0
"""Seconds that Ray's processes have to end after a signal, before they are killed."""
LAST_TRIES = 10
"""How often the end of a run asks for DVC's lock, 3 seconds each time."""
RECORD_SECONDS = 40.0
"""How long stages that have ended may wait to be written down, so that one write does for several."""
RECORD_SHARE = 0.2
"""The share of this process's time that writing dvc.lock may take while others run."""


class Jobs:
    """One run: what waits, what runs, what has ended."""

    def __init__(self, ledger: Ledger, pool: Pool, jobs: int, board: Board, runtime: Runtime) -> None:
        self.ledger, self.pool, self.most, self.board = ledger, pool, jobs, board
        self.told: list[int] = []  # the signals to end
        self.sizes = {name: pool.size(ledger.meta(name).get("takes"), runtime) for name in ledger.stages}
        self.waiting = dict.fromkeys(ledger.stages)
        self.running: dict[Any, str] = {}  # Ray's reference of its result -> stage
        self.ended: dict[str, float] = {}  # not yet in dvc.lock -> since when
        self.done: set[str] = set()
        self._recorded = (0.0, 0.0)  # when dvc.lock was last written, and what that took
        self.failed: dict[str, str] = {}
        self.root, self.token = Path.cwd(), secrets.token_hex(16)
        self._rank = {name: place for place, name in enumerate(self._by_urgency())}
        write_text(self.root / worker.TOKEN, self.token)
        self.apart = self._ask_nodes()

    def run(self) -> None:
        """Run all stages; return when none can run any more."""
        while (self.waiting or self.running or self.ended) and not self.told:
            with self._unless_locked():
                self._start_what_fits()
                self._record()
            self.board.show(list(self.running.values()), len(self.waiting))
            if self.running:
                with self._unless_locked():
                    self._take_ended(0.5)
            elif not self.ended and not self._ready():
                break

    def stop(self) -> None:
        """End all workers, write down what has ended."""
        import ray

        with self._unless_locked():
            self._take_ended(0)
        for reference in list(self.running):
            if not self.pool.local:
                ray.cancel(reference, force=True)
            self.ledger.release(self.running.pop(reference))
        started = psutil.Process().children(recursive=True) if self.pool.local else []
        ray.shutdown()
        end(started, PATIENCE)
        for _ in range(LAST_TRIES):
            with self._unless_locked():
                self._record(at_last=True)
        if self.ended:
            self.board.say(f"DVC's lock was not to be had; these run again next time: {', '.join(self.ended)}")

    @contextlib.contextmanager
    def _unless_locked(self) -> Iterator[None]:
        """Put off what another DVC command keeps from being done now."""
        try:
            yield
        except LockError:
            self.board.say(WAITING)
            time.sleep(1)  # the other command has to get DVC's lock again, too

    def _ask_nodes(self) -> bool:
        """Return whether any machine has a folder of its own, so that files have to go through DVC's remote.

        What has been made so far is sent there then.

        Raises:
            UserError: a machine has no folder or other code, or there is no remote, or it takes nothing.
        """
        import ray

        code = (self.root / CODE_FILE).read_text(encoding="utf-8")
        asked = [
            ray.remote(worker.shares_folder)
            .options(num_cpus=0, scheduling_strategy=at(node["NodeID"]))
            .remote(str(self.root), self.token, code)
            for node in ray.nodes()
            if node["Alive"] and not self.pool.local
        ]
        try:
            if all(ray.get(asked)):
                return False
        except ray.exceptions.RayTaskError as error:
            raise UserError(f"--address: {error.cause}") from error
        if not self.ledger.repo.config["core"].get("remote"):
            raise UserError(
                "--address: machines with folders of their own need a DVC remote: dvc remote add -d NAME URL"
            )
        try:
            when_free(self.ledger.push)
        except DvcException as error:
            raise UserError(f"--address: DVC's remote takes no files: {error}") from error
        return True

    def _by_urgency(self) -> list[str]:
        """Return the stages, first those that the longest chain of others waits for; those that time come last."""
        chain: dict[str, int] = collections.defaultdict(int)
        for name in reversed(self.ledger.stages):
            for need in self.ledger.needs[name]:
                chain[need] = max(chain[need], chain[name] + 1)
        order = list(self.ledger.stages)
        return sorted(order, key=lambda name: (self.sizes[name].alone, -chain[name], -self.sizes[name].cores))

    def _ready(self) -> list[str]:
        there = self.done if self.apart else self.done | self.ended.keys()  # another machine has to find them pushed
        found = [name for name in self.waiting if self.ledger.needs[name] <= there]
        return sorted(found, key=self._rank.__getitem__)

    def _start_what_fits(self) -> None:
        """Start ready stages while there is room; ask DVC of each whether it has to run at all."""
        settled = True
        while settled:
            settled = False
            sizes = [self.sizes[name] for name in self.running.values()]
            cores, gpus = self.pool.cores - sum(s.cores for s in sizes), self.pool.gpus - sum(s.gpus for s in sizes)
            most = self.most
            if 0 < self.pool.gpus <= self.most:  # one more for each waits at Ray, so that no GPU waits for this process
                cores, gpus, most = cores + self.pool.cores, gpus + self.pool.gpus, most + self.pool.gpus
            for name in self._ready():
                size = self.sizes[name]
                if self.told or len(self.running) >= most or size.cores > cores:
                    break  # a smaller one would keep it waiting
                if self._crowded and self._overdue():
                    break  # what has ended is written down first, while nothing else computes
                if size.gpus > gpus:
                    continue
                if state := self._begin(name):
                    self._send(name)
                    cores, gpus = cores - size.cores, gpus - size.gpus
                settled = settled or not state
            self._record()

    def _begin(self, name: str) -> bool:
        """Return whether a stage has to run; count it as done, failed or restored if not.

        Raises:
            LockError: another DVC command is at work; the stage still waits.
        """
        try:
            state = self.ledger.begin(name)
        except LockError:
            raise
        except DvcException as error:
            del self.waiting[name]
            self._fail(name, str(error).partition("\n")[0])
            return False
        del self.waiting[name]
        if state == UNCHANGED:
            self.done.add(name)
            self.board.unchanged(name)
        elif state == RESTORED:
            self.ended[name] = time.monotonic()
            self.board.end(name, None, "restored from the run cache")
        return state == TO_RUN

    def _send(self, name: str) -> None:
        import ray

        size = self.sizes[name]
        order = self.order(name)
        options: dict[str, Any] = {"num_cpus": size.cores, "num_gpus": size.gpus, "name": name}
        if self.apart and self.ledger.stays_here(name):
            options["scheduling_strategy"] = at(ray.get_runtime_context().get_node_id())
        again: list[type[Exception]] = [worker.StageKilled, worker.NodeRefused]
        task = ray.remote(worker.run).options(**options, max_retries=TRIES - 1, retry_exceptions=again)
        self.running[task.remote(order)] = name
        self.board.start(name)

    def order(self, name: str) -> worker.Order:
        """Return what a worker has to know to run a stage."""
        stage, size = self.ledger.stages[name], self.sizes[name]
        texts: dict[str, str] = {}
        if self.apart:
            files = (Path("dvc.lock"), Path("dvc.yaml"), PARAMS_FILE, CODE_FILE)
            texts = {str(path): path.read_text(encoding="utf-8") for path in files if path.is_file()}
        produced = {out.fs_path for need in self.ledger.needs[name] for out in self.ledger.stages[need].outs}
        pulls = tuple(str(Path(dep.fs_path).relative_to(self.root)) for dep in stage.deps if dep.fs_path in produced)
        warm = os.environ.get("QUANTSTUDY_WARM", "")
        threads = str(size.threads) if size.threads else os.environ.get("OMP_NUM_THREADS")
        return worker.Order(name, stage.cmd, str(self.root), self.token, threads, size.alone, warm, pulls, texts)

    def _take_ended(self, seconds: float) -> None:
        """Take the outcomes there are; wait so long for the first."""
        import ray

        running = list(self.running)
        if running and ray.wait(running, timeout=seconds)[0]:
            for reference in ray.wait(running, num_returns=len(running), timeout=0)[0]:
                self._take(reference)

    def _take(self, reference: Any) -> None:
        """Take a stage's outcome.

        Raises:
            LockError: another DVC command is at work; it counts as running still.
        """
        import ray

        name = self.running.pop(reference)
        try:
            outcome: worker.Outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # what the worker raised
            return self._fail(name, str(error.cause).partition("\n")[0])
        except ray.exceptions.RayError as error:  # it was killed too often, or its machine is gone
            return self._fail(name, str(error).strip().partition("\n")[0])
        if not outcome.shared:
            write_text(self.root / worker.log_file(name), outcome.log)
        if outcome.status:
            last = outcome.log.strip().rpartition("\n")[2]
            return self._fail(name, f"status {outcome.status}: {last}")
        try:
            if not outcome.shared:
                self.ledger.fetch(name)
        except LockError:
            self.running[reference] = name  # it is taken later
            raise
        except DvcException as error:
            return self._fail(name, f"{outcome.node} ran it, but its files did not come: {error}")
        self.ended[name] = time.monotonic()
        self.board.end(name, outcome.seconds, "" if self.pool.local else outcome.node)

    @property
    def _crowded(self) -> bool:
        """Whether to write dvc.lock would take a core from what computes."""
        return self.pool.local and not self.pool.gpus

    def _overdue(self, seconds: float = RECORD_SECONDS) -> bool:
        """Return whether something that has ended has waited so long to be written down."""
        return bool(self.ended) and time.monotonic() - min(self.ended.values()) > seconds

    def _too_early(self) -> bool:
        """Return whether what has ended may wait for more, though others run."""
        written, took = self._recorded
        if self.apart:
            return False
        if self._crowded:
            return not self._overdue(1.5 * RECORD_SECONDS)  # beside a stage that takes long it is written all the same
        return time.monotonic() - written < took / RECORD_SHARE and not self._overdue()

    def _record(self, at_last: bool = False) -> None:
        """Write down what has ended, not too often while others run, and never beside something that times here.

        Raises:
            LockError: another DVC command is at work; it all waits on.
        """
        if not self.ended or (self.running and self._too_early()):
            return
        began = time.monotonic()
        with worker.timing_lock(self.root, wait=False) as held:
            if not held and not at_last:
                return
            names = list(self.ended)
            failed = self.ledger.record(names)
            keep_lock_file(self.root)
            if self.apart and (good := [name for name in names if name not in failed]):
                failed |= self._push(good)
        self._recorded = time.monotonic(), time.monotonic() - began
        self.ended.clear()
        for name in names:
            if name in failed:
                self._fail(name, failed[name])
            else:
                self.done.add(name)

    def _push(self, names: Sequence[str]) -> dict[str, str]:
        """Send what stages made to the remote; return what failed, and why."""
        try:
            self.ledger.push(names)
        except LockError:
            raise
        except DvcException as error:
            return dict.fromkeys(names, f"DVC's remote did not take its files: {error}")
        return {}

    def _fail(self, name: str, reason: str) -> None:
        self.ledger.release(name)
        self.failed[name] = reason
        self.board.fail(name, reason)
        dropped = {name}
        for other in list(self.waiting):  # each after those it needs
            if self.ledger.needs[other] & dropped:
                dropped.add(other)
                del self.waiting[other]
                self.board.drop(other)
