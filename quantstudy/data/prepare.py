"""From a study's `data` params to its splits, whatever their source."""

from pathlib import Path

import torch

from quantstudy.data.container import Split
from quantstudy.data.digits import digits
from quantstudy.data.folder import calibration_images, folder
from quantstudy.data.images import ImageList, store
from quantstudy.data.sampling import balanced_indices, calibration_indices, validation_indices
from quantstudy.data.torchvision_sets import torchvision_set
from quantstudy.errors import UserError
from quantstudy.params import Calibration, Data


def prepare(
    data: Data, study: str, calibration: Calibration | None = None, seed: int = 0, validation_fraction: float = 0.1
) -> dict[str, Split]:
    """Fetch the study's images and return its splits `train` and `test`, each capped by `max_train` and `max_test`.

    With `calibration` there are two more. `validation` is the part of the training split that no training learns from.
    `calibration` is drawn by seed from the rest of the training split, or from its own path.
    Raise `UserError`, naming the key under `studies.<study>` or the file, for a source that is not usable.
    """
    key = f"studies.{study}"
    if data.source == "digits":
        train, test = digits()
    else:
        train, test = (torchvision_set if data.source == "torchvision" else folder)(data, f"{key}.data")
    lists = {"train": _at_most(train, data.max_train), "test": _at_most(test, data.max_test)}
    if calibration is None:
        return _stored(lists, data)
    labels = lists["train"].labels
    rest = held_out = torch.arange(len(labels))
    if len(labels) > 1:
        rest, held_out = validation_indices(labels, validation_fraction, seed)
    found = calibration_images(calibration, test.classes, f"{key}.calibration")
    drawn = calibration_indices(len(rest) if found is None else len(found.names), calibration, seed, study)
    if found is not None:
        for part, images in {"test": lists["test"], "validation": lists["train"].subset(held_out)}.items():
            if shared := _places(found) & _places(images):
                few = f"{len(shared)} of its images are {part} images, {min(shared).name} for one"
                raise UserError(f"{key}.calibration.path: {few}; calibrate on others")
        lists["calibration"] = found.subset(drawn)
    splits = _stored(lists, data)
    splits["validation"] = splits["train"].subset(held_out)
    if found is None:
        splits["calibration"] = splits["train"].subset(rest[drawn])
    return splits


def _stored(lists: dict[str, ImageList], data: Data) -> dict[str, Split]:
    return dict(zip(lists, store(list(lists.values()), data.preprocessing), strict=True))


def _places(images: ImageList) -> set[Path]:
    """Return the paths of images of a folder or an archive, links followed."""
    named = (name.partition(": ") for name in images.names)
    return {Path(root, inside).resolve() for root, _, inside in named}


def _at_most(images: ImageList, maximum: int | None) -> ImageList:
    return images.subset(balanced_indices(images.labels, maximum))
