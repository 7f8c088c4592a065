"""A search takes the smallest candidate that its tests accept, in an order that no validation image has chosen."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.data.sampling import validation_indices
from quantstudy.errors import UserError
from quantstudy.measure.latency import Timing
from quantstudy.measure.operations import count_macs, layer_bits, tera_bit_operations
from quantstudy.measure.sequential import PairedTest, images_needed
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.params import load_params
from quantstudy.quantization.layers import quantized_layers
from quantstudy.search import search as module
from quantstudy.search.candidates import (
    SHARES,
    SPENT_ON,
    STARTS,
    Candidate,
    Trial,
    candidates,
    error_of,
    least_objective,
    provable,
    starts_of,
)
from quantstudy.search.judging import drawn
from quantstudy.search.search import _urgency, search
from tests.conftest import Project

SEARCHES = 2000
TABLE = {
    "float": (4.0, 0.001),
    "eight": (2.0, 0.01),
    "eight_too": (2.0, 0.02),
    "large": (3.0, 0.03),
    "four": (1.0, 0.1),
    "three": (0.8, 0.2),
    "two": (0.5, 0.5),
}
"""Size and divergence of made-up candidates."""


class Shop:
    """A workshop in which making and judging cost nothing; `verdicts` has those of the candidates, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, goal: P.Goal, verdicts: dict[str, str]) -> None:
        self.goal, self.verdicts, self.errors = goal, verdicts, dict[str, float]()
        self.params: Any = None
        self.calibration, self.calibration_images, self.macs, self.judge = self, None, {}, self
        self.replaceable: dict[str, Any] = {}
        self.groups: dict[str, str] = {}
        monkeypatch.setattr(module, "load_variant", lambda name: name)
        monkeypatch.setattr(module, "_measure", self.measure)
        monkeypatch.setattr(module, "least_objective", lambda row, goal, layers, macs: 0.0)
        monkeypatch.setattr(module, "candidates", lambda params, goal: (self.made(), {"other": "not wanted"}))

    def made(self) -> list[Candidate]:
        return [Candidate(name, None, self.groups.get(name, "quick")) for name in TABLE]  # type: ignore[arg-type]

    def measure(self, shop: Any, candidate: Candidate, trial: Trial) -> None:
        trial.size_mb, trial.divergence = TABLE[candidate.name]
        trial.tbops, trial.seconds = trial.size_mb, 10.0
        if self.verdicts.get(candidate.name) == "unexportable":
            trial.verdict = "cannot be exported: an operator is missing"

    def variant(self, trial: Trial) -> str:
        return trial.name

    def shipped(self, name: str) -> str:
        return name

    def check(self, *_: Any) -> dict[str, Any]:
        return {"agreement": 100.0}

    def judge_of(self, name: str, error: float) -> PairedTest:
        self.errors[name] = error
        test = PairedTest(1.0, 100, error)
        test.verdict = self.verdicts.get(name, "accepted")  # type: ignore[assignment]
        test.seen = 50
        return test


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(verdicts: dict[str, str], **goal: Any) -> Any:
        found = Shop(monkeypatch, P.Goal(**{"max_drop": 1.0} | goal), verdicts)
        found.judge = type(
            "J", (), {"judge": found.judge_of, "shipped": found.shipped, "check": found.check, "images": range(2000)}
        )()  # type: ignore[assignment]
        return found

    return made


def verdicts_of(found: Any) -> dict[str, str]:
    return {trial.name: trial.verdict for trial in found.trials}


def test_it_walks_from_the_least_divergence_until_no_error_is_left(shop: Any) -> None:
    own = shop({"three": "undecided"})
    found = search(own)
    assert found.best.name == "four" and list(own.errors) == ["float", "eight", "four", "three"]
    said = verdicts_of(found)
    assert said["eight_too"] == said["large"] == "not 5 % smaller than eight, and diverges more"
    assert said["two"] == "not tested: three, which diverges less, was not accepted"
    assert found.left == {"other": "not wanted"} and re.match("three: tested, but not accepted; two: not", found.ended)
    shares = [error / error_of("quick", own.goal) for error in own.errors.values()]
    assert shares == pytest.approx([1 / STARTS, 2 / STARTS, 1, 1])


