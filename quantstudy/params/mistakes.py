"""Mistakes in the params, one line each: the key, the value and the choices."""

import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from quantstudy.errors import UserError, cut, shown, unknown
from quantstudy.params.methods import METHOD_ROWS
from quantstudy.params.section import NAME, Section

MOST = 40
"""The most lines of an error."""


def refusal(lines: Sequence[str]) -> UserError:
    """Return the error that has a line for each mistake."""
    more = [f"and {len(lines) - MOST} more mistakes"] if len(lines) > MOST else []
    return UserError(*(cut(line) for line in lines[:MOST]), *more)


def mistakes(error: ValidationError, whole: type[Section]) -> list[str]:
    """Return a line for each mistake in `error`; `whole` is the class that failed, of all params or of a part."""
    return [_line(dict(each), whole) for each in error.errors(include_url=False)]


def _line(mistake: dict[str, Any], whole: type[Section]) -> str:
    place, value, kind, context = mistake["loc"], mistake["input"], mistake["type"], mistake.get("ctx", {})
    tagged = place[0] == "methods" and place[2:3] != ("[key]",)  # the third part is then the tag of a union
    key = ".".join(cut(str(part), 64) for index, part in enumerate(place) if index != 2 or not tagged)
    if kind == "extra_forbidden":
        return str(unknown(key, place[-1], _keys_at(place[:-1], whole))).replace("is unknown", "is an unknown key")
    if kind in ("missing", "union_tag_not_found"):
        return f"{key}{'.kind' * (kind != 'missing')}: missing; this key is required"
    if kind in ("union_tag_invalid", "literal_error"):
        tag, choices = "tag" in context, context.get("expected_tags") or context["expected"]
        names = choices.replace(" or ", ", ").replace("'", "").split(", ")
        return str(unknown(key + ".kind" * tag, context["tag"] if tag else value, names))
    if context.get("pattern") == NAME:
        return f"{key}: {shown(value)}: a study's or method's name is made of a-z, 0-9 and _ only"
    message = re.sub(r" or (instance of|object to) .*", "", mistake["msg"].removeprefix("Value error, "))
    message = message.replace("valid dictionary", "mapping of keys").replace("valid tuple", "list")
    return f"{key}: {message}" if message.startswith(shown(value)) else f"{key}: {shown(value)}: {message}"


def _keys_at(place: Sequence[Any], whole: Any) -> list[str]:
    """Return the keys that belong at a location of the file."""
    for part in place:
        if get_origin(whole) is dict:
            whole = get_args(whole)[1]
        elif isinstance(whole, type) and issubclass(whole, Section):
            whole = whole.model_fields[part].annotation
            if isinstance(whole, UnionType):  # an optional section
                whole = get_args(whole)[0]
        else:
            whole = METHOD_ROWS[part]
    return list(whole.model_fields)
