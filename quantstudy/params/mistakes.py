"""The first mistake in the params as one line: the key, the value and the choices."""

import re
from typing import Any

from pydantic import ValidationError

from quantstudy.errors import unknown
from quantstudy.params.methods import METHOD_ROWS
from quantstudy.params.section import Section
from quantstudy.params.studies import Study


def first_mistake(error: ValidationError, raw: dict[str, Any], whole: type[Section]) -> str:
    """Return one line about `raw`, which is no valid `whole`, the class of all params or of a part."""
    first = error.errors()[0]
    loc = _real_location(first["loc"], raw)
    key = ".".join(str(part) for part in loc) or "params.yaml"
    value = first["input"]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(loc[:-1], raw, whole)
        return str(unknown(key, loc[-1], owner.model_fields)).replace("is unknown", "is an unknown key")
    if kind == "missing":
        return f"{key}: missing; this key is required"
    if kind == "union_tag_invalid":
        tags = str(context["expected_tags"]).replace("'", "").split(", ")
        return str(unknown(f"{key}.kind", context["tag"], tags))
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; this key is required"
    if kind == "literal_error":
        return str(unknown(key, value, re.findall(r"'([^']*)'", str(context["expected"]))))
    if kind == "string_pattern_mismatch" and "[key]" in key:
        return _bad_name(str(value), raw)
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if message.startswith(str(value)) else f"{key}: {value!r}: {message}"


def _bad_name(value: str, raw: dict[str, Any]) -> str:
    for section in ("studies", "methods"):
        names = [str(name) for name in raw.get(section) or {}]
        twins = [name for name in names if name.lower() == value.lower() and name != value]
        if value in names and twins:
            return f"{section}: {twins[0]!r} and {value!r} differ only in case; rename one"
    return f"{value!r}: a study's or method's name is made of a-z, 0-9 and _ only"


def _real_location(loc: tuple[int | str, ...], raw: Any) -> list[int | str]:
    """Drop the union tags that pydantic puts into a location, which are not keys of the file."""
    kept: list[int | str] = []
    for index, part in enumerate(loc):
        is_tag = len(kept) == 2 and kept[0] == "methods" and index == 2
        if not is_tag:
            kept.append(part)
    return kept


def _model_at(loc: list[int | str], raw: dict[str, Any], whole: type[Section]) -> type[Section]:
    """Return the section that a location of the file belongs to."""
    if not loc:
        return whole
    if loc[0] == "methods":
        return METHOD_ROWS[raw["methods"][loc[1]]["kind"]]
    if loc[0] == "studies":
        return Study if len(loc) == 2 else _section(Study, str(loc[2]))
    return _section(whole, str(loc[0]))


def _section(owner: type[Section], key: str) -> type[Section]:
    section: Any = owner.model_fields[key].annotation
    return section
