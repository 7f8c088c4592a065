"""The rows of `methods`: one class per `kind`, with its numbers.

`quantstudy.methods` registers a recipe for each of these classes. `MethodRow` has all that other code asks of a row.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator

from quantstudy.params.section import (
    GROUP_SIZES,
    Bits,
    CalibrationAugmentation,
    Epochs,
    Float16,
    Rate,
    Schedule,
    Section,
    Target,
)
from quantstudy.params.studies import Qat, QatOverrides


class MethodRow(Section):
    """What is known of every method: how it is run, and how its variants are named in tables and plots."""

    trains: ClassVar[bool] = False
    """Whether it needs the training images: a method of `qat`, not of `ptq`."""
    needs_sensitivity: ClassVar[bool] = False
    """Whether it needs what the stage `sensitivity` measured: a method of `budget.methods`."""
    is_mixed: ClassVar[bool] = False
    """Whether its layers have different bits."""
    kind: str

    @property
    def bits(self) -> int | None:
        """Bits of the weights; None if only a variant knows them."""
        return None

    @property
    def widths(self) -> str:
        """Bits of weights and activations: `4/8`, or `8/-` where activations stay in float32."""
        raise NotImplementedError

    def made_for(self, target: Target) -> Self:
        """Return the row as it is for the CPUs of `target`."""
        return self

    def said(self) -> dict[str, Any]:
        """Return the keys that params.yaml sets in the row, without defaults."""
        return self.model_dump(exclude_unset=True)

    def training(self, row: Qat, name: str) -> Qat:
        """Return how this method, called `name`, trains in a study whose `qat` is `row`."""
        return row

    @property
    def clips(self) -> bool:
        """Whether it is a row of the outlier study: params.yaml sets its `clip_percentile`, even if only to null."""
        return "clip_percentile" in self.model_fields_set


class Rounding(Section):
    """How weights become symmetric integers, per channel or per group, whatever their bits.

    These keys are in the order of a post-training method's steps; see `methods.post_training`. Of the methods that
    train, qat_joint starts from all of these steps, qat_lsq only from ranges.
    """

    group_size: int | None = None
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Scales that clip nothing, or scales of the least squared error of the weights."""
    rounding: Literal["nearest", "gptq", "adaround", "brecq"] = "nearest"
    steps: Annotated[int, Field(ge=1, le=100_000)] = 500
    """Training steps: per layer with adaround, per block with brecq, in all with finetune."""
    gain_correction: bool = False
    """Whether the scales make up for what rounding takes from the size of each output channel."""
    bias_correction: bool = False
    """Whether the bias corrects the mean error of each output channel on the calibration images."""
    finetune: bool = False
    """Whether weights, scales and biases then learn together to predict as fp32 does on the calibration images."""
    finetune_augmentation: CalibrationAugmentation = "crop_flip"
    """How finetune augments the images: flip them at random; `crop_flip` also cuts out half of their area or more."""

    @field_validator("group_size")
    @classmethod
    def _group_size_divides(cls, value: int | None) -> int | None:
        if value is not None and value not in GROUP_SIZES:
            choices = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"{value} does not divide the layers' rows into whole blocks; choose one of {choices}")
        return value


class Scheme(Rounding, MethodRow):
    """Numbers that every uniform integer method has."""

    weight_bits: Bits
    edge_bits: Bits | None = None
    """The least bits of the first and the last layer, weights and activations; None: the same as in other layers."""
    fragile_bits: Bits | None = 8
    """The most bits of a layer where `weight_bits` are four or fewer (`methods.fragile`); None: all have the same."""
    fragile_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """The share by which `fragile_bits` may make the weights larger."""
    fragile_between: bool = True
    """Whether a layer may get widths in between; ONNX files store four bits as they are, but five to seven as eight."""
    equalize: bool = False
    """Whether weight ranges of neighbouring layers are made equal first of all, and high biases are absorbed."""

    @property
    def bits(self) -> int:
        return self.weight_bits

    @property
    def widths(self) -> str:
        return f"{self.weight_bits}/{getattr(self, 'activation_bits', '-')}"


class Cast(MethodRow):
    """Every parameter cast to a 16-bit float type."""

    kind: Literal["cast"]
    dtype: Float16

    @property
    def bits(self) -> int:
        return 16

    @property
    def widths(self) -> str:
        return "16/16"


class WeightOnly(Scheme):
    """Integer weights, floating-point activations."""

    kind: Literal["weight_only"]


class IntegerProducts(Scheme):
    """The keys of methods with integer weights and integer activations."""

    activation_bits: Bits = 8
    saturation_free: bool = False
    """Whether 8-bit weights, once frozen, are limited so that int8 sums do not saturate on x86 CPUs without VNNI."""
    attention_products: bool = False
    """Whether the operands of attention's two matrix products are rounded like the inputs of layers."""

    def made_for(self, target: Target) -> Self:
        return self if target == "any_x86" else self.model_copy(update={"saturation_free": False})

    @field_validator("saturation_free")
    @classmethod
    def _codes_can_be_held(cls, value: bool, info: ValidationInfo) -> bool:
        learned = info.data.get("rounding") in ("adaround", "brecq") or info.data.get("finetune")
        if value and (info.data.get("group_size") is not None or learned):
            raise ValueError(
                "saturation_free goes with scales per channel and rounding nearest or gptq; "
                "remove it, or group_size, finetune or the rounding"
            )
        return value


class Dynamic(IntegerProducts):
    """Integer weights; the activation range is taken per batch at run time."""

    kind: Literal["dynamic"]


