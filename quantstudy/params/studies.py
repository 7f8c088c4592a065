"""The rows of `studies`: a model, its data, how it is trained and calibrated."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantstudy.params.section import Augmentation, Name, Optimizer, Schedule, Section, Sha256


class Model(Section):
    """A classifier and the weights that its training starts from."""

    architecture: str
    """A name of torchvision's, `vgg11_small`, or `package.module:factory`, one's own function of `num_classes`."""
    code_sha256: Sha256 | None = None
    """Of the code of one's own architecture, so that a change of it trains anew."""
    weights: str | None = None
    """None: random; `imagenet`: torchvision's; otherwise the path of a local state_dict."""
    weights_sha256: Sha256 | None = None


class Preprocessing(Section):
    """What the model sees: square images of `image_size` pixels a side, pixels / 255 less `mean`, over `std`."""

    image_size: Annotated[int, Field(ge=8, le=1024)]
    mean: tuple[float, float, float] = Field(strict=False)
    std: tuple[float, float, float] = Field(strict=False)


class Data(Preprocessing):
    """Images, and where they come from."""

    source: Literal["digits", "torchvision", "folder"]
    dataset: str | None = None
    path: str | None = None
    sha256: Sha256 | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of a folder of classes without train/ and test/: the share of each class that is drawn for testing."""
    max_train: Annotated[int, Field(ge=1)] | None = None
    max_test: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> "Data":
        needed = {"digits": (), "torchvision": ("dataset",), "folder": ("path",)}[self.source]
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"source {self.source} needs the key {key}")
        if self.test_fraction is not None and self.source != "folder":
            raise ValueError(f"source {self.source} has a test split; remove test_fraction")
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """The part that a model is trained for and its file keeps."""
        return Preprocessing(image_size=self.image_size, mean=self.mean, std=self.std)


class Training(Section):
    """One training run: fine-tuning or QAT."""

    epochs: Annotated[int, Field(ge=0)]
    """0 keeps the weights as they are: they have been trained."""
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)] = 64
    optimizer: Optimizer = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Schedule = "cosine"
    augmentation: Augmentation = "flip"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_images: Annotated[int, Field(ge=1)] | None = None
    """Train on this many images, drawn once by seed; None: on all."""


class QatOverrides(Section):
    """How a method that trains with its scales trains in one study, where that is not as the study's others do."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    augmentation: Augmentation | None = None


class Qat(Training):
    """Quantization-aware training: 2 epochs at 1e-5 unless the study says otherwise; the method sets the precision."""

    epochs: Annotated[int, Field(ge=1)] = 2
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Schedule = "constant"
    precision: Literal["fp32"] = "fp32"
    methods: dict[Name, QatOverrides] = Field(default_factory=dict)
    """What a method that trains with its scales takes in this study instead of its own numbers."""


class Calibration(Section):
    """The calibration images: `batches` of `batch_size`, drawn by seed from the training split."""

    batches: Annotated[int, Field(ge=1)] = 4
    batch_size: Annotated[int, Field(ge=1)] = 64
    bins: Annotated[int, Field(ge=64)] = 2048


class Study(Section):
    """A row of `studies`."""

    model: Model
    data: Data
    training: Training
    calibration: Calibration
    qat: Qat
    seed: Annotated[int, Field(ge=0)]
