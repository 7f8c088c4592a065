"""Files of logits and classes: of this study and variant, whole, finite, of the test split's shape."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.measure.predictions import load_predictions, load_reference, save_predictions, save_reference

LOGITS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


def test_they_are_of_this_study_and_variant_and_of_the_test_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for study, variant in (("a", "x"), ("a", "y"), ("b", "x")):
        save_reference(study, LOGITS)
        save_predictions(study, variant, LOGITS)
    assert np.array_equal(load_reference("a", 6, 3), LOGITS)
    assert np.array_equal(load_predictions("a", "x", 6, 3), LOGITS.argmax(1))
    for shape in ((5, 3), (6, 4)):
        with pytest.raises(UserError, match=r"reference\.npy: float32 of shape \(6, 3\), not float32 of shape"):
            load_reference("a", *shape)
    with pytest.raises(UserError, match="predictions of 6 images, the test split has 5"):
        load_predictions("a", "x", 5, 3)
    with pytest.raises(UserError, match="others than the 1 classes"):
        load_predictions("a", "x", 6, 1)
    shutil.copy(layout.predictions("a", "y"), layout.predictions("a", "x"))
    with pytest.raises(UserError, match=r"x\.npy: damaged, not finite, or not the predictions of x in a"):
        load_predictions("a", "x", 6, 3)
    shutil.copy(layout.reference("b"), layout.reference("a"))
    with pytest.raises(UserError, match="or not the fp32 logits of a"):
        load_reference("a", 6, 3)
    np.save(layout.reference("a"), LOGITS * np.nan)
    with pytest.raises(UserError, match="not finite"):
        load_reference("a", 6, 3)
