"""The methods that a search tries, from cheap to expensive.

- `quick`: the rows of `methods` that take seconds. Between them the search adds rows with the same techniques, whose
  layers get other bits by the integer program of `methods.allocation`: a uniform row with another `fragile_share`.
- `learned`: the rows that learn their rounding from calibration images, which takes minutes.
- `trained`: the rows that train.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantstudy import params as P
from quantstudy.measure.sequential import images_needed
from quantstudy.methods.fragile import LOW_BITS
from quantstudy.network.graph import out_channels_first
from quantstudy.quantization.schemes import WeightScheme

Group = Literal["quick", "learned", "trained"]
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""How much larger than in uniform bits the weights of a row between two others may be."""
FLOAT_BITS = 32
STORED_BITS = 4, 8
"""The widths of integer weights that an ONNX file stores as they are."""
SPENT_ON: dict[Group, float] = {"quick": 2.0, "learned": 1.0, "trained": 2.0}
"""How the groups that may be tried share the allowed error."""


STARTS = 3
"""This many of the quick tests bring an equal part of the error that all of them are allowed."""


@dataclass(frozen=True)
class Candidate:
    """A method to try; `row` is a row of params.yaml, or a row between two of them."""

    name: str
    row: Any
    group: Group


@dataclass
class Trial:
    """What is known of one candidate."""

    name: str
    group: str
    size_mb: float | None = None
    """Of the ONNX file that would be shipped."""
    tbops: float | None = None
    latency_ms: float | None = None
    fp32_latency_ms: float | None = None
    """Of fp32, timed in turns with the candidate and, to minimize latency, with all others of the group."""
    busy: bool = False
    """Whether the timing cannot be trusted."""
    agreement: dict[str, Any] | None = None
    """Of the ONNX file with eager PyTorch, on calibration images."""
    divergence: float | None = None
    """Of the predictions from fp32's on calibration images, in nats."""
    seconds: float = 0.0
    """The time to make, measure and test the candidate."""
    verdict: str = ""
    """Accepted, rejected or undecided; or why it was not tested."""
    drop: float | None = None
    """On the validation images that were looked at, in percentage points."""
    images: int = 0

    def of(self, minimize: str) -> float:
        """Return the minimized value: MB, 10^12 bit-operations, or milliseconds, which compare within a group only."""
        found = {"size": self.size_mb, "bit_operations": self.tbops, "latency": self.latency_ms}[minimize]
        assert found is not None
        return found


def candidates(params: P.Params, goal: P.Goal) -> tuple[list[Candidate], dict[str, str]]:
    """Return the methods to try, in the order of the params, and by name why each other method is left out."""
    found, left = list[Candidate](), dict[str, str]()
    for name, row in params.methods.items():
        if row.needs_sensitivity:
            left[name] = "its budget is given; a search finds bits by layer itself"
        elif row.clips:
            left[name] = "a row of the outlier study"
        elif row.trains and not goal.may_train:
            left[name] = "trains, and goal.may_train is false"
        elif goal.minimize == "size" and (wider := _as_small(row, params)):
            left[name] = f"an ONNX file stores its {row.weight_bits} bits in more: {wider} is as small"  # type: ignore[union-attr]
        else:
            found.append(Candidate(name, row, group_of(row)))
    if goal.minimize != "latency":  # no runtime is faster with other weight bits
        between = [one for candidate in found for one in _between(candidate, goal.minimize)]
        found += [one for one in between if one.name not in params.methods]
    return found, left


def _as_small(row: Any, params: P.Params) -> str | None:
    """Return a row of more bits that an ONNX file stores in the same bits as this row; None if there is none."""
    bits = getattr(row, "weight_bits", 8)
    stored = next((width for width in STORED_BITS if width >= bits), bits)
    if bits == stored:
        return None
    alike = {"weight_bits": stored, "group_size": row.group_size}
    found = (name for name, other in params.methods.items() if not other.trains or row.trains)
    return next((name for name in found if alike.items() <= scheme_of(params.methods[name]).items()), None)