def test_what_cannot_be_exported_is_named_and_ends_nothing(shop: Any) -> None:
    own = shop({"eight": "unexportable", "two": "rejected"})
    found = search(own)
    assert found.best.name == "three" and "eight" not in own.errors
    assert verdicts_of(found)["eight"].startswith("cannot be exported: an operator")
    assert verdicts_of(found)["eight_too"] == "accepted"  # what it was no smaller than is none


def test_one_unlucky_candidate_ends_nothing_but_takes_its_error_along(shop: Any) -> None:
    own = shop({"eight": "undecided"})
    assert search(own).best.name == "two"
    shares = {name: error / error_of("quick", own.goal) for name, error in own.errors.items()}
    assert shares == pytest.approx({"float": 1 / 3, "eight": 2 / 3, "four": 1 / 3, "three": 1 / 3, "two": 1 / 3})


def test_nothing_is_shipped_where_the_first_ones_are_not_accepted(shop: Any) -> None:
    own = shop(dict.fromkeys(("float", "eight", "four"), "rejected"))
    assert search(own).best is None and list(own.errors) == ["float", "eight", "four"]


def test_in_other_groups_each_test_has_an_error_of_its_own(shop: Any) -> None:
    own = shop({"three": "rejected"})
    own.groups = {"three": "learned", "two": "learned"}
    assert search(own).best.name == "two"
    assert own.errors["two"] == own.errors["three"] == error_of("learned", own.goal, 2)


def test_groups_share_the_error_and_begin_only_what_can_be_smaller(shop: Any) -> None:
    own = shop({"four": "rejected"}, confidence=0.9, may_train=True)
    own.groups = {"two": "learned", "large": "trained", "three": "trained"}
    found = search(own)
    whole = sum(SPENT_ON.values())
    assert own.errors["eight"] == pytest.approx(2 / 3 * 0.1 * SPENT_ON["quick"] / whole)
    assert own.errors["two"] == pytest.approx(0.1 * SPENT_ON["learned"] / whole)
    assert found.best.name == "two" and "three" not in own.errors and "large" not in own.errors
    goals = [P.Goal(max_drop=1.0, confidence=0.9, may_train=trains) for trains in (False, True)]
    for goal, groups in zip(goals, (["quick", "learned"], ["quick", "learned", "trained"]), strict=True):
        spent = {group: error_of(group, goal, 4) * (1 if group == "quick" else 4) for group in groups}  # type: ignore[arg-type]
        assert sum(spent.values()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("lossless", "groups"),
    [
        ((), {"four": "learned", "three": "learned", "two": "trained"}),
        (("float",), {}),
        (("float", "eight"), {}),
        (("float", "eight"), {"three": "learned", "two": "trained"}),
        (("float", "eight", "four"), {}),
    ],
)
def test_a_twentieth_of_searches_accepts_a_candidate_that_drops_by_the_limit(
    shop: Any, capsys: pytest.CaptureFixture[str], lossless: tuple[str, ...], groups: dict[str, str]
) -> None:
    """Those that lose nothing are accepted most of the time, and pass their error on to those that lose too much."""
    random, wrong, right = np.random.default_rng(0), 0, 0
    for _ in range(SEARCHES):
        own = shop({}, may_train=True)
        own.groups = groups

        def judged(name: str, error: float) -> PairedTest:
            test, (before, after) = PairedTest(1.0, 2000, error), (0.005, 0.005) if name in lossless else (0.03, 0.02)
            while not test.verdict:
                number = test.ends[test.ends.index(test.seen) + 1 if test.seen else 0] - test.seen
                where = random.random(number)
                test.look(where < before, (where >= before) & (where < before + after))
            return test

        own.judge.judge = judged
        accepted = {trial.name for trial in search(own).trials if trial.verdict == "accepted"}
        wrong, right = wrong + bool(accepted - set(lossless)), right + bool(accepted & set(lossless))
        capsys.readouterr()
    allowed = 0.05 * sum(SPENT_ON[group] for group in {"quick", *groups.values()}) / sum(SPENT_ON.values())
    assert wrong <= allowed * SEARCHES and (not lossless or right > 0.8 * SEARCHES)


