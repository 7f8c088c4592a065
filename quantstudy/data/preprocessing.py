"""Prepare an image for a model: the one place that does what a row `Preprocessing` says.

The steps are: decode, turn by EXIF if asked, resize, cut out the centre. The `transforms()` of torchvision's weights
give the same pixels for PIL images (https://docs.pytorch.org/vision/stable/models.html). As in torchvision's
ImageFolder, transparency is dropped. An image smaller than its crop is padded with black.

Images that are stored smaller than the model sees them are enlarged on the device, by the same rule, in float32.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from quantstudy.params import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that Pillow itself decodes; it hands others, EPS for example, to outside programs."""


def image_suffixes() -> tuple[str, ...]:
    """Return how the names of images end, sorted, for the formats that can be read."""
    from PIL import Image

    return tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS))


def opened(source: "bytes | Image") -> "Image":
    """Read an image's header, which has its size; an image that is already open stays as it is."""
    from PIL import Image

    return Image.open(io.BytesIO(source), formats=_FORMATS) if isinstance(source, bytes) else source


def decoded(source: "bytes | Image", preprocessing: Preprocessing) -> "Image":
    """Decode to 8-bit RGB or grey, in the size of the file.

    Raises:
        ValueError: its pixels have more than 8 bits, which PIL would clip to white.
        Exception: what PIL raises for a file that does not decode.
    """
    image = opened(source)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    if preprocessing.exif:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    image = image.convert("RGB")
    return image if preprocessing.channels == 3 else image.convert("L")


def pixels(source: "bytes | Image", preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return an image as the model sees it, before normalization: uint8 [channels, height, width].

    Raises:
        ValueError, Exception: as `decoded` does.
    """
    image = decoded(source, preprocessing)
    target = resized_size(preprocessing, image.height, image.width)
    if preprocessing.antialias or target == (image.height, image.width):
        from PIL.Image import Resampling

        height, width = target
        image = image.resize((width, height), Resampling[preprocessing.interpolation.upper()])
        top, left = _corner(target, preprocessing)
        height, width = preprocessing.size
        image = image.crop((left, top, left + width, top + height))
        return channels_first(image)
    found = fit(torch.from_numpy(channels_first(image))[None], preprocessing)[0]
    return found.round().to(torch.uint8).numpy()


def fit(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Bring images of any size to what the model sees, on their device.

    Args:
        images: [N, channels, h, w], pixels from 0 to 255.

    Returns:
        [N, channels, height, width]: `images` if they have that size, else float32 from 0 to 255.
    """
    size = (images.shape[-2], images.shape[-1])
    if size == preprocessing.size:
        return images
    target = resized_size(preprocessing, *size)
    mode, antialias = preprocessing.interpolation, preprocessing.antialias
    overshoots = mode == "bicubic"
    # PIL resizes the width, then the height, and clips and rounds after each
    for step in [(size[0], target[1]), target] if overshoots and antialias else [target]:
        if step != (images.shape[-2], images.shape[-1]):
            images = images.to(torch.float32, memory_format=torch.channels_last)
            images = functional.interpolate(images, size=step, mode=mode, antialias=antialias)
            images = images.round().clamp(0, 255) if overshoots else images
    top, left = _corner(target, preprocessing)
    bottom, right = top + preprocessing.size[0] - target[0], left + preprocessing.size[1] - target[1]
    return functional.pad(images, (-left, right, -top, bottom))  # negative padding cuts


def resized_size(preprocessing: Preprocessing, height: int, width: int) -> tuple[int, int]:
    """Return the height and width that an image of `height` and `width` is resized to, before the crop."""
    if preprocessing.resize != "short_side":
        return preprocessing.size if preprocessing.resize == "exact" else (height, width)
    tall, wide = (round(side / preprocessing.crop_fraction) for side in preprocessing.size)
    if tall * width >= wide * height:  # the height needs the larger factor
        return tall, int(tall * width / height)
    return int(wide * height / width), wide


def _corner(resized: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the top and left of the centre crop; below 0 if the image is smaller and black goes around it."""
    # torchvision rounds halves to even numbers where it cuts, and down where it pads
    top, left = (
        round((length - side) / 2) if length >= side else -((side - length) // 2)
        for length, side in zip(resized, preprocessing.size, strict=True)
    )
    return top, left


def channels_first(image: "Image") -> NDArray[np.uint8]:
    """Return the pixels of a grey or RGB image, uint8 [channels, height, width]."""
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
