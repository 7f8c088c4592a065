"""scikit-learn's `digits`: 1,797 handwritten digits of 8 by 8 pixels that ship with the package."""

import torch

from quantstudy.data.container import Split
from quantstudy.data.sampling import validation_indices


def digits() -> tuple[Split, Split]:
    """Return (train, test), 70 % and 30 % of each class, the same for every study; uint8 [N, 3, 8, 8], grey."""
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8)
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(source.target).to(torch.int64)
    whole = Split(labels, tuple(str(name) for name in source.target_names), images.shape[-1], images=images)
    train, test = validation_indices(labels, fraction=0.3, seed=0)
    return whole.subset(train), whole.subset(test)