@pytest.mark.parametrize(
    ("images", "tests", "wanted"), [(2000, 5, STARTS), (2000, 2, 2), (650, 5, 2), (500, 5, 1), (1, 5, 1)]
)
def test_fewer_tests_begin_with_a_part_of_the_error_where_images_are_few(images: int, tests: int, wanted: int) -> None:
    goal = P.Goal(max_drop=1.0)
    error = error_of("quick", goal)
    found = starts_of(goal, error, images, tests)
    assert found == wanted
    assert found == 1 or images_needed(goal.max_drop, error / found) <= images


@pytest.mark.parametrize(("size", "tested"), [(1.0, False), (0.96, False), (0.94, True)])
def test_two_candidates_count_as_equal_up_to_a_twentieth(
    shop: Any, monkeypatch: pytest.MonkeyPatch, size: float, tested: bool
) -> None:
    monkeypatch.setitem(TABLE, "three", (size, 0.2))
    own = shop({})
    said = verdicts_of(search(own))
    assert ("three" in own.errors) == tested
    assert said["three"] == ("accepted" if tested else "not 5 % smaller than four, and diverges more")


def test_a_learned_row_is_not_made_whose_quick_twin_is_larger_than_the_best(shop: Any) -> None:
    own = shop({"two": "rejected"})
    own.groups = {"large": "learned"}
    scheme = {"kind": "weight_only", "weight_bits": 4, "group_size": 32, "fragile_share": 0.1}
    rows = {name: P.WeightOnly.model_validate(scheme | {"rounding": how}) for name, how in TWINS.items()}
    made = own.made
    own.made = lambda: [Candidate(one.name, rows.get(one.name), one.group) for one in made()]
    said = verdicts_of(search(own))
    assert said["large"] == "cannot be 5 % smaller than three" and said["eight"] == "accepted"


TWINS = {"eight": "gptq", "large": "brecq"}


def test_times_are_compared_that_were_taken_in_turns(shop: Any) -> None:
    own = shop({"three": "rejected"}, minimize="latency")
    own.groups = {"large": "learned"}
    slower = [1.0, 3.0]  # what else the machine does makes the second group's times three times as long
    milliseconds = {"fp32": 10.0, "float": 9.9, "eight": 5.0, "eight_too": 6.0, "four": 4.0, "three": 3.0, "two": 2.0}
    together: list[list[str]] = []

    def timed(variants: dict[str, str], seconds: float) -> dict[str, Timing]:
        assert seconds == len(variants) * module.TIMING_SECONDS and all(
            name == value for name, value in variants.items()
        )
        together.append(list(variants))
        factor = slower[len(together) - 1]
        values = {name: factor * (milliseconds | {"large": 3.5})[name] for name in (*variants, "fp32")}
        return {name: Timing(value, value, value, 9, busy=name == "two") for name, value in values.items()}

    own.judge.timed = timed
    found = search(own)
    assert together == [["float", "eight", "eight_too", "four", "three", "two"], ["large", "four"]]
    assert found.best.name == "large" and found.best.latency_ms == 10.5 and found.best.fp32_latency_ms == 30.0
    said = verdicts_of(found)
    assert said["float"] == "not 5 % faster than fp32" and said["two"] == "the machine was busy while it was timed"
    assert said["eight_too"] == "not 5 % faster than eight, and diverges more" and own.errors.keys() >= {
        "eight",
        "four",
    }


def test_a_learned_row_is_not_made_whose_quick_twin_is_no_faster(shop: Any) -> None:
    own = shop({}, minimize="latency")
    own.groups = {"large": "learned", "two": "learned"}
    scheme = {"kind": "weight_only", "weight_bits": 4, "group_size": 32}
    rows = {name: P.WeightOnly.model_validate(scheme | {"rounding": how}) for name, how in TWINS.items()}
    made = own.made
    own.made = lambda: [Candidate(one.name, rows.get(one.name), one.group) for one in made()]

    def timed(variants: dict[str, str], seconds: float) -> dict[str, Timing]:
        slow = ("eight", "fp32")
        return {name: Timing(7.0 if name in slow else 4.0, 1.0, 1.0, 9) for name in (*variants, "fp32")}

    own.judge.timed = timed
    said = verdicts_of(search(own))
    assert said["large"] == "computes as eight does, which is not 5 % faster than fp32"
    assert said["two"].startswith("not 5 % faster")


