"""Augmentation of whole batches on their device.

Every function takes images as [B, C, H, W] and draws its random numbers from a CPU generator, so that a
seed gives the same images on every device. Padding is black, added before normalization.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from quantstudy.data.preprocessing import fit
from quantstudy.params import Augmentation, Preprocessing

SMALL = 64
"""Images up to this side, in pixels, are padded and cropped; larger ones get random resized crops."""
_MINIMUM_AREA = 0.35


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Translate each image by whole pixels, up to an eighth of its shorter side in each direction."""
    batch, _, height, width = images.shape
    reach = max(1, min(height, width) // 8)
    padded = functional.pad(images, (reach,) * 4)
    top, left = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator).to(images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def resized_crop(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Crop a random window (35 to 100 % of the area, aspect 3/4 to 4/3 of the image's) and resize it to `size`.

    The result is float32 [B, C, *size].
    """
    batch, channels = images.shape[:2]
    area, aspect, across, down = torch.rand(4, batch, generator=generator)
    side = (_MINIMUM_AREA + (1 - _MINIMUM_AREA) * area).sqrt()
    stretch = ((2 * aspect - 1) * math.log(4 / 3) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1)
    grid = functional.affine_grid(theta.to(images.device), [batch, channels, *size], align_corners=False)
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def augment(
    images: Tensor, preprocessing: Preprocessing, augmentation: Augmentation, generator: torch.Generator
) -> Tensor:
    """Return the batch augmented, in the size that the model sees: uint8 or float32, from 0 to 255."""
    height, width = preprocessing.size
    if images.shape[-2] * width != images.shape[-1] * height:  # no window of it has the model's aspect ratio
        images = fit(images, preprocessing)
    if augmentation == "crop_flip" and min(preprocessing.size) > SMALL:
        return flip(resized_crop(images, preprocessing.size, generator), generator)
    images = fit(images, preprocessing)
    if augmentation in ("shift", "crop_flip"):
        images = shift(images, generator)
    if augmentation in ("flip", "crop_flip"):
        images = flip(images, generator)
    return images
