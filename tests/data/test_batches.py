"""Batches: what they hold, in which order, and what each augmentation does."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from quantstudy.data.augment import flip, resized_crop, shift
from quantstudy.data.batches import Batches, run_on_split
from quantstudy.data.container import Split
from quantstudy.data.images import ImageList
from quantstudy.data.images import _store_encoded as store_encoded
from quantstudy.params import Data
from tests.conftest import HALVES

AUGMENTATIONS = ["none", "shift", "flip", "crop_flip"]


def data(image_size: int) -> Data:
    return Data(source="digits", image_size=image_size, **HALVES)


def decoded_split(count: int = 25, side: int = 16) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(torch.arange(count), tuple(map(str, range(count))), data(side), images=images)


def encoded_split(count: int = 25, side: int = 16) -> Split:
    wide = decoded_split(count, side + 4).images[:, :, :side].permute(0, 2, 3, 1).numpy()
    images = [png(pixels) for pixels in wide]
    names = [str(i) for i in range(count)]
    return store_encoded(ImageList(torch.arange(count), tuple(names), names, images.__getitem__), data(side))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def epoch(batches: Batches, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches.set_epoch(number)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_evaluation_batches_are_normalized_and_in_order() -> None:
    split = decoded_split()
    batches = Batches(split, data(16), 8, "cpu")
    images, labels = epoch(batches)
    assert (len(batches), batches.images) == (4, 25)
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 1]
    assert torch.equal(labels, torch.arange(25))
    torch.testing.assert_close(images, split.images / 127.5 - 1)
    chosen = torch.tensor([7, 3, 20])
    batches = Batches(decoded_split(), data(16), 2, "cpu", indices=chosen)
    assert batches.images == 3 and torch.equal(epoch(batches)[1], chosen)


@pytest.mark.parametrize(("images", "batch_size", "parts"), [(5, 2, 1), (25, 12, 1), (2, 2, 1), (5, 4, 2), (9, 4, 2)])
def test_no_batch_of_an_epoch_is_too_small_for_batch_normalization(images: int, batch_size: int, parts: int) -> None:
    shares = [
        Batches(decoded_split(images), data(16), batch_size, "cpu", shuffle=True, share=(part, parts))
        for part in range(parts)
    ]
    sizes = [[len(labels) for _, labels in share] for share in shares]
    assert min(map(min, sizes)) >= 2 and sum(map(sum, sizes)) == images
    assert [len(share) for share in shares] == [len(found) for found in sizes]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("image_size", [16, 32, 72])
def test_batches_have_the_models_size_and_layout(image_size: int, augmentation: str) -> None:
    for images, labels in Batches(decoded_split(), data(image_size), 8, "cpu", augmentation=augmentation):
        assert images.shape == (len(labels), 3, image_size, image_size)
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        assert images.min() >= -1.001 and images.max() <= 1.001


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("make", [decoded_split, encoded_split], ids=["decoded", "encoded"])
def test_an_epoch_depends_on_the_seed_and_its_number_alone(make, augmentation: str) -> None:
    keys = {"shuffle": True, "augmentation": augmentation}
    uninterrupted = Batches(make(), data(16), 8, "cpu", seed=5, **keys)
    first, third = (epoch(uninterrupted, number) for number in (0, 2))
    resumed = epoch(Batches(make(), data(16), 8, "cpu", seed=5, **keys), 2)
    another = epoch(Batches(make(), data(16), 8, "cpu", seed=6, **keys), 2)
    assert torch.equal(third[0], resumed[0]) and torch.equal(third[1], resumed[1])
    assert not torch.equal(third[1], first[1]) and not torch.equal(third[1], another[1])


def test_shuffled_batches_hold_every_image_once_in_equal_batches() -> None:
    batches = Batches(decoded_split(), data(16), 8, "cpu", shuffle=True)
    assert epoch(batches)[1].sort().values.tolist() == list(range(25))
    assert sorted(len(labels) for _, labels in batches) == [6, 6, 6, 7]
    nothing = torch.arange(0)
    assert not list(Batches(decoded_split(), data(16), 8, "cpu", indices=nothing))
    assert not list(Batches(decoded_split(), data(16), 8, "cpu", indices=nothing, shuffle=True))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    assert run_on_split(network, decoded_split(), data(8), 8, torch.device("cpu")).shape == (25, 2)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("image_size", [16, 72])
@pytest.mark.parametrize("make", [decoded_split, encoded_split], ids=["decoded", "encoded"])
def test_everything_after_decoding_happens_on_the_device(make, image_size: int, augmentation: str) -> None:
    """The meta device refuses to work with a tensor that lies elsewhere."""
    for images, labels in Batches(make(), data(image_size), 8, "meta", shuffle=True, augmentation=augmentation):
        assert images.device.type == labels.device.type == "meta"


def test_encoded_images_are_decoded_in_order_and_waiting_is_counted() -> None:
    split = encoded_split()
    images, labels = epoch(Batches(split, data(16), 4, "cpu"))
    torch.testing.assert_close(images, split.decode(torch.arange(25)) / 127.5 - 1)
    assert torch.equal(labels, torch.arange(25))
    batches = Batches(split, data(16), 4, "cpu")
    next(iter(batches))
    once = batches.seconds_waiting
    assert once > 0
    epoch(batches)
    assert batches.seconds_waiting > once


def test_shift_flip_and_resized_crop() -> None:
    dot = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    dot[:, :, 16, 16] = 255
    where = shift(dot, torch.Generator().manual_seed(0))[:, 0].nonzero()[:, 1:] - 16
    assert len(where) == 200 and where.min() == -4 and where.max() == 4
    white = shift(torch.full((50, 3, 8, 8), 255, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert set(white.unique().tolist()) == {0, 255}
    images = decoded_split(200).images
    flipped = flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130
    ramp = torch.arange(96.0).expand(64, 3, 96, 96)
    crops = resized_crop(ramp, (80, 80), torch.Generator().manual_seed(0))
    assert crops.min() >= 0 and crops.max() <= 95
    widths = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert widths.min() > 0.45 * 95 and widths.max() < 95 and widths.std() > 3


def test_an_epoch_that_is_left_does_not_spoil_the_next() -> None:
    batches = Batches(encoded_split(), data(16), 8, "cpu")
    next(iter(batches))
    assert torch.equal(epoch(batches)[0], epoch(Batches(encoded_split(), data(16), 8, "cpu"))[0])
