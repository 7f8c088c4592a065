"""Find the smallest or fastest variant that loses no more than a study's goal allows.

The search makes the candidates of a group (`candidates`). On calibration images alone it measures how far the
predictions of each candidate diverge from fp32's, and what the goal minimizes: size, latency or bit-operations. A
candidate that diverges more than another and is no smaller drops out. To minimize latency, all candidates of a group
are timed in turns, with fp32 and the best so far. Times of different moments would not compare: other work on the
machine can change them by half.

The quick candidates that are left are tested on validation images (`measure.sequential`), beginning with the one that
diverges least. The last accepted candidate is the smallest so far. This order is fixed before the search sees a
validation image. Each of the first `STARTS`, or fewer if there are few images, brings an equal part of the allowed
error. A candidate that is accepted passes on the error it was tested at, one that is not loses it, and the tests end
where none is left. All of these tests together are then wrong as rarely as a single test (the fallback procedure of
Wiens and Dmitrienko, Journal of Biopharmaceutical Statistics 15 (2005); with one start it is fixed sequence testing, as
in Angelopoulos, Bates, Candès, Jordan and Lei, *Learn then Test*, Annals of Applied Statistics 19 (2025), section 4).
So one unlucky candidate does not end the search.

The groups that take minutes come later. Earlier acceptances decide which of their candidates are made and tested, so
the tests of such a group share the error that the group is allowed (Bonferroni).

The search keeps its variants in a folder until it ends. A search that was killed goes on from there.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.errors import UserError, one_line
from quantstudy.files import read_json, write_json
from quantstudy.measure.operations import count_macs, layer_bits, tera_bit_operations
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.methods.sensitivity import divergence
from quantstudy.quantization.variant import Variant, load_variant, save_variant
from quantstudy.search.candidates import (
    SPENT_ON,
    Candidate,
    Group,
    Trial,
    candidates,
    error_of,
    least_objective,
    provable,
    scheme_of,
    starts_of,
)
from quantstudy.search.judging import Judge, Shipped

ALIKE = 0.05
"""Two candidates that differ by less than this share in what is minimized count as equal. To test both would gain
little, and a test that fails loses its part of the allowed error."""
TOO_SLOW = f"not {100 * ALIKE:g} % faster than fp32"
_BUSY = "the machine was busy while it was timed"
_UNTESTED = "not tested"
TIMING_SECONDS = 1.0
TWINS = 0.95
"""Two roundings of one scheme have at least this share of each other's size: fragile layers may get other bits."""


@dataclass
class Workshop:
    """What a search works with: the study's network and images, and how it makes the variants of each kind."""

    params: P.Params
    study: str
    goal: P.Goal
    fp32: Path
    facts: dict[str, Any]
    """The checkpoint of the fp32 model."""
    calibration: Calibration
    calibration_images: Split
    judge: Judge
    folder: Path
    """Where variants lie until the search ends."""
    train: Callable[[Candidate], Variant]

    def variant(self, trial: Trial) -> Path:
        """Return the file of a candidate's variant."""
        return self.folder / f"{trial.name}.pth"

    def close(self) -> None:
        """Delete what the search has made, after it has ended."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    @functools.cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each layer."""
        return count_macs(self.calibration.model, self.judge.preprocessing.shape)[1]

    @functools.cached_property
    def logits(self) -> Tensor:
        """The fp32 model's logits on the calibration images."""
        return _logits(self.calibration.model, self.calibration.images)


@dataclass
class Found:
    """The result of a search."""

    best: Trial | None
    trials: list[Trial]
    left: dict[str, str]
    """Methods that were not tried, and why."""
    ended: str
    """Why the search ended."""
    seconds: float

    @property
    def busy(self) -> list[str]:
        """The candidates that could not be timed."""
        return [trial.name for trial in self.trials if trial.verdict == _BUSY]


def search(shop: Workshop) -> Found:
    """Return the candidate that minimizes the goal among those shown to keep it, and all candidates that were tried."""
    goal = shop.goal
    tried, left = candidates(shop.params, goal)
    found = Found(None, [], left, "", 0.0)
    for group in SPENT_ON:
        members = sorted((one for one in tried if one.group == group), key=lambda one: _urgency(shop, one))
        count = provable(group, goal, len(members), len(shop.judge.images))
        for one in members[count:]:
            few = f"{len(shop.judge.images)} validation images can prove the goal for {count} {group} methods only"
            found.trials.append(Trial(one.name, group, verdict=f"not begun: {few}"))
            print(_line(found.trials[-1]), flush=True)
        trials = _made(shop, members[:count], tried, found)
        front = _front([trial for trial in trials if not trial.verdict], goal)
        _test(shop, front, group, error_of(group, goal, max(count, 1)), found)
    found.ended = found.ended or _ending(goal, found)
    for name, reason in left.items():
        print(f"{name}: not tried: {reason}", flush=True)
    print(f"the search ended: {found.ended}", flush=True)
    return found