def error_of(group: Group, goal: P.Goal, members: int = 1) -> float:
    """Return how often the tests of the quick group, or one test of another, may be wrong.

    The order of the quick candidates depends on no validation image, so all their tests together spend the group's
    share, in the way that `search` says. In the other groups, earlier acceptances decide which `members` are tested, so
    each test may spend only an equal part.
    """
    tried = [other for other in SPENT_ON if other != "trained" or goal.may_train]
    share = SPENT_ON[group] / sum(SPENT_ON[other] for other in tried)
    return (1 - goal.confidence) * share / (1 if group == "quick" else members)


def provable(group: Group, goal: P.Goal, members: int, images: int) -> int:
    """Return how many of a group's `members` may be tried, so that `images` can still prove the goal for each."""
    if group == "quick":
        return members
    known = range(members, 0, -1)
    return next((count for count in known if images_needed(goal.max_drop, error_of(group, goal, count)) <= images), 0)


def starts_of(goal: P.Goal, error: float, images: int, tests: int = STARTS) -> int:
    """Return how many quick tests bring a part of the error: a part with which `images` can still prove the goal."""
    known = range(min(STARTS, tests), 1, -1)
    return next((number for number in known if images_needed(goal.max_drop, error / number) <= images), 1)


def group_of(row: Any) -> Group:
    """Return the group of a method, by how much work it is."""
    if row.trains:
        return "trained"
    return "learned" if _learns(row) else "quick"


def _learns(row: Any) -> bool:
    return getattr(row, "finetune", False) or getattr(row, "rounding", "") in ("adaround", "brecq")


def _between(candidate: Candidate, minimize: str) -> Iterator[Candidate]:
    """Yield the rows between a row of few bits, rounded by GPTQ, and the next width.

    If the goal minimizes the size of an ONNX file, only weight-only rows of four bits qualify, and their layers get
    four or eight bits. The file stores these widths as they are, and integer activations make nothing smaller. Then
    there are also rows with one scale a channel, which are smaller than rows with a scale a group.
    """
    row = candidate.row
    if candidate.group != "quick" or not isinstance(row, P.Scheme) or row.rounding != "gptq":
        return
    if row.weight_bits > LOW_BITS or row.fragile_bits is None:
        return
    if minimize == "size" and (row.weight_bits < LOW_BITS or not isinstance(row, P.WeightOnly)):
        return
    rows = {candidate.name: row}
    if minimize == "size" and row.group_size is not None:
        rows[f"{candidate.name}_channel"] = row.model_copy(update={"group_size": None})
    for name, start in rows.items():
        yield Candidate(f"{name}_uniform", start.model_copy(update={"fragile_bits": None}), "quick")
        for share in SHARES if start is row else SHARES[:3]:
            changes = {"fragile_share": share, "fragile_between": minimize != "size"}
            yield Candidate(f"{name}_share_{round(100 * share)}", start.model_copy(update=changes), "quick")


def scheme_of(row: Any) -> dict[str, Any]:
    """Return the widths and groups of a row, without its rounding; nothing if the row has no uniform scheme."""
    widths = ("group_size", "weight_bits", "activation_bits", "edge_bits", "attention_products")
    keys = (*widths, "fragile_bits", "fragile_share", "fragile_between", "fragile_operations")
    return {key: getattr(row, key, None) for key in keys} if isinstance(row, P.Scheme) and not row.is_mixed else {}


def _gives_bits(row: Any) -> bool:
    """Return whether some layers of a row of few bits may get fewer, so that others get more."""
    return row.fragile_bits is not None and row.fragile_between


def least_objective(row: Any, goal: P.Goal, layers: Mapping[str, Any], macs: Mapping[str, int]) -> float:
    """Return a lower bound of what the goal minimizes for `row`: MB, or 10^12 bit-operations; 0 if unknown."""
    if not isinstance(row, P.Scheme) or row.is_mixed or goal.minimize == "latency":
        return 0.0
    bits = row.weight_bits if row.weight_bits > LOW_BITS else max(2, row.weight_bits - _gives_bits(row))
    if goal.minimize == "size":
        scheme = WeightScheme(bits, row.group_size)
        shapes = (out_channels_first(layer, layer.weight).shape for layer in layers.values())
        return sum(scheme.layout(shape).nbytes for shape in shapes) / 1e6
    activation = getattr(row, "activation_bits", FLOAT_BITS)
    return math.fsum(macs[name] * bits * activation for name in layers) / 1e12
