"""From a study's `data` params to its splits, whatever their source."""

from quantstudy.data.container import Split
from quantstudy.data.digits import digits
from quantstudy.data.folder import calibration_images, folder
from quantstudy.data.images import ImageList, store
from quantstudy.data.sampling import balanced_indices, calibration_indices
from quantstudy.data.torchvision_sets import torchvision_set
from quantstudy.params import Calibration, Data


def prepare(data: Data, study: str, calibration: Calibration | None = None, seed: int = 0) -> dict[str, Split]:
    """Fetch the study's images and return its splits `train` and `test`, each capped by `max_train` and `max_test`.

    With `calibration` there is a split of that name too, drawn by seed from the training split, or from its own path.
    Raise `UserError`, naming the key under `studies.<study>` or the file, for a source that is not usable.
    """
    key = f"studies.{study}"
    if data.source == "digits":
        train, test = digits()
    else:
        train, test = (torchvision_set if data.source == "torchvision" else folder)(data, f"{key}.data")
    lists = {"train": _at_most(train, data.max_train), "test": _at_most(test, data.max_test)}
    drawn = None
    if calibration is not None:
        found = calibration_images(calibration, test.classes, f"{key}.calibration")
        drawn = calibration_indices(len((found or lists["train"]).names), calibration, seed, study)
        if found is not None:
            lists["calibration"] = found.subset(drawn)
    splits = dict(zip(lists, store(list(lists.values()), data.preprocessing), strict=True))
    if drawn is not None and "calibration" not in splits:
        splits["calibration"] = splits["train"].subset(drawn)
    return splits


def _at_most(images: ImageList, maximum: int | None) -> ImageList:
    return images.subset(balanced_indices(images.labels, maximum))
