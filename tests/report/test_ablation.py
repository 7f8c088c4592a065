"""The ablation's table names what each row adds to the one above."""

from typing import Any

from quantstudy.report.ablation import markdown


def row(scheme: str, *techniques: str, **more: Any) -> dict[str, Any]:
    measured = {"top1": 60.0, "top1_ci95": 1.0, "top1_drop": 0.5, "top1_drop_std": None, "p_above": None, "seeds": 1}
    stored = {"images": 256, "mean_bits": 4.0, "size_mb": 1.0, "seconds": 2.0}
    return {"scheme": scheme, "techniques": list(techniques)} | measured | stored | more


def test_a_row_names_what_it_adds_and_has_the_p_of_one_technique() -> None:
    rows = [
        row("W4", "nearest"),
        row("W4", "nearest", "a", "b", p_above=0.0001),
        row("W4", "nearest", "b"),
        row("W4", "nearest", "b", "c", top1_drop_std=0.25, p_above=0.0001),
        row("W3", "nearest", "b", "c", "d"),
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()[2:]]
    assert [found[1] for found in cells] == ["nearest", "+ a + b", "nearest + b", "+ c", "nearest + b + c + d"]
    assert [found[2] for found in cells][2:4] == ["+0.50", "+0.50 ± 0.25"]
    assert [found[6] for found in cells] == ["", "", "", "<0.001", ""]