def test_a_busy_timing_rules_no_rounding_of_its_scheme_out(shop: Any) -> None:
    own = shop({}, minimize="latency")
    own.groups = {"large": "learned"}
    scheme = {"kind": "weight_only", "weight_bits": 4, "group_size": 32}
    rows = {name: P.WeightOnly.model_validate(scheme | {"rounding": how}) for name, how in TWINS.items()}
    made = own.made
    own.made = lambda: [Candidate(one.name, rows.get(one.name), one.group) for one in made()]

    def timed(variants: dict[str, str], seconds: float) -> dict[str, Timing]:
        return {
            name: Timing(7.0 if name == "fp32" else 8.0, 1.0, 1.0, 9, busy=name == "eight")
            for name in (*variants, "fp32")
        }

    own.judge.timed = timed
    found = search(own)
    said = verdicts_of(found)
    assert said["eight"] == "the machine was busy while it was timed" and found.busy == ["eight"]
    assert "eight: the machine was busy" in found.ended
    assert said["large"] == said["four"] == "not 5 % faster than fp32"


def test_a_limit_on_latency_times_each_candidate_by_itself(shop: Any) -> None:
    own, alone = shop({}, max_latency_ms=5.0), list[list[str]]()

    def timed(variants: dict[str, str], seconds: float) -> dict[str, Timing]:
        alone.append(list(variants))
        return {name: Timing(7.0 if name in ("two", "three") else 4.0, 1.0, 1.0, 9) for name in (*variants, "fp32")}

    own.judge.timed = timed
    found = search(own)
    assert all(len(names) == 1 for names in alone) and found.best.name == "four"
    assert verdicts_of(found)["two"] == "7 is beyond max_latency_ms, 5"


def test_limits_and_minutes_hold(shop: Any) -> None:
    found = search(shop({}, max_size_mb=2.5, max_tbops=0.9))
    assert found.best.name == "two"
    assert verdicts_of(found)["float"] == "4 is beyond max_size_mb, 2.5"
    assert verdicts_of(found)["four"] == "1 is beyond max_tbops, 0.9"
    found = search(shop({}, minutes=0.5))
    assert (
        found.best.name == "eight"
        and verdicts_of(found)["large"] == found.ended == "not begun: the 0.5 minutes were over"
    )


def test_rows_are_tried_from_cheap_to_dear_and_the_others_named(project: Project) -> None:
    project.edit("methods.int4_gptq", {"kind": "weight_only", "weight_bits": 4, "group_size": 32, "rounding": "gptq"})
    project.edit("methods.int4_brecq", {"kind": "weight_only", "weight_bits": 4, "rounding": "brecq"})
    params = load_params()
    project.edit("methods.int3_gptq", {"kind": "weight_only", "weight_bits": 3, "rounding": "gptq"})
    params = load_params()
    found, left = candidates(params, P.Goal(max_drop=1.0))
    assert re.search(r"its 3 bits in more: int4_\w+ is as small", left["int3_gptq"])
    project.edit("methods.int3_gptq.group_size", 8)
    assert "int3_gptq" not in candidates(load_params(), P.Goal(max_drop=1.0))[1]  # no row of four bits has these groups
    groups = {candidate.name: candidate.group for candidate in found}
    assert groups["int8_static"] == "quick" and groups["int4_brecq"] == "learned"
    assert left["qat_int8"] == "trains, and goal.may_train is false" and "outlier" in left["clip_int8"]
    assert "budget" in left["mixed_budget"] and not set(groups) & set(left)
    between = [candidate.row for candidate in found if candidate.name.startswith("int4_gptq_share_")]
    assert [row.fragile_share for row in between] == list(SHARES) and not any(row.fragile_between for row in between)
    assert next(one.row for one in found if one.name == "int4_gptq_uniform").fragile_bits is None
    channel = next(one.row for one in found if one.name == "int4_gptq_channel_uniform")
    assert channel.fragile_bits is channel.group_size is None
    found, left = candidates(params, P.Goal(max_drop=1.0, may_train=True, minimize="latency"))
    assert {c.group for c in found if c.name.startswith("qat_")} == {"trained"} and not any(
        "_share_" in c.name for c in found
    )


