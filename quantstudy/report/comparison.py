"""Two revisions side by side: which variants moved by more than chance.

If both revisions kept a variant's predictions on the same test images, an exact McNemar test asks whether the two are
equally accurate. Benjamini and Hochberg's procedure (*Controlling the False Discovery Rate*, JRSS B 57 (1995)) then
decides over all tested variants: 5 % of those called moved are expected to be chance. Otherwise a variant has moved if
the two 95 % intervals do not overlap. This misses small differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantstudy.errors import UserError
from quantstudy.measure.statistics import mcnemar_exact_p
from quantstudy.report.markdown import NOTHING, latency, markdown_table, p_value, signed
from quantstudy.report.revisions import Revision

FALSE_DISCOVERIES = 0.05
"""The expected share of false alarms among the variants called moved."""
MEASURED = ("top1", "size_mb", "latency_ms_b1", "latency_ms_b16")
"""The metrics that are shown for both sides."""
Metrics = dict[str, Any]
Verdict = Literal["better", "worse", "same", "only before", "only after"]


@dataclass(frozen=True)
class Row:
    """A variant before and after; `p` is McNemar's, or None if the intervals decide."""

    study: str
    variant: str
    before: Metrics | None
    after: Metrics | None
    p: float | None = None
    verdict: Verdict = "same"


def compare(before: Revision, after: Revision) -> list[Row]:
    """Return a row for each variant of either revision, in the order of their params.

    Raises:
        UserError: the revisions have no variant with metrics in common.
    """
    labels: dict[str, Any] = {study: _same_labels(before, after, study) for study in after.params["run"]}
    rows = []
    for study, variant in dict.fromkeys([*after.variants, *before.variants]):
        old, new = before.metrics(study, variant), after.metrics(study, variant)
        if old or new:
            p = _p(before, after, study, variant, labels.get(study)) if old and new else None
            rows.append(Row(study, variant, old, new, p))
    if not any(row.before and row.after for row in rows):
        raise UserError(f"{before.name!r} and {after.name!r} have no variant in common whose metrics are kept")
    return _judged(rows)


def _same_labels(before: Revision, after: Revision, study: str) -> Any:
    """Return the labels of a study's test split if both revisions have the same one, else None."""
    checksum = after.test_md5(study)
    return after.test_labels(study) if checksum is not None and before.test_md5(study) == checksum else None


def _p(before: Revision, after: Revision, study: str, variant: str, labels: Any) -> float | None:
    """Return McNemar's p-value; None unless both revisions have predictions on the images of `labels`."""
    if labels is None:
        return None
    old, new = before.predictions(study, variant), after.predictions(study, variant)
    if old is None or new is None:
        return None
    return mcnemar_exact_p(old == labels, new == labels)


def _judged(rows: Sequence[Row]) -> list[Row]:
    from scipy.stats import false_discovery_control

    tested = [row.p for row in rows if row.p is not None]
    adjusted = iter(false_discovery_control(tested) if tested else [])
    judged = []
    for row in rows:
        if row.before is None or row.after is None:
            judged.append(replace(row, verdict="only after" if row.before is None else "only before"))
            continue
        change, half = row.after["top1"] - row.before["top1"], row.after["top1_ci95"] + row.before["top1_ci95"]
        moved = abs(change) > half if row.p is None else next(adjusted) <= FALSE_DISCOVERIES
        judged.append(replace(row, verdict=("better" if change > 0 else "worse") if moved and change else "same"))
    return judged


def to_markdown(before: Revision, after: Revision, rows: Sequence[Row]) -> str:
    """Return the comparison for a pull request: a verdict, the params that differ, the variants that changed."""
    moved = [row for row in rows if row.verdict in ("better", "worse")]
    common = [row for row in rows if row.before and row.after]
    verdict = f"{len(moved)} of {len(common)} variants moved" + (": " if moved else ".")
    verdict += ", ".join(f"{row.study} {row.variant} {row.verdict}" for row in moved) + ("." if moved else "")
    parts = [f"### `{before.name}` → `{after.name}`", f"**{verdict}**"]
    if changes := changed_params(before.params_in_use, after.params_in_use):
        parts.append("\n".join(f"- `{key}`: {old} → {new}" for key, old, new in changes))
    shown = [row for row in rows if _differs(row)]
    if shown:
        header = ("study", "variant", "top-1 %", "change (p)", "size MB", "ms, batch 1", "ms, batch 16", "verdict")
        parts.append(markdown_table([header, *map(_cells, shown)], words=2).rstrip())
    if len(shown) < len(rows):
        parts.append(f"{len(rows) - len(shown)} variants have the same accuracy and size.")
    parts.append(_reading(common))
    return "\n\n".join(parts) + "\n"


def to_record(before: Revision, after: Revision, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison as plain JSON, for the HTML report."""

    def values(side: Metrics | None) -> Metrics | None:
        return side and {key: side[key] for key in (*MEASURED, "busy") if key in MEASURED or side.get(key)}

    return {
        "before": before.name,
        "after": after.name,
        "params": changed_params(before.params_in_use, after.params_in_use),
        "rows": [
            {"study": row.study, "variant": row.variant, "p": row.p, "verdict": row.verdict}
            | {"before": values(row.before), "after": values(row.after)}
            for row in rows
        ],
        "reading": _reading([row for row in rows if row.before and row.after]),
    }


def changed_params(before: Any, after: Any, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (key, old value, new value) of every param that differs; a dash stands for a missing param."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in dict.fromkeys([*before, *after]):
            old, new = before.get(key, NOTHING), after.get(key, NOTHING)
            found += changed_params(old, new, f"{prefix}.{key}".lstrip("."))
        return found
    return [] if before == after else [(prefix, _short(before), _short(after))]


def _short(value: Any) -> str:
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)


def _differs(row: Row) -> bool:
    if row.before is None or row.after is None or row.verdict != "same":
        return True
    return any(row.before[key] != row.after[key] for key in ("top1", "size_mb"))


def _cells(row: Row) -> tuple[str, ...]:
    change = NOTHING
    if row.before and row.after:
        change = signed(row.after["top1"] - row.before["top1"])
        change += "" if row.p is None else f" ({p_value(row.p)})"
    measured = [_both(row, key) for key in MEASURED]
    verdict = f"**{row.verdict}**" if row.verdict in ("better", "worse") else row.verdict
    return (row.study, row.variant, measured[0], change, *measured[1:], verdict)


def _both(row: Row, key: str) -> str:
    values = [NOTHING if side is None else latency(side[key], _busy(side, key)) for side in (row.before, row.after)]
    return values[0] if values[0] == values[1] else " → ".join(values)


def _busy(side: Metrics, key: str) -> bool:
    return any(key == f"latency_ms_b{size}" for size in side.get("busy", []))


def _reading(common: Sequence[Row]) -> str:
    tested = [row for row in common if row.p is not None]
    text = []
    if tested:
        images = sorted({int(row.after["images"]) for row in tested if row.after})
        text.append(
            f"p: exact McNemar test on the same {' or '.join(map(str, images))} test images; of the variants called "
            f"moved, {FALSE_DISCOVERIES:.0%} are expected to be by chance (Benjamini-Hochberg over {len(tested)})."
        )
    if len(tested) < len(common):
        text.append(
            f"{len(common) - len(tested)} variants have no predictions on the same images in both: they moved if "
            "their 95 % intervals do not overlap."
        )
    text.append("Timings are of each run's own machine and moment.")
    if any(side.get("busy") for row in common for side in (row.before, row.after) if side):
        text.append("One that is marked busy was taken beside other work and compares to none.")
    return " ".join(text)
