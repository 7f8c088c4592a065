"""One file per split: labels, class names and every image, decoded or still encoded.

DVC hashes files one by one, so a split is a single file that `torch.load(weights_only=True)` reads: small
images as one uint8 tensor, large ones as their encoded bytes end to end. The same content always gives
the same bytes. `images.py` decides which form a split takes.
"""

import contextlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantstudy.data.preprocessing import pixels
from quantstudy.errors import UserError
from quantstudy.files import atomic, check_records, save_tensors, write_tensors
from quantstudy.params import Preprocessing

_VERSION = 2


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, either decoded or encoded, with their labels.

    labels: int64 [N], indices into `classes`; -1 for a calibration image of no class.
    preprocessing: what the model sees of the images.
    images: uint8 [N, channels, height, width], when decoded: as the model sees them, or smaller.
    encoded, offsets: uint8 [bytes] and int64 [N + 1], when encoded; image i is `encoded[offsets[i]:offsets[i + 1]]`.
    """

    labels: Tensor
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    images: Tensor | None = None
    encoded: Tensor | None = None
    offsets: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> "Split":
        """Return a copy that holds the images at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        labels = self.labels[indices]
        if self.images is not None:
            return Split(labels, self.classes, self.preprocessing, images=self.images[indices])
        spans = self._spans(indices)
        lengths = torch.tensor([0, *map(len, spans)], dtype=torch.int64)
        encoded = torch.cat(spans) if spans else torch.empty(0, dtype=torch.uint8)
        return Split(labels, self.classes, self.preprocessing, encoded=encoded, offsets=lengths.cumsum(0))

    def decode(self, indices: Tensor) -> Tensor:
        """Return the images at `indices` (int64 [B]) as uint8 [B, channels, h, w]; safe to call from threads.

        Encoded ones have the height and width of `preprocessing`, decoded ones their own.
        """
        if self.images is not None:
            return self.images[indices]
        out = torch.empty(len(indices), *self.preprocessing.shape, dtype=torch.uint8)
        for row, span in enumerate(self._spans(indices)):
            out[row] = torch.from_numpy(pixels(span.numpy().tobytes(), self.preprocessing))
        return out

    def _spans(self, indices: Tensor) -> list[Tensor]:
        assert self.encoded is not None and self.offsets is not None
        return [self.encoded[self.offsets[i] : self.offsets[i + 1]] for i in indices.tolist()]


def save_split(path: Path, split: Split) -> None:
    """Write `split` to `path` atomically; equal splits give equal bytes."""
    save_tensors(path, _content(split))


def save_splits(splits: Mapping[Path, Split]) -> None:
    """Write every split of a study, or none of them when one fails; each file says which split it is."""
    with contextlib.ExitStack() as stack:
        for path, split in splits.items():
            write_tensors(stack.enter_context(atomic(path)), _content(split) | {"of": _place(path)})


def _content(split: Split) -> dict[str, Any]:
    plain = {"classes": list(split.classes), "preprocessing": split.preprocessing.model_dump()}
    return {"version": _VERSION, **vars(split), **plain}


def _place(path: Path) -> str:
    """Return a split's study and name: those of its path."""
    return f"{path.parent.name}/{path.stem}"


def load_split(path: Path) -> Split:
    """Map a split from `path`; raise `UserError` if it is missing, truncated, corrupt, or the file of another path."""
    again = "run the stage `download` again"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage `download`, which writes it")
    try:
        check_records(path)
        content = torch.load(path, mmap=True, weights_only=True)
        if content.pop("version") != _VERSION:
            raise ValueError("another version of the format")
        if (place := content.pop("of", _place(path))) != _place(path):
            raise ValueError(f"that of {place}")
        preprocessing = Preprocessing.model_validate(content["preprocessing"])
        return Split(**{**content, "classes": tuple(content["classes"]), "preprocessing": preprocessing})
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a whole split file ({error}); {again}") from None
    except Exception as error:  # the file may hold anything
        reason = f" ({error})" if type(error) is ValueError else ""
        raise UserError(f"{path}: not a split file of this study{reason}; {again}") from None