@pytest.mark.parametrize("minimize", ["size", "bit_operations"])
def test_a_bound_is_below_what_a_variant_has(minimize: Any) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 5)
    ).eval()
    images = torch.randn(8, 3, 8, 8)
    calibration, goal = Calibration(network, [images]), P.Goal(max_drop=1.0, minimize=minimize)
    _, macs = count_macs(network, tuple(images.shape[1:]))  # type: ignore[arg-type]
    for row in (P.WeightOnly(kind="weight_only", weight_bits=4, group_size=32), P.Static(kind="static", weight_bits=8)):
        variant = quantize(network, calibration, row)
        layers = quantized_layers(variant.network).values()
        size = sum(layer.packed.nbytes + layer.weight_scale.nbytes for layer in layers) / 1e6
        has = size if minimize == "size" else tera_bit_operations(macs, layer_bits(variant))
        assert 0.7 * has < least_objective(row, goal, calibration.replaceable, macs) <= has


def test_images_that_judge_do_not_train(project: Project) -> None:
    study = load_params().study("tiny")
    labels = torch.arange(800) % 10
    split = Split(labels, tuple("abcdefghij"), study.data.preprocessing, images=torch.arange(800)[:, None, None, None])
    goal = P.Goal(max_drop=10.0)
    judging, rest = drawn(study, goal, "tiny", split)
    ids, others = (set(part.images.flatten().tolist()) for part in (judging, rest))  # type: ignore[union-attr]
    trained, held_out = validation_indices(labels, 0.1, study.seed)
    assert ids == set(held_out.tolist()) and others == set(trained.tolist())
    assert judging.images.flatten().tolist() != sorted(ids)  # type: ignore[union-attr]
    needed = images_needed(1.0, error_of("quick", P.Goal(max_drop=1.0)))
    with pytest.raises(
        UserError, match=rf"max_drop: 1 points take {needed} validation images to prove, and .* keeps 80"
    ):
        drawn(study, P.Goal(max_drop=1.0), "tiny", split)


def test_the_images_that_are_needed_are_those_on_which_no_difference_is_accepted() -> None:
    needed = images_needed(2.0, 0.05)
    for images, verdict in ((needed, "accepted"), (needed - 1, "undecided")):
        test = PairedTest(2.0, images, 0.05)
        while not test.verdict:
            number = test.ends[test.ends.index(test.seen) + 1 if test.seen else 0] - test.seen
            test.look([True] * number, [True] * number)
        assert test.verdict == verdict


def test_what_takes_a_minute_is_made_last_and_the_smallest_of_it_first() -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 5)).eval()
    calibration = Calibration(network, [torch.randn(4, 3, 8, 8)])
    shop: Any = SimpleNamespace(goal=P.Goal(max_drop=1.0), calibration=calibration, macs={})
    rows: dict[str, Any] = {
        "large": P.WeightOnly(kind="weight_only", weight_bits=8, rounding="gptq"),
        "small": P.WeightOnly(kind="weight_only", weight_bits=4, rounding="gptq"),
        "quick": P.WeightOnly(kind="weight_only", weight_bits=8),
    }
    order = sorted(rows, key=lambda name: _urgency(shop, Candidate(name, rows[name], "quick")))
    assert order == ["quick", "small", "large"]


def test_methods_that_no_number_of_images_could_prove_are_not_begun() -> None:
    goal = P.Goal(max_drop=5.0, may_train=True)
    assert provable("quick", goal, 9, 10) == 9
    for group in ("learned", "trained"):
        counts = [provable(group, goal, 6, images) for images in (10, 126, 170, 1000)]
        assert counts == sorted(counts) and counts[0] == 0 < counts[2] < counts[3] == 6
        for images, count in zip((126, 170), counts[1:3], strict=True):
            needed = [
                images_needed(goal.max_drop, error_of(group, goal, tried)) for tried in (count, count + 1) if tried
            ]
            assert needed[-1] > images and (not count or needed[0] <= images)


def test_too_few_images_leave_out_learned_methods_and_say_so(shop: Any) -> None:
    own = shop({}, max_drop=0.5)
    own.groups = {"large": "learned"}
    own.judge.images = range(1000)
    found = search(own)
    assert "validation images can prove the goal for 0 learned methods only" in verdicts_of(found)["large"]