class Static(IntegerProducts):
    """Integer weights; the activation range comes from calibration, clipped at a percentile if one is given."""

    kind: Literal["static"]
    fragile_operations: Annotated[float, Field(ge=0, le=4)] = 0.25
    """The share by which bit-operations may grow, to give activations of six or fewer bits more bits."""
    activation_range: Literal["minmax", "moving_average", "mse", "entropy"] = "minmax"
    clip_percentile: Annotated[float, Field(gt=50, le=100)] | None = None

    @field_validator("clip_percentile")
    @classmethod
    def _clips_one_way(cls, value: float | None, info: ValidationInfo) -> float | None:
        how = info.data.get("activation_range", "minmax")
        if value is not None and how != "minmax":
            raise ValueError(f"clip_percentile cuts the range minmax, not {how}; remove one of the keys")
        return value


class Mixed(Scheme):
    """Some layers in integers, every other layer in a 16-bit float type."""

    is_mixed: ClassVar[bool] = True
    dtype: Float16 = "float16"

    @property
    def widths(self) -> str:
        return f"{self.weight_bits},16/16"


class MixedLinear(Mixed):
    """Linear layers in integers."""

    kind: Literal["mixed_linear"]


class MixedVariance(Mixed):
    """The `fraction` of layers with the lowest weight variance in integers."""

    kind: Literal["mixed_variance"]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5


class MixedBudget(Rounding, MethodRow):
    """Each layer in the bits that lose least within a budget; layers at 16 bits in a 16-bit float type.

    The stage `sensitivity` measures the losses; its `bits` are the choices.
    """

    needs_sensitivity: ClassVar[bool] = True
    is_mixed: ClassVar[bool] = True
    kind: Literal["mixed_budget"]
    dtype: Float16 = "float16"
    mean_bits: Annotated[float, Field(gt=0, le=16)] | None = None
    """Stored bits per weight, scales included."""
    bit_operations: Annotated[float, Field(gt=0, le=1)] | None = Field(None, validate_default=True)
    """Σ MACs · weight bits · activation bits, as a share of fp32's."""

    @field_validator("bit_operations")
    @classmethod
    def _has_a_budget(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("mean_bits", 0.0) is None:
            raise ValueError("kind mixed_budget needs the key mean_bits or bit_operations")
        return value

    @property
    def widths(self) -> str:
        return "2-16/16"


class TrainedStatic(Static):
    """The common part of the methods that train a static scheme."""

    trains: ClassVar[bool] = True
    refused: ClassVar[tuple[str, ...]]
    """Keys that must keep their defaults."""

    @field_validator("*")
    @classmethod
    def _takes_its_keys(cls, value: Any, info: ValidationInfo) -> Any:
        key = info.field_name or ""
        if key in cls.refused and value != cls.model_fields[key].default:
            (kind,), (*most, last) = get_args(cls.model_fields["kind"].annotation), cls.refused
            raise ValueError(f"kind {kind} takes no {', '.join(most)}{' or ' if most else ''}{last}; remove them")
        return value


class QatStatic(TrainedStatic):
    """The static scheme, fine-tuned."""

    refused = ("equalize", "weight_range", "rounding", "gain_correction", "bias_correction", "finetune")
    kind: Literal["qat_static"]  # type: ignore[assignment]


class QatWithScales(TrainedStatic):
    """The common part of the two methods that train the scales of a static scheme too, with numbers of their own."""

    weight_range: Literal["minmax", "mse"] = "mse"
    activation_range: Literal["minmax", "moving_average", "mse", "entropy"] = "mse"
    """Where the learned scales of activations start; `weight_range` says where those of weights start."""
    schedule: Schedule = "cosine"
    epochs: Epochs | None = None
    learning_rate: Rate | None = None
    """None: the study's, as with `epochs`. A study's `qat.methods` goes before both."""

    def training(self, row: Qat, name: str) -> Qat:
        here = row.methods.get(name, QatOverrides()).model_dump()
        own = here | {"schedule": self.schedule}
        for key in ("epochs", "learning_rate"):
            own[key] = here[key] or getattr(self, key)
        return row.model_copy(update={"methods": {}} | {key: value for key, value in own.items() if value is not None})


class QatLsq(QatWithScales):
    """The static scheme, fine-tuned with learned scales; BatchNorm is folded after training."""

    refused = (
        "equalize",
        "rounding",
        "gain_correction",
        "bias_correction",
        "finetune",
        "saturation_free",
        "attention_products",
        "fragile_operations",
    )
    kind: Literal["qat_lsq"]  # type: ignore[assignment]
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the fp32 model's predictions in the targets; the labels have the rest."""

    def training(self, row: Qat, name: str) -> Qat:
        """Return how it trains: by SGD, as in the paper. Adam's steps would carry small scales past zero."""
        return super().training(row, name).model_copy(update={"optimizer": "sgd"})


class QatJoint(QatWithScales):
    """Joint fine-tuning on the training images: a post-training result learns to predict what fp32 predicts.

    It starts from the post-training result of its keys. It needs labels only to choose the best epoch.
    """

    refused = ("saturation_free",)
    kind: Literal["qat_joint"]  # type: ignore[assignment]
    learning_rate: Rate = 0.03
    """The rate of the codes, in steps of the grid."""


class QatCast(Cast):
    """Mixed-precision fine-tuning, then a cast; float16 uses a gradient scaler."""

    trains: ClassVar[bool] = True
    kind: Literal["qat_cast"]  # type: ignore[assignment]


_PostTraining = Cast | WeightOnly | Dynamic | Static | MixedLinear | MixedVariance | MixedBudget
Method = Annotated[_PostTraining | QatStatic | QatLsq | QatJoint | QatCast, Field(discriminator="kind")]
METHOD_ROWS: dict[str, type[MethodRow]] = {
    get_args(row.model_fields["kind"].annotation)[0]: row for row in get_args(get_args(Method)[0])
}
"""The class of a row by its `kind`."""