def _ending(goal: P.Goal, found: Found) -> str:
    """Return why a search ended whose time was not over."""
    failed = [trial.name for trial in found.trials if trial.verdict in ("rejected", "undecided")]
    untested = [trial.name for trial in found.trials if trial.verdict.startswith(_UNTESTED)]
    parts = [f"{', '.join(failed)}: tested, but not accepted"] if failed else []
    parts += [f"{', '.join(found.busy)}: {_BUSY}"] if found.busy else []
    if untested:
        parts.append(f"{', '.join(untested)}: not tested, as the allowed error was spent")
    elif found.best:
        parts.append(f"nothing else was left that could be {_less(goal)} than {found.best.name}")
    return "; ".join(parts) or "no candidate was left"


def _urgency(shop: Workshop, candidate: Candidate) -> tuple[bool, float]:
    """Return a sort key: rows that GPTQ rounds come last, since it takes a minute for a large network.

    Among them the smallest come first: if the time is over, those are left out that would have saved little.
    """
    slow = getattr(candidate.row, "rounding", "") == "gptq"
    least = least_objective(candidate.row, shop.goal, shop.calibration.replaceable, shop.macs)
    return slow, least if slow else 0.0


def _made(shop: Workshop, members: Iterable[Candidate], tried: Iterable[Candidate], found: Found) -> list[Trial]:
    """Make and measure the candidates of a group while time is left; only list those that cannot be the best."""
    goal, trials = shop.goal, list[Trial]()
    for candidate in members:
        trial = Trial(candidate.name, candidate.group)
        trials.append(trial)
        least = least_objective(candidate.row, goal, shop.calibration.replaceable, shop.macs)
        if twins := _twins(candidate, tried, found.trials):
            least = max(least, TWINS * min(twin.of(goal.minimize) for twin in twins))
        if twins and all(twin.verdict == TOO_SLOW for twin in twins):
            trial.verdict = f"computes as {twins[0].name} does, which is {TOO_SLOW}"
        elif found.best and least >= (1 - ALIKE) * found.best.of(goal.minimize):
            trial.verdict = f"cannot be {_less(goal)} than {found.best.name}"
        elif found.seconds >= 60 * goal.minutes:
            trial.verdict = found.ended = f"not begun: the {goal.minutes:g} minutes were over"
        else:
            _measure(shop, candidate, trial)
            found.seconds += trial.seconds
        print(_line(trial), flush=True)
    _time(shop, [trial for trial in trials if not trial.verdict], found)
    for trial in trials:
        if not trial.verdict and (reason := _beyond(goal, trial)):
            trial.verdict = reason
            print(f"{trial.name}: {reason}", flush=True)
    found.trials += trials
    return trials


def _twins(candidate: Candidate, tried: Iterable[Candidate], trials: Iterable[Trial]) -> list[Trial]:
    """Return the measured trials of the same scheme with other roundings: they are about as large and as fast."""
    known = {trial.name: trial for trial in trials if trial.size_mb is not None and not trial.busy}
    scheme = scheme_of(candidate.row) if candidate.group == "learned" else {}
    return [known[other.name] for other in tried if scheme and other.name in known and scheme_of(other.row) == scheme]


def _less(goal: P.Goal) -> str:
    """Return in words by how much a candidate has to differ from a known one."""
    return f"{100 * ALIKE:g} % {'faster' if goal.minimize == 'latency' else 'smaller'}"


def _measure(shop: Workshop, candidate: Candidate, trial: Trial) -> None:
    """Fill in `trial`: from the folder, if a killed search left it there, or by making and measuring the candidate."""
    note, path = shop.folder / f"{trial.name}.json", shop.variant(trial)
    if note.is_file() and (path.is_file() or read_json(note)["verdict"]):
        trial.__dict__.update(read_json(note))
    started, before = time.perf_counter(), asdict(trial)
    torch.manual_seed(shop.params.study(shop.study).seed)  # whatever this process made before
    if trial.divergence is None and not trial.verdict:
        try:
            variant = shop.train(candidate) if candidate.group == "trained" else _quantized(shop, candidate)
        except UserError as error:
            trial.verdict = f"cannot be made: {error}"
        else:
            save_variant(path, variant, shop.facts, trial.name)
            _weigh(shop, load_variant(path), trial)
    if asdict(trial) != before:
        trial.seconds += time.perf_counter() - started
        write_json(note, asdict(trial))


