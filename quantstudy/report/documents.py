"""Fill the generated places of README.md and the pages of `docs/`: tables and pictures of the committed reports.

A page marks a place with `<!-- <kind>: <study> -->` and `<!-- end -->`. The text between is replaced, so no number
there is typed by hand. The kinds are

- `results`: the study's result table;
- `decision`: for each line `<what a user wants> = <variant>` of the mark, what that variant costs and gains;
- `peers`: the comparison with other tools (`benchmarks/peers.py`);
- `ablation`: what each technique adds (`benchmarks/ablation.py`);
- `front`: accuracy against size for budgets of bits (`benchmarks/budget_front.py`);
- `low_bits`: what each scheme costs, over several draws of calibration images (`benchmarks/low_bits.py`);
- `reliability`: how often tests tried to break runs, params or files, and what happened (`tests/harness`).

If names of variants, tools or schemes follow the study, the table keeps only the rows that begin with one of them.
A line under a table says if its fp32 model is not the one of the study's result table.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantstudy import layout
from quantstudy.errors import UserError, unknown
from quantstudy.report.markdown import NOTHING, markdown_table, number, p_value, signed

README, DOCS = Path("README.md"), Path("docs")
KINDS = "results|decision|peers|ablation|front|low_bits|reliability"
PLACE = re.compile(rf"(<!-- ({KINDS}): (\w+)((?: \w+)*|(?:\n[^\n]+ = \w+)+\n) ?-->\n).*?(<!-- end -->)", re.DOTALL)
MARK = re.compile(rf"^<!-- ({KINDS}):", re.MULTILINE)
COMMANDS = {
    "results": "dvc repro",
    "decision": "dvc repro",
    "peers": "make peers",
    "ablation": "python -m benchmarks.ablation",
    "front": "make front",
    "low_bits": "python -m benchmarks.low_bits",
    "reliability": "python -m tests.harness.runs, .params and .files",
}
"""The command that writes the files of each kind."""
STATED: dict[str, tuple[Callable[[str], Path], Callable[[Any], list[float]]]] = {
    "ablation": (
        lambda study: layout.report(study) / "ablation.json",
        lambda rows: [row["top1"] + row["top1_drop"] for row in rows],
    ),
    "front": (
        lambda study: layout.budget_front(study, "json"),
        lambda found: [row["top1"] for row in found["rows"] if row["series"] == "fp32"],
    ),
    "low_bits": (
        lambda study: layout.low_bits(study, "json"),
        lambda rows: [row["fp32_top1"] for row in rows if "fp32_top1" in row],
    ),
}
"""By kind, a study's JSON report and the top-1 of fp32 that it states."""

Read = Callable[[Path], str]


