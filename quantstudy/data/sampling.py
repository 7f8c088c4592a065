"""Choose images: stratified subsets, the validation split and the calibration draw, all fixed by a seed."""

import torch
from torch import Tensor

from quantstudy.errors import UserError
from quantstudy.params import Calibration


def balanced_indices(labels: Tensor, maximum: int | None) -> Tensor:
    """Return up to `maximum` indices (all for None), int64, ascending, as equal per class as the classes allow."""
    if maximum is None or maximum >= len(labels):
        return torch.arange(len(labels))
    order, rank, _ = _shuffled_ranks(labels, seed=0)
    return order[rank.argsort(stable=True)[:maximum]].sort().values


def validation_indices(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images with int64 `labels` [N] into (train, validation) indices, int64, ascending, disjoint.

    Validation gets `fraction` of each class, at least one image in all. A class gives its last image only after every
    other image is taken.
    Raise `UserError` for fewer than two images.
    """
    if len(labels) < 2:
        raise UserError(f"{len(labels)} image cannot be split in two; raise max_train")
    order, rank, size = _shuffled_ranks(labels, seed)
    share = (rank + 0.5) / size
    share[rank == size - 1] += 1
    count = min(max(1, round(fraction * len(labels))), len(labels) - 1)
    by_share = order[share.argsort(stable=True)]
    return by_share[count:].sort().values, by_share[:count].sort().values


def calibration_indices(images: int, calibration: Calibration, seed: int, study: str) -> Tensor:
    """Draw the calibration images of `images`, int64, without replacement, in the order drawn.

    Raise `UserError` when the training split without its validation part, or `calibration.path`, has fewer than
    `batches` times `batch_size`.
    """
    needed = calibration.batches * calibration.batch_size
    if needed > images:
        origin = calibration.path or "the training split without its validation part"
        remedy = "raise data.max_train if it is set" if images else "name a folder of images in calibration.path"
        remedy = "add images to it" if calibration.path else remedy
        raise UserError(
            f"studies.{study}.calibration: {calibration.batches} batches of {calibration.batch_size} need {needed} "
            f"images, but {origin} has {images}; lower batches or batch_size, or {remedy}"
        )
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:needed]


def _shuffled_ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random order of the images and, for each in it, its rank within its class and the class's size."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    by_class = shuffled.argsort(stable=True)
    sizes = shuffled.bincount()
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(shuffled)
    rank[by_class] = torch.arange(len(labels)) - starts[shuffled[by_class]]
    return order, rank, sizes[shuffled]
