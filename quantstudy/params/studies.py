"""The rows of `studies`: a model, its data, how it is trained and calibrated."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from quantstudy.params.goal import Goal
from quantstudy.params.section import (
    Augmentation,
    BatchSize,
    Epochs,
    Images,
    Name,
    Optimizer,
    Rate,
    Schedule,
    Section,
    Seed,
    Sha256,
    Text,
)

_SIDES = (8, 1024)


class Model(Section):
    """A classifier and the weights that its training starts from."""

    architecture: Text
    """A torchvision name, `vgg11_small`, or `package.module:factory`, your own function of `num_classes`."""
    code_sha256: Sha256 | None = None
    """The SHA-256 of the code of your own architecture, so that changed code trains anew."""
    weights: Text | None = None
    """None: random; `imagenet`: torchvision's; otherwise the path of a local state_dict."""
    weights_sha256: Sha256 | None = None
    weights_key: str | None = None
    """The state_dict to take if the file holds several, `state_dict_ema` or `ema.module` for example."""

    @field_validator("code_sha256", "weights_sha256")
    @classmethod
    def _is_of_a_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        of_code = info.field_name == "code_sha256"
        of = info.data.get("architecture" if of_code else "weights", ":")
        if value is not None and (of in (None, "imagenet") or (of_code and ":" not in of)):
            what = "an architecture package.module:factory" if of_code else "the path of a file in weights"
            raise ValueError(f"goes with {what}; remove it")
        return value

    @field_validator("weights_key")
    @classmethod
    def _weights_key_is_of_a_file(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("weights") in (None, "imagenet"):
            raise ValueError("goes with a file in weights; leave it out")
        return value


class Preprocessing(Section):
    """What the model sees of an image, in torchvision's and timm's words; `data/preprocessing.py` does it.

    The image is resized, and its centre of `image_size` is cut out. A pixel becomes (pixel / 255 - `mean`) / `std`.
    """

    image_size: int | tuple[int, int]
    """Pixels a side of a square, or [height, width]."""
    resize: Literal["short_side", "exact", "none"] = "short_side"
    """`short_side` keeps the aspect ratio, `exact` goes to `image_size` and may distort, `none` only cuts."""
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    """The share of the resized short side that is kept: 0.875 for a crop of 224 out of 256, rounded to a pixel."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for red, green and blue."""
    exif: bool = False
    """Whether to apply the rotation that a camera noted; torchvision's ImageFolder does not."""
    mean: tuple[Annotated[float, Field(ge=-256, le=256)], ...] = Field(strict=False)
    std: tuple[Annotated[float, Field(gt=1e-3, le=256)], ...] = Field(strict=False)

    @field_validator("image_size", mode="plain")
    @classmethod
    def _image_size_is_sides(cls, value: Any) -> int | tuple[int, int]:
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if not all(type(side) is int and _SIDES[0] <= side <= _SIDES[1] for side in sides):
            raise ValueError("write one whole number of pixels, or [height, width], from {} to {}".format(*_SIDES))
        return value if isinstance(value, int) else (value[0], value[1])

    @field_validator("mean", "std")
    @classmethod
    def _one_number_a_channel(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        channels = info.data.get("channels", len(value))
        if len(value) != channels:
            raise ValueError(f"has {len(value)} numbers; write {channels}, one of each of the channels")
        return value

    @field_validator("crop_fraction")
    @classmethod
    def _crop_follows_a_short_side(cls, value: float, info: ValidationInfo) -> float:
        if value != 1 and info.data.get("resize", "short_side") != "short_side":
            raise ValueError("goes with resize: short_side; leave it out")
        return value

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model sees, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the model sees."""
        return self.channels, *self.size


class Data(Preprocessing):
    """Images, where they come from, and how the model sees them.

    Instead of the preprocessing keys, a row may say `preprocessing: torchvision`; `presets.py` writes the keys out.
    """

    source: Literal["digits", "torchvision", "folder"]
    dataset: Text | None = Field(None, validate_default=True)
    path: Text | None = Field(None, validate_default=True)
    sha256: Sha256 | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For a folder of classes without train/ and test/: the share of each class to draw for testing."""
    max_train: Images | None = None
    max_test: Images | None = None

    @field_validator("dataset", "path", "sha256", "test_fraction")
    @classmethod
    def _goes_with_its_source(cls, value: Any, info: ValidationInfo) -> Any:
        source, key = info.data.get("source"), info.field_name
        takes = {"digits": (), "torchvision": ("dataset",), "folder": ("path", "sha256", "test_fraction")}
        if source and value is None and key in takes[source][:1]:
            raise ValueError(f"source {source} needs the key {key}")
        if source and value is not None and key not in takes[source]:
            raise ValueError(f"source {source} takes no {key}; remove it")
        return value

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing keys, which the model is trained for and its file keeps."""
        return Preprocessing(**{key: getattr(self, key) for key in Preprocessing.model_fields})


class Training(Section):
    """One training run: fine-tuning or QAT."""

    epochs: Annotated[int, Field(ge=0, le=10_000)]
    """0 keeps the weights as they are: they are already trained."""
    learning_rate: Rate
    batch_size: Annotated[int, Field(ge=2, le=16_384)] = 64
    """At least 2, which batch normalization needs."""
    optimizer: Optimizer = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 5e-4
    schedule: Schedule = "cosine"
    augmentation: Augmentation = "flip"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_images: Annotated[int, Field(ge=2, le=10**9)] | None = None
    """Train on this many images, drawn once by seed; None: on all."""


class QatOverrides(Section):
    """How a method that trains its scales trains in one study, if not as the study's other methods do."""

    epochs: Epochs | None = None
    learning_rate: Rate | None = None
    augmentation: Augmentation | None = None


class Qat(Training):
    """Quantization-aware training: 2 epochs at 1e-5 unless the study says otherwise; the method sets the precision."""

    epochs: Epochs = 2
    learning_rate: Rate = 1e-5
    schedule: Schedule = "constant"
    precision: Literal["fp32"] = "fp32"

    @field_validator("validation_fraction")
    @classmethod
    def _is_that_of_training(cls, value: float) -> float:
        raise ValueError("fine-tuning and QAT share their validation images; set training.validation_fraction instead")

    methods: dict[Name, QatOverrides] = Field(default_factory=dict)
    """What methods that train their scales take in this study instead of their own numbers, by name."""


class Calibration(Section):
    """The calibration images: `batches` of `batch_size`, drawn by seed.

    They are of `path`, or else of the training split without its validation part.
    """

    batches: Annotated[int, Field(ge=1, le=10_000)] = 4
    batch_size: BatchSize = 64
    bins: Annotated[int, Field(ge=64, le=65_536)] = 2048
    path: Text | None = None
    """A folder or an archive of images, labels not needed, for a study whose training images are not at hand."""
    sha256: Sha256 | None = None

    @field_validator("sha256")
    @classmethod
    def _is_of_the_path(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("path", "") is None:
            raise ValueError("goes with the key path; remove it")
        return value


class Study(Section):
    """A row of `studies`."""

    model: Model
    data: Data
    training: Training
    calibration: Calibration
    qat: Qat
    seed: Seed
    goal: Goal | None = None
    """What the search looks for if the study is in `ship`."""
