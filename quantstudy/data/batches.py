"""Batches of a split on the device: resized, augmented, normalized, channels last.

Decoded splits are indexed where they lie (on a GPU, in its memory when they fit). Encoded splits are decoded
by threads that stay two batches ahead, so that the device does not wait.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from quantstudy.data.augment import augment
from quantstudy.data.container import Split
from quantstudy.errors import UserError
from quantstudy.params import Augmentation, Preprocessing

_AHEAD = 2
_MAX_WORKERS = 16
_GPU_SHARE = 0.25


class Batches:
    """An iterable of `(images, labels)`: float32 [B, C, H, W], channels last, and int64 [B], both on `device`.

    images: the number of images; `len()` is the number of batches.
    seconds_waiting: time that consumers have spent waiting for a batch, in all iterations so far.

    `share` (part, parts): each batch of a shuffled epoch is divided into `parts`, and this object yields one `part`.

    Without shuffling, all batches but the last have `batch_size` images. With shuffling, the batches are as equal as
    possible, and have two images or more for each part, which batch normalization needs.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int,
        device: torch.device | str,
        *,
        indices: Tensor | None = None,
        shuffle: bool = False,
        augmentation: Augmentation = "none",
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._split = split
        self._preprocessing = preprocessing
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._indices = torch.arange(len(split)) if indices is None else indices
        self.images = len(self._indices)
        self._shuffle = shuffle
        self._augmentation, self._seed = augmentation, seed
        self._part, self._parts = share
        self._epoch = 0
        self._labels = split.labels.to(self._device)
        self._resident = split.images
        if split.images is not None and split.images.nbytes <= _room(self._device):
            self._resident = split.images.to(self._device)
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self._scale = (1 / (255 * std)).view(1, -1, 1, 1).to(self._device)
        self._offset = (-mean / std).view(1, -1, 1, 1).to(self._device)
        self.seconds_waiting = 0.0

    def __len__(self) -> int:
        """Return the number of batches."""
        full = -(-self.images // self._batch_size)
        return min(full, max(1, self.images // (2 * self._parts))) if self._shuffle else full

    def set_epoch(self, epoch: int) -> None:
        """Fix the order and the augmentation of the next iterations: they depend on the seed and `epoch` alone."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the epoch that was set; a second iteration yields the same ones."""
        batches = self._batches()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.images:
            return
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._shuffle:
            order = self._indices[torch.randperm(self.images, generator=generator)]
            chunks: Sequence[Tensor] = order.tensor_split(len(self))
            if self._parts > 1:
                chunks = [chunk.tensor_split(self._parts)[self._part] for chunk in chunks]
                generator.manual_seed((generator.initial_seed() + 1) * 1_009 + self._part)  # no other epoch's
        else:
            chunks = torch.split(self._indices, self._batch_size)
        for chunk, pixels in zip(chunks, self._pixels(chunks), strict=True):
            images = augment(pixels, self._preprocessing, self._augmentation, generator)
            images = images.to(torch.float32, memory_format=torch.channels_last)
            yield images.mul_(self._scale).add_(self._offset), self._labels[chunk.to(self._device)]

    def _pixels(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the decoded images of each chunk, uint8 on the device."""
        if self._resident is not None:
            for chunk in chunks:
                yield self._resident[chunk.to(self._resident.device)].to(self._device)
            return
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(workers)
        ahead: deque[list[Future[Tensor]]] = deque()
        try:
            for number in range(len(chunks) + _AHEAD):
                if number < len(chunks):
                    parts = chunks[number].tensor_split(min(workers, len(chunks[number])))
                    ahead.append([pool.submit(self._split.decode, part) for part in parts])
                if number >= _AHEAD:
                    yield torch.cat([part.result() for part in ahead.popleft()]).to(self._device)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _room(device: torch.device) -> float:
    """Return how many bytes of images a GPU may hold; 0 for a CPU."""
    return _GPU_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def images_of(split: Split, preprocessing: Preprocessing, batch_size: int) -> list[Tensor]:
    """Return the images of a split as the network sees them, in batches of float32 [N, C, H, W], on the CPU."""
    return [images for images, _ in Batches(split, preprocessing, batch_size, "cpu")]


@torch.no_grad()
def run_on_split(
    run: Callable[[Tensor], Tensor],
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> np.ndarray:
    """Return the outputs of `run` for a split's images, in the split's order, as float32 [images, ...].

    Every batch has `batch_size` images: the last one is filled up with its last image.

    Raises:
        UserError: some of the outputs are not finite.
    """
    found = []
    for images, _ in Batches(split, preprocessing, batch_size, device):
        missing = batch_size - len(images)
        full = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        logits = run(full.contiguous(memory_format=memory_format))
        found.append(logits[: len(images)].float().cpu().numpy())
    outputs = np.concatenate(found)
    if bad := int((~np.isfinite(outputs.reshape(len(outputs), -1)).all(1)).sum()):
        cause = "values overflow their type, or the weights are damaged"
        raise UserError(f"logits: those of {bad} of {len(outputs)} images are not finite (NaN or infinite): {cause}")
    return outputs
