"""DVC's own plots, drawn as it draws them: cells of a CSV file are text."""

import itertools
import json
import re

import vl_convert

from tests.conftest import ROOT


def drawn(template: str, rows: list[dict[str, str]], x: str, y: str) -> str:
    """Return a template of .dvc/plots as SVG."""
    text = (ROOT / ".dvc" / "plots" / f"{template}.json").read_text()
    values = {"DATA": rows, "X": x, "Y": y, "X_LABEL": x, "Y_LABEL": y, "TITLE": template}
    for name, value in values.items():
        text = text.replace(f'"<DVC_METRIC_{name}>"', json.dumps(value)).replace(f"<DVC_METRIC_{name}>", str(value))
    return vl_convert.vegalite_to_svg(json.loads(text))


def test_epochs_are_numbers() -> None:
    rows = [
        {"epoch": str(epoch), "train_top1": "", "validation_top1": str(50 + epoch), "rev": "a"} for epoch in range(16)
    ]
    svg = drawn("training_curve", rows, "epoch", "validation_top1")
    line = max(re.findall(r' d="(M[^"]*L[^"]*)"', svg), key=lambda path: path.count("L"))
    points = [tuple(map(float, point.split(","))) for point in re.split("[ML]", line)[1:]]
    steps = [after[0] - before[0] for before, after in itertools.pairwise(points)]
    assert len(points) == 16 and min(steps) > 0 and max(steps) - min(steps) < 0.1
    heights = [y for _, y in points]
    assert heights == sorted(heights, reverse=True)
