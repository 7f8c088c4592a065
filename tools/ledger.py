"""What DVC knows of the stages, and the one process that writes it down while `tools/jobs.py` runs several at once.

Of DVC this takes what `dvc repro` and `dvc commit` are made of, and none of its private functions: whether a stage has
changed, its run cache, and, for stages that have run, `save`, `commit` and one write of dvc.lock for all of them, as
`dvc commit --force` does. Running `dvc` itself for each stage would cost seconds each time.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.repo.reproduce import plan_repro
from dvc.rwlock import rwlock
from dvc.stage import Stage
from dvc.stage.cache import RunCacheNotFoundError

from quantstudy.errors import UserError

UNCHANGED, RESTORED, TO_RUN = "unchanged", "restored", "to run"
WAITING = "another DVC command works in this folder; waiting for it"
Result = TypeVar("Result")


class Ledger:
    """The stages of the project in the working directory.

    Args:
        targets: names of stages; with what they need they are all that is looked at. None given means all.

    Raises:
        UserError: DVC cannot read the project, or a target is no stage.
    """

    def __init__(self, targets: Sequence[str] = ()) -> None:
        try:
            self.repo = Repo()
            graph, asked = when_free(functools.partial(self._collect, targets))
        except DvcException as error:
            raise UserError(f"DVC: {error}") from error
        self.stages = {stage.addressing: stage for stage in plan_repro(graph, asked)}
        """By name, each after those it needs."""
        self.needs = {name: {need.addressing for need in graph.successors(of)} for name, of in self.stages.items()}
        """Stage -> the stages whose files it reads."""
        self._in_use: dict[str, ExitStack] = {}

    def _collect(self, targets: Sequence[str]) -> tuple[Any, list[Stage]]:
        with self.repo.lock:
            return self.repo.index.graph, [stage for target in targets for stage in self.repo.stage.collect(target)]

    def begin(self, name: str) -> str:
        """Do what comes before a stage's command: return UNCHANGED, or RESTORED from the run cache, or TO_RUN.

        A stage that is to run has lost its old files, as in `dvc repro`, and no other DVC may touch its files until
        `release`.
        """
        stage = self.stages[name]
        with self.repo.lock:
            if stage.cmd is None or stage.frozen or not stage.changed():  # without one: a file of `dvc add`
                return UNCHANGED
            stage.remove_outs()
            try:
                self.repo.stage_cache.restore(stage)
                return RESTORED
            except RunCacheNotFoundError:
                stage.save_deps()
        self._in_use[name] = ExitStack()
        self._in_use[name].enter_context(self._using(stage))
        return TO_RUN

    def _using(self, stage: Stage) -> object:
        paths = ([item.fs_path for item in items] for items in (stage.deps, stage.outs))
        hardlink = self.repo.config["core"].get("hardlink_lock", False)
        command = " ".join(sys.argv)  # as in DVC's own locks: what this process does itself is not kept out
        return rwlock(self.repo.tmp_dir, self.repo.fs, command, *paths, hardlink)

    def release(self, name: str) -> None:
        """Let other DVCs touch the files of a stage that `begin` said is to run."""
        if held := self._in_use.pop(name, None):
            with contextlib.suppress(LockError):  # then DVC forgets it when this process has ended
                held.close()

    def record(self, names: Iterable[str]) -> dict[str, str]:
        """Put what stages made into DVC's cache, write dvc.lock once, release them; return what failed and why."""
        names = list(names)
        read = {need for name in self._in_use if name not in names for need in self.needs[name]}
        with self.repo.lock, self.repo.scm_context():
            failed = save([self.stages[name] for name in names], read)
        for name in names:
            self.release(name)
        return failed

    def push(self, names: Iterable[str] = ()) -> None:
        """Send the files of stages, or of all, to DVC's default remote; raise `DvcException` where it cannot."""
        self.repo.push(targets=list(names) or None)

    def fetch(self, name: str) -> None:
        """Take the files of a stage that another machine ran and pushed; raise `DvcException` where it cannot."""
        stage = self.stages[name]
        with self.repo.lock:
            for out in stage.outs:  # DVC would check out the old ones, of which dvc.lock knows
                out.clear()
            self.repo.stage_cache.pull(None)
            self.repo.stage_cache.restore(stage, pull=True)

    def stays_here(self, name: str) -> bool:
        """Return whether only this machine can run a stage: it needs or makes files that no DVC remote holds."""
        stage = self.stages[name]
        loose = [out.fs_path for need in self.needs[name] for out in self.stages[need].outs if not out.use_cache]
        reads = any(stage.repo.fs.isin_or_eq(path, dep.fs_path) for path in loose for dep in stage.deps)
        makes = any(not out.use_cache for out in stage.outs)  # `dvc push` sends none of these
        return reads or makes or bool(self.meta(name).get("here"))

    def meta(self, name: str) -> dict[str, object]:
        """Return what dvc.yaml says under `meta` of a stage."""
        return self.stages[name].meta or {}


def when_free(action: Callable[[], Result]) -> Result:
    """Return what `action` returns, as soon as no other DVC command keeps it from its work."""
    said = False
    while True:
        try:
            return action()
        except LockError:
            if not said:
                print(WAITING, file=sys.stderr, flush=True)
            said = True
            time.sleep(1)


def save(stages: Iterable[Stage], read: Collection[str] = ()) -> dict[str, str]:
    """Do what `dvc commit --force` does, and as `dvc repro` keep what it may in the run cache.

    The lock of their repository is held. The files of those whose names are in `read` are being read: they are not
    replaced by links to the cache. Returns the names of those that failed, and why.
    """
    failed: dict[str, str] = {}
    saved: dict[Any, list[Stage]] = {}
    for stage in stages:
        try:
            stage.save(run_cache=all(out.use_cache or out.is_metric or out.is_plot for out in stage.outs))
            stage.commit(relink=stage.addressing not in read)
        except LockError:
            raise
        except DvcException as error:
            failed[stage.addressing] = str(error)
        else:
            saved.setdefault(stage.dvcfile, []).append(stage)
    for file, of in saved.items():
        file.dump_stages(of, update_pipeline=False)
    return failed
