"""scikit-learn's `digits`: 1,797 handwritten digits of 8 by 8 pixels that ship with the package."""

import torch

from quantstudy.data.images import ImageList
from quantstudy.data.sampling import validation_indices


def digits() -> tuple[ImageList, ImageList]:
    """Return (train, test), 70 % and 30 % of each class, the same for every study; 8 by 8 pixels, grey."""
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8).numpy()
    labels = torch.from_numpy(source.target).to(torch.int64)
    names = [f"digits: image {index}" for index in range(len(grey))]
    classes = tuple(str(name) for name in source.target_names)
    whole = ImageList(labels, classes, names, lambda index: Image.fromarray(grey[index]))
    train, test = validation_indices(labels, fraction=0.3, seed=0)
    return whole.subset(train), whole.subset(test)
