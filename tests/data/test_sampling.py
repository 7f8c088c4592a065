"""Properties of the validation split, balanced caps and the calibration draw."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantstudy.data.container import Split
from quantstudy.data.prepare import prepare
from quantstudy.data.sampling import balanced_indices, calibration_indices, validation_indices
from quantstudy.errors import UserError
from quantstudy.params import Calibration, Data

Labels = st.lists(st.integers(0, 5), min_size=2, max_size=80).map(torch.tensor)


@given(labels=Labels, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_validation_is_disjoint_complete_and_deterministic(labels: torch.Tensor, fraction: float, seed: int) -> None:
    train, validation = validation_indices(labels, fraction, seed)
    assert len(train) and len(validation)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(len(labels)))
    again = validation_indices(labels, fraction, seed)
    assert torch.equal(train, again[0]) and torch.equal(validation, again[1])


@given(sizes=st.lists(st.integers(4, 30), min_size=1, max_size=6), fraction=st.floats(0.1, 0.5))
def test_validation_takes_its_fraction_of_each_class(sizes: list[int], fraction: float) -> None:
    """Up to rounding: half an image a class, and a class's share of what the other classes' rounding leaves."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    _, validation = validation_indices(labels, fraction, seed=0)
    for size, taken in zip(sizes, labels[validation].bincount(minlength=len(sizes)).tolist(), strict=True):
        assert abs(taken - fraction * size) <= 1 + (len(sizes) + 1) / 2 * size / len(labels)


@given(labels=Labels)
def test_small_validation_leaves_every_class_a_training_image(labels: torch.Tensor) -> None:
    train, _ = validation_indices(labels, 0.2, seed=0)
    if len(labels) >= 2 * len(labels.unique()):
        assert set(labels[train].tolist()) == set(labels.tolist())


def test_calibration_draw_is_by_seed_and_impossible_draws_are_refused() -> None:
    with pytest.raises(UserError, match="1 image cannot be split in two; raise max_train"):
        validation_indices(torch.tensor([0]), 0.1, seed=0)
    settings = Calibration(batches=2, batch_size=16)
    draw = calibration_indices(100, settings, 3, "tiny")
    assert len(draw.unique()) == 32
    assert torch.equal(draw, calibration_indices(100, settings, 3, "tiny"))
    assert not torch.equal(draw, calibration_indices(100, settings, 4, "tiny"))
    with pytest.raises(UserError) as error:
        calibration_indices(100, Calibration(batches=4, batch_size=64), 0, "tiny")
    assert str(error.value) == (
        "studies.tiny.calibration: 4 batches of 64 need 256 images, but the training split without its validation "
        "part has 100; lower batches or batch_size, or raise data.max_train if it is set"
    )


@given(labels=Labels, maximum=st.integers(1, 90))
def test_cap_is_as_balanced_as_the_classes_allow(labels: torch.Tensor, maximum: int) -> None:
    chosen = balanced_indices(labels, maximum)
    assert len(chosen) == min(maximum, len(labels)) == len(chosen.unique())
    counts, sizes = labels[chosen].bincount(minlength=6), labels.bincount(minlength=6)
    limited = counts < sizes
    assert not limited.any() or counts.max() <= counts[limited].min() + 1


@pytest.mark.parametrize("seed", [0, 7])
def test_no_image_calibrates_and_validates(seed: int) -> None:
    data = Data(source="digits", image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    splits = prepare(data, "digits", Calibration(batches=4, batch_size=64), seed, validation_fraction=0.2)
    _, expected = validation_indices(splits["train"].labels, 0.2, seed)
    assert torch.equal(splits["validation"].labels, splits["train"].labels[expected])
    assert len(splits["calibration"]) == 256
    train, calibration, validation = (pictures(splits[part]) for part in ("train", "calibration", "validation"))
    twins = len(splits["train"]) - len(train)
    assert calibration < train and validation < train and len(calibration & validation) <= twins < 3


def pictures(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.decode(torch.arange(len(split)))}
