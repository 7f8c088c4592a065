"""The HTML report: a template, a style sheet and scripts of `report/page/`, put into one file that needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import altair as alt
import vl_convert

from quantstudy.report.charts import SHAPES, specifications

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("dom", "recommend", "state", "table", "charts", "layers", "confusion", "comparison", "main")
"""The scripts, in the order in which they are joined; they share one scope."""


def build_page(studies: Sequence[dict[str, Any]], comparison: dict[str, Any] | None = None) -> str:
    """Return the whole page.

    `studies` has the result of `page_data` for each study, in the order of `run`. `comparison`, the result of
    `comparison.to_record`, shows what moved since another revision.
    """
    data = {"studies": list(studies), "charts": specifications(), "shapes": SHAPES, "comparison": comparison}
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    return Template(_read("page.html")).substitute(
        style=_read("style.css"),
        library=_inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)),
        script=_inline("\n".join(_read(f"{name}.js") for name in SCRIPTS)),
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Escape `</script` within a script: it would end the script early."""
    return script.replace("</script", "<\\/script")
