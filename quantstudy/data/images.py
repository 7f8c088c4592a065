"""From images as a source has them to the form a split stores.

Both splits of a study take the same form, by these rules:

- A set whose images all have one size, no larger than the study's `image_size`, keeps that size (CIFAR at 224
  stays 32 pixels and is enlarged on the device). Any other set is brought to `image_size`: short side first,
  then a centre crop.
- Sets up to 64 pixels a side, or up to 256 MiB in all when decoded, are stored decoded, as uint8.
- Larger sets stay encoded: the original bytes when the short side is at most 1.15 times `image_size`, otherwise
  resized to a short side of `image_size` and encoded as JPEG at quality 95. Their crop is made when decoding.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from quantstudy.data.container import Split
from quantstudy.data.decoding import opened, resize_short_side, rgb, square
from quantstudy.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL_SIDE = 64
_DECODED_BYTES = 2**28
_KEPT_RATIO = 1.15
_JPEG_QUALITY = 95
_CHUNK = 64
_PEEKED = 256


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images of one split where their source has them.

    labels: int64 [N]. names: what to call each image in an error. read: image i, as the bytes of its file or as
    a PIL image; called from threads.
    """

    labels: Tensor
    classes: tuple[str, ...]
    names: Sequence[str]
    read: "Callable[[int], bytes | Image]"

    def subset(self, indices: Tensor) -> "ImageList":
        """Return the list of the images at `indices`, int64."""
        rows, read = indices.tolist(), self.read
        return ImageList(self.labels[indices], self.classes, [self.names[i] for i in rows], lambda i: read(rows[i]))


def store(train: ImageList, test: ImageList, image_size: int) -> tuple[Split, Split]:
    """Read every image of both lists into splits; raise `UserError` naming the first that does not decode."""
    side = _stored_side((train, test), image_size)
    decoded = side <= _SMALL_SIDE or (len(train.names) + len(test.names)) * 3 * side**2 <= _DECODED_BYTES
    form = _store_decoded if decoded else _store_encoded
    return form(train, side), form(test, side)


def _store_decoded(images: ImageList, side: int) -> Split:
    pixels = torch.empty(len(images.names), 3, side, side, dtype=torch.uint8)
    for start, chunk in _read_all(images, functools.partial(square, side=side)):
        pixels[start : start + len(chunk)] = torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2)
    return Split(images.labels, images.classes, side, images=pixels)


def _store_encoded(images: ImageList, side: int) -> Split:
    encoded, ends = bytearray(), [0]
    for _, chunk in _read_all(images, functools.partial(_compact, side=side)):
        for one in chunk:
            encoded += one
            ends.append(len(encoded))
    pixels = torch.frombuffer(encoded, dtype=torch.uint8)
    return Split(images.labels, images.classes, side, encoded=pixels, offsets=torch.tensor(ends, dtype=torch.int64))


def _compact(source: "bytes | Image", side: int) -> bytes:
    """Return the file's own bytes when its short side is near `side`, otherwise a smaller JPEG."""
    image = rgb(source)
    if isinstance(source, bytes) and min(image.size) <= _KEPT_RATIO * side:
        return source
    buffer = io.BytesIO()
    image = image if min(image.size) <= side else resize_short_side(image, side)
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _read_all(images: ImageList, convert: "Callable[[bytes | Image], Any]") -> Iterator[tuple[int, list[Any]]]:
    """Yield (index of the first, converted images) for each chunk in order; threads read and convert."""
    total = len(images.names)

    def chunk(start: int) -> list[Any]:
        return [_converted(images, i, convert) for i in range(start, min(start + _CHUNK, total))]

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=total, unit="image", leave=False, disable=None) as progress:
            starts = range(0, total, _CHUNK)
            for start, converted in zip(starts, pool.map(chunk, starts), strict=True):
                yield start, converted
                progress.update(len(converted))
    finally:
        pool.shutdown(cancel_futures=True)


def _converted(images: ImageList, index: int, convert: "Callable[[bytes | Image], Any]") -> Any:
    source = images.read(index)
    try:
        return convert(source)
    except Exception as error:  # PIL's decoders raise many types for damaged files
        reason = str(error).split("<_io")[0].strip()
        raise UserError(f"{images.names[index]}: not an image that can be decoded ({reason})") from None


def _stored_side(lists: Sequence[ImageList], image_size: int) -> int:
    """Return the side that a set is stored at; its sizes are peeked at in images spread evenly over it."""
    sizes = set()
    for images in lists:
        for index in range(0, len(images.names), max(1, len(images.names) // _PEEKED)):
            sizes.add(_converted(images, index, lambda source: opened(source).size))
    shorts = {min(size) for size in sizes}
    return min(image_size, *shorts) if len(sizes) == 1 else image_size
