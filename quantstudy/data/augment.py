"""Resizing and augmentation of whole batches on their device.

Every function takes images as [B, 3, H, W] and draws its random numbers from a CPU generator, so that a
seed gives the same images on every device. Padding is black, put in before normalization.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 64
"""Images up to this side, in pixels, are padded and cropped; larger ones get random resized crops."""
_MINIMUM_AREA = 0.35


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 or float square images to float32 [B, 3, size, size], bilinear with antialiasing."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(
        images.to(torch.float32, memory_format=torch.channels_last), size=(size, size), mode="bilinear", antialias=True
    )


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Translate each image by whole pixels, up to an eighth of its side in each direction."""
    batch, _, height, width = images.shape
    reach = max(1, height // 8)
    padded = functional.pad(images, (reach,) * 4)
    top, left = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator).to(images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def resized_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Crop a random window (35 to 100 % of the area, aspect 3/4 to 4/3) and resize it to float32 `size` squared."""
    batch = len(images)
    area, aspect, across, down = torch.rand(4, batch, generator=generator)
    side = (_MINIMUM_AREA + (1 - _MINIMUM_AREA) * area).sqrt()
    stretch = ((2 * aspect - 1) * math.log(4 / 3) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * across - 1), (1 - height) * (2 * down - 1)
    grid = functional.affine_grid(theta.to(images.device), [batch, 3, size, size], align_corners=False)
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def augment(images: Tensor, size: int, augmentation: str, generator: torch.Generator) -> Tensor:
    """Return the batch resized to `size` and augmented, uint8 or float32 in 0 to 255."""
    if augmentation == "crop_flip" and size > SMALL:
        return flip(resized_crop(images, size, generator), generator)
    images = resize(images, size)
    if augmentation in ("shift", "crop_flip"):
        images = shift(images, generator)
    if augmentation in ("flip", "crop_flip"):
        images = flip(images, generator)
    return images
