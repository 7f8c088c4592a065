"""The table of `benchmarks/low_bits.py` has one line a method, with the mean and the spread of its draws."""

from typing import Any

from quantstudy.report.low_bits import markdown


def row(method: str, draw: int, drop: float, target: str = "vnni") -> dict[str, Any]:
    measured = {"weight_bits": 4.5, "sqnr_db": 14.0, "divergence": 0.03, "agreement": 90.0, "fp32_top1": 60.0}
    more = {"drop": drop, "drop_ci95": 2.0, "images": 250, "seconds": 20.0}
    return {"method": method, "draw": draw, "target": target} | measured | more


def test_a_line_has_the_mean_of_its_draws_and_their_spread() -> None:
    rows = [row("w4", 0, 1.0), row("w8", 0, 0.25), row("w4", 1, -0.5), row("w4", 0, 3.0, "any_x86")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()[2:]]
    assert [found[:1] + found[2:4] for found in cells] == [
        ["w4", "+0.25 ± 2.00", "-0.50 to +1.00"],
        ["w8", "+0.25 ± 2.00", ""],
        ["w4, any_x86", "+3.00 ± 2.00", ""],
    ]