def _time(shop: Workshop, trials: list[Trial], found: Found) -> None:
    """Time the trials of a group and the best so far, if the goal asks for it.

    To minimize latency, all are timed in turns. For a limit alone each is timed by itself, beside fp32: fewer models
    are in memory then.
    """
    fastest = shop.goal.minimize == "latency"
    if not trials or not (fastest or shop.goal.max_latency_ms is not None):
        return
    started, known = time.perf_counter(), [found.best] if found.best else []
    for together in [[*trials, *known]] if fastest else [[trial] for trial in trials]:
        variants = {trial.name: _shipped(shop, trial) for trial in together}
        timings = shop.judge.timed(variants, TIMING_SECONDS * len(together))
        for trial in together:
            own, fp32 = timings[trial.name], timings["fp32"]
            trial.latency_ms, trial.fp32_latency_ms, trial.busy = own.median_ms, fp32.median_ms, own.busy or fp32.busy
            print(f"{trial.name}: {own.median_ms:.2f} ms, fp32 {fp32.median_ms:.2f}", flush=True)
    found.seconds += time.perf_counter() - started


def _shipped(shop: Workshop, trial: Trial) -> Shipped:
    return shop.judge.shipped(load_variant(shop.variant(trial)))


def _weigh(shop: Workshop, variant: Variant, trial: Trial) -> None:
    trial.tbops = tera_bit_operations(shop.macs, layer_bits(variant))
    logits = _logits(variant, shop.calibration.images)
    if not logits.isfinite().all():
        trial.verdict = "its logits are not finite"
        return
    trial.divergence = divergence(shop.logits, logits)
    try:
        shipped = shop.judge.shipped(variant)
        trial.agreement = shop.judge.check(variant, shipped, shop.calibration_images)
    except Exception as error:  # a runtime that lacks an operator may raise anything
        trial.verdict = f"cannot be exported: {error if isinstance(error, UserError) else one_line(error)}"
    else:
        trial.size_mb = shipped.exported.ByteSize() / 1e6


def _quantized(shop: Workshop, candidate: Candidate) -> Variant:
    row = candidate.row.made_for(shop.params.target)
    return quantize(shop.calibration.model, shop.calibration, row, f"methods.{candidate.name}")


def _beyond(goal: P.Goal, trial: Trial) -> str:
    """Return which limit other than the drop a candidate exceeds, or why its latency rules it out; else ''."""
    limits = {"max_size_mb": trial.size_mb, "max_latency_ms": trial.latency_ms, "max_tbops": trial.tbops}
    for key, value in limits.items():
        limit = getattr(goal, key)
        if limit is not None and value is not None and value > limit:
            return _BUSY if key == "max_latency_ms" and trial.busy else f"{value:.3g} is beyond {key}, {limit:g}"
    if goal.minimize != "latency":
        return ""
    assert trial.latency_ms is not None and trial.fp32_latency_ms is not None
    slow = trial.latency_ms >= (1 - ALIKE) * trial.fp32_latency_ms
    return _BUSY if trial.busy else TOO_SLOW if slow else ""


def _front(trials: Iterable[Trial], goal: P.Goal) -> list[Trial]:
    """Return the trials that are smaller than all that diverge less, by divergence; give the others a verdict."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.divergence, trial.of(goal.minimize))):
        if kept and trial.of(goal.minimize) >= (1 - ALIKE) * kept[-1].of(goal.minimize):
            trial.verdict = f"not {_less(goal)} than {kept[-1].name}, and diverges more"
        else:
            kept.append(trial)
    return kept


def _test(shop: Workshop, front: list[Trial], group: Group, error: float, found: Found) -> None:
    """Test the trials of `front` one after the other, as long as a part of the allowed error is left.

    Args:
        error: of the quick group, the error of all its tests; of another, the error of each test.
    """
    goal, level, failed = shop.goal, 0.0, list[str]()
    starts = starts_of(goal, error, len(shop.judge.images), len(front))
    for number, trial in enumerate(front):
        if found.best and trial.of(goal.minimize) >= (1 - ALIKE) * found.best.of(goal.minimize):
            trial.verdict = f"not {_less(goal)} than {found.best.name}"
            continue
        if group == "quick":
            level += error / starts if number < starts else 0.0
        else:
            level = error
        if not level:
            trial.verdict = f"{_UNTESTED}: {failed[-1]}, which diverges less, was not accepted"
            continue
        started = time.perf_counter()
        test = shop.judge.judge(_shipped(shop, trial), level)
        trial.verdict, trial.drop, trial.images = test.verdict or "undecided", test.drop, test.seen
        taken = time.perf_counter() - started
        trial.seconds, found.seconds = trial.seconds + taken, found.seconds + taken
        print(f"  {trial.name}: {trial.verdict} after {test.seen} images, drop {test.drop:+.2f}", flush=True)
        if trial.verdict == "accepted":
            found.best = trial
        else:
            level = 0.0
            failed.append(trial.name)


@torch.no_grad()
def _logits(network: Any, images: Iterable[Tensor]) -> Tensor:
    return torch.cat([network(batch.clone()) for batch in images])


def _line(trial: Trial) -> str:
    parts = [f"{trial.size_mb:.3f} MB"] if trial.size_mb is not None else []
    parts += [f"divergence {trial.divergence:.4f}, {trial.seconds:.0f} s"] if trial.divergence is not None else []
    return f"{trial.name}: " + ", ".join([*parts, *[trial.verdict] * bool(trial.verdict)])
