"""Turn the images of a source into the form that a split stores.

All splits of a study take the same form, by these rules. None loses what the model would have seen:

- If all images have one size that is smaller than what the model sees, and resizing shrinks neither side, they are
  stored decoded in that size, as uint8 (CIFAR at 224 stays 32 pixels and is enlarged on the device).
- Any other set is stored decoded as the model sees it, if that is up to 64 pixels a side or up to 256 MiB in all, if
  its files are larger than that on average, or if it has no files.
- All other sets keep the bytes of their files, which are decoded, resized and cropped when batches are made.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from quantstudy.data.container import Split
from quantstudy.data.preprocessing import channels_first, decoded, opened, pixels, resized_size
from quantstudy.errors import UserError
from quantstudy.params import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL_SIDE = 64
_DECODED_BYTES = 2**28
_CHUNK = 64
_PEEKED = 256


@dataclass(frozen=True, eq=False)
class ImageList:
    """The images of one split, still in their source.

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


def store(lists: Sequence[ImageList], preprocessing: Preprocessing) -> list[Split]:
    """Read the images of each list into a split; raise `UserError`, naming the first image that does not decode."""
    size, bytes_each = _peek(lists, preprocessing, _PEEKED)
    if size is not None and _is_enlarged(size, preprocessing):
        size, bytes_each = _peek(lists, preprocessing)
    own = size is not None and _is_enlarged(size, preprocessing)
    shape = (preprocessing.channels, *size) if own and size else preprocessing.shape
    total = sum(len(images.names) for images in lists) * math.prod(shape)
    small = max(shape[1:]) <= _SMALL_SIDE or total <= _DECODED_BYTES
    if own or small or bytes_each is None or bytes_each > math.prod(shape):
        return [_store_decoded(images, preprocessing, shape) for images in lists]
    return [_store_encoded(images, preprocessing) for images in lists]


def _is_enlarged(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Whether images of this size are smaller than what the model sees, and resizing shrinks neither side."""
    resized = resized_size(preprocessing, *size)
    is_smaller = math.prod(size) < math.prod(preprocessing.size)
    return is_smaller and all(after >= before for after, before in zip(resized, size, strict=True))


def _store_decoded(images: ImageList, preprocessing: Preprocessing, shape: tuple[int, int, int]) -> Split:
    def convert(source: "bytes | Image") -> NDArray[np.uint8]:
        if shape == preprocessing.shape:
            return pixels(source, preprocessing)
        return channels_first(decoded(source, preprocessing))

    stored = torch.empty(len(images.names), *shape, dtype=torch.uint8)
    for start, chunk in _read_all(images, convert):
        stored[start : start + len(chunk)] = torch.from_numpy(np.stack(chunk))
    return Split(images.labels, images.classes, preprocessing, images=stored)


def _store_encoded(images: ImageList, preprocessing: Preprocessing) -> Split:
    def convert(source: "bytes | Image") -> bytes:
        assert isinstance(source, bytes)
        decoded(source, preprocessing)
        return source

    encoded, ends = bytearray(), [0]
    for _, chunk in _read_all(images, convert):
        for one in chunk:
            encoded += one
            ends.append(len(encoded))
    stored = torch.frombuffer(encoded, dtype=torch.uint8) if encoded else torch.empty(0, dtype=torch.uint8)
    offsets = torch.tensor(ends, dtype=torch.int64)
    return Split(images.labels, images.classes, preprocessing, encoded=stored, offsets=offsets)


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
        raise UserError(f"{images.names[index]:.250}: not an image that can be decoded ({reason})") from None


def _peek(
    lists: Sequence[ImageList], preprocessing: Preprocessing, number: int | None = None
) -> tuple[tuple[int, int] | None, float | None]:
    """Return the height and width of all images, None if they differ, and the mean bytes of a file, None without files.

    Both come from about `number` images, spread evenly over each list; None: from all images.
    """

    def look(source: "bytes | Image") -> tuple[tuple[int, int], int | None]:
        image = opened(source)
        if preprocessing.exif:
            image = decoded(image, preprocessing)
        return (image.height, image.width), len(source) if isinstance(source, bytes) else None

    found = [
        _converted(images, index, look)
        for images in lists
        for index in range(0, len(images.names), max(1, len(images.names) // number) if number else 1)
    ]
    sizes, lengths = {size for size, _ in found}, [length for _, length in found]
    return sizes.pop() if len(sizes) == 1 else None, None if None in lengths else sum(lengths) / max(1, len(lengths))
