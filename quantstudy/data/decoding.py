"""One image: from the bytes of its file to the pixels of a square.

Pixels are 8-bit RGB. As in torchvision, an EXIF rotation is not applied and transparency is dropped.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def square(source: "bytes | Image", side: int) -> NDArray[np.uint8]:
    """Decode to RGB, resize the short side to `side` pixels and crop the centre; uint8 [side, side, 3].

    Raise what PIL raises when `source` does not decode, and `ValueError` for pixels of more than 8 bits.
    """
    image = rgb(source)
    if image.size != (side, side):
        image = resize_short_side(image, side)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.array(image)


def opened(source: "bytes | Image") -> "Image":
    """Read an image's header, so that its size is known; an image that is open already stays as it is."""
    from PIL import Image

    return Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source


def rgb(source: "bytes | Image") -> "Image":
    """Decode to RGB; raise `ValueError` for pixels of more than 8 bits, which PIL would clip to white."""
    image = opened(source)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    return image.convert("RGB")


def resize_short_side(image: "Image", side: int) -> "Image":
    """Resize, keeping the aspect ratio, to a short side of `side` pixels; bilinear with antialiasing."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)
