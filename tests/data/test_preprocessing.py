"""What a model sees is what torchvision's transforms show it, to the pixel, however a split stores its images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

from quantstudy import params as P
from quantstudy.data import images
from quantstudy.data.batches import Batches
from quantstudy.data.container import load_split, save_split
from quantstudy.data.images import ImageList, store
from quantstudy.data.preprocessing import pixels
from quantstudy.errors import UserError
from quantstudy.params import torchvision_preset
from tests.conftest import HALVES, Project

PRESETS = [
    *("alexnet.IMAGENET1K_V1", "resnet50.IMAGENET1K_V1", "resnet50.IMAGENET1K_V2", "mobilenet_v2.IMAGENET1K_V2"),
    *("efficientnet_b0.IMAGENET1K_V1", "efficientnet_b1.IMAGENET1K_V2", "vit_b_16.IMAGENET1K_SWAG_E2E_V1"),
    *("swin_t.IMAGENET1K_V1", "convnext_tiny.IMAGENET1K_V1", "inception_v3.IMAGENET1K_V1"),
    *("regnet_y_16gf.IMAGENET1K_SWAG_LINEAR_V1", "vgg16.IMAGENET1K_FEATURES"),
]


def photo(width: int, height: int, suffix: str = "JPEG", **options: Any) -> bytes:
    """Return a file of smooth colours, edges and noise."""
    random = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(x * y / 3), np.sign(np.sin(2 * x - y))], axis=-1)
    noise = random.normal(0, 20, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray((127 + 90 * waves + noise).clip(0, 255).astype(np.uint8)).save(buffer, suffix, **options)
    return buffer.getvalue()


PHOTOS = [photo(500, 375), photo(333, 500), photo(299, 299), photo(181, 120, "PNG"), photo(1023, 767, quality=60)]


def of(files: list[bytes]) -> ImageList:
    names = [str(index) for index in range(len(files))]
    return ImageList(torch.arange(len(files)), tuple(names), names, files.__getitem__)


def seen(files: list[bytes], preprocessing: P.Preprocessing) -> torch.Tensor:
    (split,) = store([of(files)], preprocessing)
    return torch.cat([batch for batch, _ in Batches(split, preprocessing, 2, "cpu")])


@pytest.mark.parametrize("limit", [1, 2**28], ids=["encoded", "decoded"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_sees_what_torchvision_shows_it(preset: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_DECODED_BYTES", limit)
    architecture, weights = preset.split(".")
    preprocessing = P.Preprocessing(**torchvision_preset(architecture, weights))
    transform = models.get_model_weights(architecture)[weights].transforms()
    expected = torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in PHOTOS])
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    assert ((seen(PHOTOS, preprocessing) - expected) * std).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("row", "transform"),
    [
        pytest.param({"image_size": (40, 64), "resize": "exact"}, [transforms.Resize((40, 64))], id="exact"),
        pytest.param({"image_size": 300, "resize": "none"}, [transforms.CenterCrop(300)], id="none-pads"),
        pytest.param(
            {"image_size": (48, 96), "interpolation": "bicubic"},
            [transforms.Resize(96, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop((48, 96))],
            id="oblong",
        ),
        pytest.param(
            {"image_size": 64, "channels": 1, "mean": [0.5], "std": [0.25]},
            [transforms.Grayscale(), transforms.Resize(64), transforms.CenterCrop(64)],
            id="grey",
        ),
    ],
)
def test_other_resizes_and_grey_images(row: dict[str, Any], transform: list[Any]) -> None:
    files = [PHOTOS[1], PHOTOS[2]]
    preprocessing = P.Preprocessing(**{**HALVES, **row})
    shown = transforms.Compose([*transform, transforms.PILToTensor()])
    expected = torch.stack([shown(Image.open(io.BytesIO(file))) for file in files])
    assert np.array_equal(np.stack([pixels(file, preprocessing) for file in files]), expected.numpy())
    batch = seen(files, preprocessing)
    assert batch.shape == (2, *preprocessing.shape)
    back = batch * preprocessing.std[0] + preprocessing.mean[0]
    torch.testing.assert_close(back, expected / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_small_images_are_enlarged_as_torchvision_does(interpolation: str, tmp_path: Path) -> None:
    small = [photo(24, 32, "PNG"), photo(24, 32, "PNG")]
    preprocessing = P.Preprocessing(image_size=56, crop_fraction=0.875, interpolation=interpolation, **HALVES)
    (split,) = store([of(small)], preprocessing)
    save_split(tmp_path / "test.pt", split)
    assert split.images.shape == (2, 3, 32, 24) and load_split(tmp_path / "test.pt").preprocessing == preprocessing
    expected = torch.stack([torch.from_numpy(pixels(file, preprocessing)) for file in small])
    assert (255 * (seen(small, preprocessing) / 2 + 0.5) - expected).abs().max() <= 1
    plain = P.Preprocessing(image_size=20, antialias=False, **HALVES)
    shown = transforms.Compose([transforms.PILToTensor(), transforms.Resize(20, antialias=False)])
    sharp = transforms.functional.center_crop(shown(Image.open(io.BytesIO(small[0]))), [20, 20])
    assert (torch.from_numpy(pixels(small[0], plain)).int() - sharp.int()).abs().max() <= 1


def test_exif_turns_an_image_only_where_it_is_asked_for() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    file = photo(60, 40, exif=turned)
    as_stored, upright = (pixels(file, P.Preprocessing(image_size=40, exif=exif, **HALVES)) for exif in (False, True))
    assert np.array_equal(np.rot90(as_stored, -1, (1, 2)), upright)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"image_size": [32, 4]}, r"data\.image_size: \[32, 4\]: write one whole number of pixels"),
        ({"std": [0.5, 0.0, 0.5]}, r"data\.std\.1: 0\.0: .*greater than 0"),
        ({"mean": [float("nan"), 0.5, 0.5]}, r"data\.mean\.0: nan: .*finite"),
        ({"channels": 1}, r"data\.mean: .*has 3 numbers; write 1"),
        ({"resize": "exact", "crop_fraction": 0.9}, r"data\.crop_fraction: 0\.9: goes with resize: short_side"),
        ({"resize": "crop"}, "'crop' is unknown; choose one of short_side, exact, none"),
        ({"preprocessing": "torchvision"}, r"data\.image_size: 32 is what preprocessing says too"),
        ({"preprocessing": "IMAGENET1K_V3"}, r"data\.preprocessing: 'IMAGENET1K_V3' is unknown .*IMAGENET1K_V2"),
    ],
)
def test_a_mistake_names_the_key_and_the_choices(row: dict[str, Any], line: str, project: Project) -> None:
    for key, value in row.items():
        project.edit(f"studies.tiny.data.{key}", value)
    with pytest.raises(UserError, match=line) as raised:
        P.load_params()
    assert str(raised.value).count("\n") == ("channels" in row)  # which both mean and std contradict


def test_a_row_takes_the_preprocessing_of_torchvisions_weights(project: Project) -> None:
    project.edit("studies.tiny.data", {"source": "digits", "preprocessing": "torchvision"})
    found = P.load_params().study("tiny").data.preprocessing
    assert (
        found.shape == (3, 224, 224) and found.mean == (0.485, 0.456, 0.406) and round(224 / found.crop_fraction) == 232
    )
    older = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert P.Preprocessing.model_validate(older).model_dump() | older == P.Preprocessing(**older).model_dump()
