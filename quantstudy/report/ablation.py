"""The table of `benchmarks/ablation.py`: what each technique adds to rounding to nearest, scheme by scheme."""

from collections.abc import Sequence
from typing import Any

from quantstudy.report.markdown import markdown_table, p_value, signed

_HEADER = ("scheme", "techniques", "drop", "top-1 %", "seeds", "images", "p, row above", "bits", "MB", "s")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of an ablation as a Markdown table, with drops in percentage points against fp32.

    A row that adds techniques to those of the row above names only the added ones. If it adds exactly one, p is shown.
    """
    cells = []
    above: tuple[str, list[str]] = ("", [])
    for row in rows:
        names = row["techniques"]
        same = len(above[1]) if above == (row["scheme"], names[: len(above[1])]) else 0
        above = (row["scheme"], names)
        added = "+ " * (same > 0) + " + ".join(names[same:])
        spread = "" if row["top1_drop_std"] is None else f" ± {row['top1_drop_std']:.2f}"
        accuracy = (signed(row["top1_drop"]) + spread, f"{row['top1']:.2f} ± {row['top1_ci95']:.2f}")
        p = row["p_above"] if same and len(names) == same + 1 else None
        drawn = (str(row["seeds"]), str(row["images"]), "" if p is None else p_value(p))
        cost = (f"{row['mean_bits']:.2f}", f"{row['size_mb']:.2f}", f"{row['seconds']:.0f}")
        cells.append((row["scheme"], added, *accuracy, *drawn, *cost))
    return markdown_table([_HEADER, *cells], words=2)
