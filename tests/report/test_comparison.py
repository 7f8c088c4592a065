"""Two revisions side by side: McNemar where predictions are kept, intervals elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantstudy.errors import UserError
from quantstudy.report.comparison import compare, to_markdown, to_record
from quantstudy.report.revisions import Revision

IMAGES = 400
LABELS = np.arange(IMAGES) % 10


class Fake:
    """A revision in memory: the share of right answers by variant."""

    def __init__(self, name: str, right: dict[str, int], *, kept: bool = True, images: str = "same") -> None:
        self.name, self._right, self._kept, self._images = name, right, kept, images
        self.params: dict[str, Any] = {"run": ["s"], "ptq": [v for v in right if v != "fp32"], "qat": []}
        self.params_in_use: dict[str, Any] = {"seed": len(name)}
        self.variants = [("s", variant) for variant in right]

    def metrics(self, study: str, variant: str) -> dict[str, float] | None:
        if variant not in self._right:
            return None
        top1 = 100 * self._right[variant] / IMAGES
        return dict(top1=top1, top1_ci95=4.0, size_mb=1.0, latency_ms_b1=None, latency_ms_b16=2.0, images=IMAGES)

    def predictions(self, study: str, variant: str) -> Any:
        wrong = np.arange(IMAGES) >= self._right[variant]
        return np.where(wrong, LABELS + 1, LABELS) if self._kept else None

    def test_md5(self, study: str) -> str:
        return self._images

    def test_labels(self, study: str) -> Any:
        return LABELS


def verdicts(before: Any, after: Any) -> dict[str, str]:
    return {row.variant: row.verdict for row in compare(before, after)}


def test_a_difference_of_few_images_moves_only_what_mcnemar_says() -> None:
    before, after = Fake("old", {"fp32": 380, "a": 380, "b": 360}), Fake("new", {"fp32": 380, "a": 379, "b": 370})
    assert verdicts(before, after) == {"fp32": "same", "a": "same", "b": "better"}
    rows = compare(before, after)
    assert [row.p for row in rows] == [1.0, 1.0, pytest.approx(2 / 2**10)]
    text = to_markdown(before, after, rows)  # type: ignore[arg-type]
    assert "90.00 → 92.50 | +2.50 (0.002)" in text and "| a " in text and "| fp32 " not in text
    record = to_record(before, after, rows)  # type: ignore[arg-type]
    assert [(row["variant"], row["verdict"]) for row in record["rows"]] == [(row.variant, row.verdict) for row in rows]
    assert record["rows"][2]["before"] == dict(top1=90.0, size_mb=1.0, latency_ms_b1=None, latency_ms_b16=2.0)
    others = {f"m{i}": 380 for i in range(40)}
    before, after = Fake("old", others | {"b": 360}), Fake("new", others | {"b": 367})
    assert verdicts(before, after)["b"] == "same"  # p is 0.016, and there were 41 chances
    assert verdicts(Fake("old", {"b": 360}), Fake("new", {"b": 367}))["b"] == "better"


@pytest.mark.parametrize("changes", [{"kept": False}, {"images": "others"}], ids=["no-predictions", "other-images"])
def test_without_the_same_images_the_intervals_decide(changes: dict[str, Any]) -> None:
    before, after = Fake("old", {"a": 360, "b": 300}, **changes), Fake("new", {"a": 350, "b": 260})
    assert verdicts(before, after) == {"a": "same", "b": "worse"}


def test_a_latency_of_a_busy_machine_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = Fake("old", {"a": 360}), Fake("new", {"a": 300})
    metrics = before.metrics("s", "a")
    monkeypatch.setattr(before, "metrics", lambda *_: metrics | {"latency_ms_b16": 643.0, "busy": [16]})
    rows = compare(before, after)
    text = to_markdown(before, after, rows)
    assert "643.00 busy → 2.00" in text and "marked busy" in text
    assert to_record(before, after, rows)["rows"][0]["before"]["busy"] == [16]
    assert "busy" not in to_markdown(after, after, compare(after, after))


def test_a_variant_of_one_side_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(Fake("old", {"fp32": 380, "a": 380}), Fake("new", {"fp32": 380, "b": 380}))
    assert found == {"fp32": "same", "b": "only after", "a": "only before"}
    with pytest.raises(UserError, match="'old' and 'new' have no variant in common"):
        compare(Fake("old", {"a": 1}), Fake("new", {"b": 1}))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'nope': not a git revision or an experiment"):
        Revision("nope")
