"""What the sections of the params must have in common."""

from typing import TYPE_CHECKING

from quantstudy.errors import UserError, unknown
from quantstudy.params.methods import QatWithScales

if TYPE_CHECKING:
    from quantstudy.params.project import Params

TAKEN = ("fp32", "finetune")
"""What no method may be called: the fp32 model and its curve are."""


def check_sections(params: "Params") -> None:
    """Raise `UserError`, one line, for the first list, name or number that does not go with another section."""
    lowered: dict[str, str] = {}
    for name in params.studies:
        other = lowered.setdefault(name.lower(), name)
        if other != name:
            raise UserError(f"studies: {other!r} and {name!r} differ only in case; rename one")
    for name in TAKEN:
        if name in params.methods:
            raise UserError(f"methods.{name}: this name is taken; choose another")
    _check_lists(params)
    learned = [name for name, row in params.methods.items() if isinstance(row, QatWithScales)]
    for study, row in params.studies.items():
        for name in row.qat.methods:
            if name not in learned:
                raise unknown(f"studies.{study}.qat.methods", name, learned)
    listed = params.outliers.percentiles
    for name, method in params.methods.items():
        percentile = getattr(method, "clip_percentile", None)
        if percentile is not None and percentile not in listed:
            choices = ", ".join(map(str, listed))
            key = f"methods.{name}.clip_percentile"
            raise UserError(f"{key}: {percentile} is not in outliers.percentiles; choose one of {choices} or add it")
    unmeasured = [study for study in params.run if study not in params.budget.studies]
    if params.budget.methods and unmeasured:
        raise UserError(f"budget.studies: {', '.join(unmeasured)} is missing; budget.methods run in every study of run")


def _check_lists(params: "Params") -> None:
    rows = params.methods.items()
    for key, names, choices in (
        ("run", params.run, list(params.studies)),
        ("ptq", params.ptq, [m for m, row in rows if not row.trains and not row.needs_sensitivity]),
        ("budget.studies", params.budget.studies, params.run),
        ("budget.methods", params.budget.methods, [m for m, row in rows if row.needs_sensitivity]),
        ("qat", params.qat, [m for m, row in rows if row.trains]),
        ("export.ptq", params.export.ptq, params.ptq),
        ("export.budget", params.export.budget, params.budget.methods),
        ("export.qat", params.export.qat, params.qat),
        ("scaling_law.ptq", params.scaling_law.ptq, params.variants),
        ("scaling_law.qat", params.scaling_law.qat, params.variants),
    ):
        if not names and not key.startswith(("export", "budget")):
            raise UserError(f"{key}: [] is empty; list one or more of {', '.join(choices)}")
        for name in names:
            if name not in choices:
                raise unknown(key, name, choices)
        if len(set(names)) < len(names):
            raise UserError(f"{key}: {names} lists a name twice")
