"""From a study's `data` params to its training and test splits, whatever their source."""

from typing import TypeVar

from quantstudy.data.container import Split
from quantstudy.data.digits import digits
from quantstudy.data.folder import folder
from quantstudy.data.images import ImageList, store
from quantstudy.data.sampling import balanced_indices
from quantstudy.data.torchvision_sets import torchvision_set
from quantstudy.params import Data

Images = TypeVar("Images", Split, ImageList)


def prepare(data: Data, study: str) -> tuple[Split, Split]:
    """Fetch the study's images and return (train, test), each capped by `max_train` and `max_test`.

    Raise `UserError`, naming the key under `studies.<study>.data` or the file, for a source that is not usable.
    """
    if data.source == "digits":
        train, test = digits()
        return _at_most(train, data.max_train), _at_most(test, data.max_test)
    source = torchvision_set if data.source == "torchvision" else folder
    train_list, test_list = source(data, f"studies.{study}.data")
    return store(_at_most(train_list, data.max_train), _at_most(test_list, data.max_test), data.image_size)


def _at_most(images: Images, maximum: int | None) -> Images:
    return images.subset(balanced_indices(images.labels, maximum))
