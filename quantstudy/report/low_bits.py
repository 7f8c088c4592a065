"""The table of `benchmarks/low_bits.py`: what each scheme costs, over several draws of calibration images."""

import statistics
from collections.abc import Sequence
from typing import Any

from quantstudy.report.markdown import markdown_table, signed

_HEADER = ("method", "bits a weight", "drop, points", "least to most", "SQNR, dB", "divergence", "same class, %", "s")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per method: the mean over its draws, and how far the draws lie apart.

    ± is the mean of the draws' half 95 % intervals. With several draws of few images the true one is narrower.
    """
    cells = []
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        draws = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        mean = {key: statistics.mean(row[key] for row in draws) for key in draws[0] if key not in ("method", "target")}
        drops = [row["drop"] for row in draws]
        cells.append(
            (
                method if target == "vnni" else f"{method}, {target}",
                f"{mean['weight_bits']:.2f}",
                f"{signed(mean['drop'])} ± {mean['drop_ci95']:.2f}",
                f"{signed(min(drops))} to {signed(max(drops))}" if len(drops) > 1 else "",
                f"{mean['sqnr_db']:.1f}",
                f"{mean['divergence']:.4f}",
                f"{mean['agreement']:.1f}",
                f"{mean['seconds']:.1f}",
            )
        )
    return markdown_table([_HEADER, *cells], words=1)