def read_utf8(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")


def pages() -> list[Path]:
    """Return README.md and every page of `docs/`, relative to the project's root."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def filled(page: Path, text: str, read: Read = read_utf8) -> str:
    """Return the text of a page with every marked place filled from the reports.

    Raises:
        UserError: a report is missing or lacks a key, or its table has no row with one of the names.
    """

    def place(found: re.Match[str]) -> str:
        start, kind, study, names, end = found.groups()
        try:
            if kind == "decision":
                return f"{start}{decision(study, names.strip().splitlines(), read)}{end}"
            return f"{start}{content(kind, study, names.split(), page, read)}{other_fp32(kind, study, read)}{end}"
        except KeyError as error:
            line = f"the {kind} of {study} has no key {error}; run `{COMMANDS[kind]}` again"
            raise UserError(f"{page}: {line}") from None
        except FileNotFoundError as error:
            raise UserError(f"{page}: no file {error.filename}; run `{COMMANDS[kind]}` first") from None

    if len(PLACE.findall(text)) != (marks := len(MARK.findall(text))):
        raise UserError(f"{page}: one of {marks} marks is not `<!-- kind: study names -->`, or has no <!-- end -->")
    return PLACE.sub(place, text)


def content(kind: str, study: str, names: Sequence[str], page: Path, read: Read) -> str:
    """Return the Markdown text of a marked place."""
    if kind == "front":
        return front(study, page, read)
    if kind == "reliability":
        return reliability(json.loads(read(layout.reliability(study))))
    place = {"peers": layout.peers(study, "md"), "low_bits": layout.low_bits(study, "md")}.get(kind)
    table = read(place or layout.report(study) / f"{kind}.md")
    return with_rows(table, names, f"{page}, {kind} of {study}") if names else table


def other_fp32(kind: str, study: str, read: Read) -> str:
    """Return a line for a table whose fp32 model has another top-1 than the study's metrics; else nothing."""
    if kind not in STATED:
        return ""
    file_of, stated_in = STATED[kind]
    file, metrics = file_of(study), layout.metrics(study, "fp32")
    if not (metrics.is_file() and file.is_file()):
        return ""
    own = json.loads(read(metrics))["top1"]
    stated = stated_in(json.loads(read(file)))
    other = dict.fromkeys(f"{top1:.2f}" for top1 in stated if not math.isclose(top1, own))
    line = f"\nAnother fp32 model than in the table of variants: {', '.join(other)} and {own:.2f} % top-1.\n"
    return line if other else ""


def with_rows(table: str, wanted: Sequence[str], where: str) -> str:
    """Return a table and the text under it, with only the rows whose first word is one of `wanted`.

    A remark that names rows in brackets, `(fp16, bf16)`, is left out if none of them is wanted.
    """
    lines = table.splitlines(keepends=True)
    names = {line: line.strip("| ").split(" ", 1)[0] for line in lines[2:] if line.startswith("|")}
    for name in wanted:
        if name not in names.values():
            raise unknown(where, name, list(dict.fromkeys(names.values())))
    kept = "".join(line for line in lines if line not in names or names[line] in wanted)

    def remark(found: re.Match[str]) -> str:
        about = {name for inside in re.findall(r"\(([\w, ]+)\)", found[0]) for name in inside.split(", ")}
        about &= {*names.values()}
        return found[0] if not about or about & {*wanted} else ""

    return re.sub(r"\n[^|\n]+\n", remark, kept)


def decision(study: str, wishes: Sequence[str], read: Read) -> str:
    """Return a table of what the user wants, the variant that gives it, and the variant's figures.

    `wishes` are lines `<what is wanted> = <variant>`.
    """
    rows = []
    for wish in wishes:
        wanted, _, variant = wish.rpartition(" = ")
        found = json.loads(read(layout.metrics(study, variant)))
        speedups = [found[f"speedup_b{batch}"] for batch in (1, 16)]
        faster = NOTHING if None in speedups else " / ".join(number(speedup, 2) for speedup in speedups)
        drop = f"{signed(found['top1_drop'])} ({p_value(found['top1_drop_p'])})"
        rows.append([wanted, f"`{variant}`", drop, number(found["compression"], 1), faster])
    header = ("You want", "Method", "drop (p)", "× smaller", "speed-up, batch 1 / 16")  # noqa: RUF001
    return markdown_table([header, *rows], words=2)


def front(study: str, page: Path, read: Read) -> str:
    """Return the picture of a study's front, and a table that compares choices of bits at the same size."""
    picture = layout.budget_front(study, "png")
    if not picture.is_file():
        raise FileNotFoundError(2, "no such file", str(picture))
    rows = []
    for own in json.loads(read(layout.budget_front(study, "json")))["comparison"]:
        rows.append([f"mixed_budget, {own['label']}", *_numbers(own), "", ""])
        for row in own["against"]:
            against = (signed(row["top1_less"]), p_value(row["p"]))
            rows.append([f"{row['series']}, {row['label']}", *_numbers(row), *against])
    image = f"![{study}: accuracy against size for budgets of bits]({os.path.relpath(picture, page.parent)})"
    header = ("bits chosen by", "MB", "bits a weight", "top-1 %", "mixed_budget has more", "p")
    return f"{image}\n\n{markdown_table([header, *rows], words=1)}"


def reliability(found: dict[str, Any]) -> str:
    """Return the counts of a harness as a table, and under it the machine that ran it."""
    rows = [[what, str(count)] for what, count in found["counts"].items()]
    return f"{markdown_table([('what', 'how often'), *rows], words=1)}\n{found['machine']}.\n"


def _numbers(row: dict[str, float]) -> list[str]:
    return [f"{row[key]:.2f}" for key in ("size_mb", "mean_bits", "top1")]
