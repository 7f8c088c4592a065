"""Checks that compare several sections of the params.

They read the file's raw content, not validated sections, so that all mistakes are found at once. A value of a wrong
type is passed over here; the sections' own classes find it.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from quantstudy.errors import shown, unknown
from quantstudy.params.methods import METHOD_ROWS, MethodRow, QatWithScales

T = TypeVar("T")
TAKEN = {"methods": ("fp32", "finetune"), "studies": ("external", "pages", "peers")}
"""Names that no row may have: the fp32 model and its curve have them, and folders next to the studies' folders."""


def at(raw: Any, kind: type[T], *keys: str) -> T:
    """Return the value below `keys` if its type is `kind`, else an empty value of that type."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, kind) else kind()


def names_at(raw: Any, *keys: str) -> list[str]:
    """Return the texts of a list, or the keys of a mapping, below `keys`."""
    found = [*at(raw, list, *keys), *at(raw, dict, *keys)]
    return [name for name in found if isinstance(name, str)]


def section_mistakes(raw: dict[str, Any]) -> list[str]:
    """Return a line for each list, name or number in a params.yaml's content that contradicts another section."""
    rows = {name: METHOD_ROWS.get(at(raw, str, "methods", name, "kind")) for name in names_at(raw, "methods")}
    found = [
        f"{section}.{name}: this name is taken; choose another"
        for section, names in TAKEN.items()
        for name in names
        if name in names_at(raw, section)
    ]
    found += _list_mistakes(raw, rows)
    learned = [name for name, row in rows.items() if row is None or issubclass(row, QatWithScales)]
    for study in names_at(raw, "studies"):
        wrong = set(names_at(raw, "studies", study, "qat", "methods")) - set(learned)
        found += [str(unknown(f"studies.{study}.qat.methods", name, learned)) for name in sorted(wrong)]
    percentiles = at(raw, list, "outliers", "percentiles")
    for name in rows:
        key = ("methods", name, "clip_percentile")
        percentile = at(raw, float, *key) or at(raw, int, *key)
        if percentile and percentiles and percentile not in percentiles:
            choices = f"choose one of {', '.join(map(shown, percentiles[:20]))} or add it"
            found.append(f"{'.'.join(key)}: {shown(percentile)} is not in outliers.percentiles; {choices}")
    return found


def _list_mistakes(raw: dict[str, Any], rows: dict[str, type[MethodRow] | None]) -> Iterator[str]:
    """Yield a line for each wrong list of names; `rows` has the class of each method, None where its kind is wrong."""
    run, ptq, qat = (names_at(raw, key) for key in ("run", "ptq", "qat"))
    budget, trained = names_at(raw, "budget", "methods"), [m for m, row in rows.items() if row is None or row.trains]
    measured = [m for m, row in rows.items() if row is None or row.needs_sensitivity]
    plain = [m for m, row in rows.items() if row is None or not (row.trains or row.needs_sensitivity)]
    variants = ("ptq, budget.methods or qat", ["fp32", *ptq, *budget, *qat])
    for key, (origin, choices) in {
        "run": ("", names_at(raw, "studies")),
        "ship": ("run", run),
        "ptq": ("", plain),
        "budget.studies": ("run", run),
        "budget.methods": ("", measured),
        "qat": ("", trained),
        "export.ptq": ("ptq", ptq),
        "export.budget": ("budget.methods", budget),
        "export.qat": ("qat", qat),
        "scaling_law.ptq": variants,
        "scaling_law.qat": variants,
    }.items():
        names = names_at(raw, *key.split("."))
        known = [*rows, *names_at(raw, "studies")] if origin else []
        if absent := [name for name in names if name in known and name not in choices]:
            yield f"{key}: not in {origin}: {', '.join(absent)}; remove what is here or add it there"
        yield from (str(unknown(key, name, choices)) for name in names if name not in [*choices, *absent])
        if len(set(names)) < len(names):
            yield f"{key}: {shown(names)} lists a name twice"
    if raw.get("run") == []:
        yield f"run: [] is empty; list one or more of {', '.join(names_at(raw, 'studies'))}"
    for study in names_at(raw, "ship"):
        if study in run and not at(raw, dict, "studies", study, "goal"):
            yield f"ship: {study} has no studies.{study}.goal; write one, goal: {{max_drop: 1.0}} for example"
    unmeasured = [study for study in run if study not in names_at(raw, "budget", "studies")]
    if budget and unmeasured:
        yield f"budget.studies: {', '.join(unmeasured)} is missing; budget.methods run in every study of run"
