"""From a study's `data` params to its training and test splits, whatever their source."""

from quantstudy.data.container import Split
from quantstudy.data.digits import digits
from quantstudy.data.folder import folder
from quantstudy.data.images import store
from quantstudy.data.sampling import balanced_indices
from quantstudy.data.torchvision_sets import torchvision_set
from quantstudy.params import Data


def prepare(data: Data, study: str) -> tuple[Split, Split]:
    """Fetch the study's images and return (train, test), each capped by `max_train` and `max_test`.

    Raise `UserError`, naming the key under `studies.<study>.data` or the file, for a source that is not usable.
    """
    if data.source == "digits":
        train, test = digits()
        return (
            train.subset(balanced_indices(train.labels, data.max_train)),
            test.subset(balanced_indices(test.labels, data.max_test)),
        )
    source = torchvision_set if data.source == "torchvision" else folder
    train_list, test_list = source(data, f"studies.{study}.data")
    return store(
        train_list.subset(balanced_indices(train_list.labels, data.max_train)),
        test_list.subset(balanced_indices(test_list.labels, data.max_test)),
        data.image_size,
    )
