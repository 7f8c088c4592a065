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
    place = first["loc"]
    loc = [part for index, part in enumerate(place) if index != 2 or place[0] != "methods"]  # there is a union's tag
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


def _model_at(loc: list[Any], raw: dict[str, Any], whole: type[Section]) -> Any:
    """Return the section that a location of the file belongs to."""
    if loc[:1] == ["methods"]:
        return METHOD_ROWS[raw["methods"][loc[1]]["kind"]]
    if loc[:1] == ["studies"]:
        whole, loc = Study, loc[2:]
    return whole.model_fields[loc[0]].annotation if loc else whole
