"""The typed, validated view of `params.yaml`.

Every section is a frozen pydantic model that forbids unknown keys, so a misspelt key, a wrong type or a
number out of range is an error of one line that names the key, the value and the choices.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantstudy.errors import UserError, unknown

PARAMS_FILE = Path("params.yaml")
DEFAULT_METHODS = Path(__file__).parent / "methods" / "defaults.yaml"
"""The methods of the repository's `params.yaml`, for a folder that has none."""
GROUP_SIZES = (8, 16, 32, 64, 128, 256)

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Bits = Annotated[int, Field(ge=2, le=8)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "constant", "one_cycle"]
Augmentation = Literal["none", "shift", "flip", "crop_flip"]


class Section(BaseModel):
    """A part of the params: immutable, no unknown keys, no coercion of strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


class Pace(Section):
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
    methods: dict[Name, Pace] = Field(default_factory=dict)
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


class Rounding(Section):
    """How weights become symmetric integers, per channel or per group, whatever their bits.

    What a post-training method does beyond rounding to nearest comes in the order of these keys; see
    `methods.post_training`. Of the methods that train, qat_joint starts from all of it, qat_lsq from ranges.
    """

    group_size: int | None = None
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Scales that clip nothing, or those of the least squared error of the weights."""
    rounding: Literal["nearest", "gptq", "adaround", "brecq"] = "nearest"
    seconds: Annotated[float, Field(gt=0)] = 480.0
    """The time that adaround, brecq and finetune may take each."""
    gain_correction: bool = False
    """Whether scales give back what rounding takes from the size of each output channel."""
    bias_correction: bool | Literal["analytic"] = False
    """Whether the mean error of each output channel goes into the bias: on calibration images, or by BatchNorm."""
    finetune: bool = False
    """Whether weights, scales and biases then learn together to predict what fp32 does on the calibration images."""

    @property
    def needs_images(self) -> bool:
        """Whether the method looks at the calibration images again."""
        return self.rounding != "nearest" or self.gain_correction or self.bias_correction is True or self.finetune

    def _refuse(self, *keys: str) -> None:
        """Raise `ValueError` if one of `keys` is not its default."""
        if any(getattr(self, key) != type(self).model_fields[key].default for key in keys):
            kind = getattr(self, "kind", "")
            *most, last = keys
            raise ValueError(f"kind {kind} takes no {', '.join(most)}{' or ' if most else ''}{last}; remove them")

    @field_validator("group_size")
    @classmethod
    def _group_size_divides(cls, value: int | None) -> int | None:
        if value is not None and value not in GROUP_SIZES:
            choices = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"{value} does not divide the layers' rows into whole blocks; choose one of {choices}")
        return value


class Scheme(Rounding):
    """Numbers that every uniform integer method has."""

    weight_bits: Bits
    edge_bits: Bits | None = None
    """The least bits of the first and the last layer, weights and activations; None: like every layer's."""
    equalize: bool = False
    """Whether weight ranges of neighbouring layers are made equal before all else, and high biases absorbed."""

    @property
    def needs_images(self) -> bool:
        """Whether the method looks at the calibration images again."""
        return self.equalize or super().needs_images


class Cast(Section):
    """Every parameter cast to a 16-bit float type."""

    kind: Literal["cast"]
    dtype: Literal["float16", "bfloat16"]


class WeightOnly(Scheme):
    """Integer weights, floating-point activations."""

    kind: Literal["weight_only"]


class IntegerProducts(Scheme):
    """What integer weights and integer activations have in common."""

    activation_bits: Bits = 8
    saturation_free: bool = False
    """Whether 8-bit weights are held to what int8 sums of x86 CPUs without VNNI can take, once they are frozen."""

    @model_validator(mode="after")
    def _codes_can_be_held(self) -> "IntegerProducts":
        learned = self.rounding in ("adaround", "brecq") or self.finetune
        if self.saturation_free and (self.group_size is not None or learned):
            raise ValueError(
                "saturation_free goes with scales per channel and rounding nearest or gptq; "
                "remove it, or group_size, finetune or the rounding"
            )
        return self


class Dynamic(IntegerProducts):
    """Integer weights; the activation range is taken per batch at run time."""

    kind: Literal["dynamic"]


class Static(IntegerProducts):
    """Integer weights; the activation range comes from calibration, clipped at a percentile if one is given."""

    kind: Literal["static"]
    activation_range: Literal["minmax", "moving_average", "mse", "entropy"] = "minmax"
    clip_percentile: Annotated[float, Field(gt=50, le=100)] | None = None

    @model_validator(mode="after")
    def _clips_one_way(self) -> "Static":
        if self.clip_percentile is not None and self.activation_range != "minmax":
            raise ValueError(
                f"clip_percentile cuts the range minmax, not {self.activation_range}; remove one of the keys"
            )
        return self


class MixedLinear(Scheme):
    """Linear layers in integers, every other layer in a 16-bit float type."""

    kind: Literal["mixed_linear"]
    dtype: Literal["float16", "bfloat16"] = "float16"


class MixedVariance(Scheme):
    """The `fraction` of layers with the lowest weight variance in integers, the rest in a 16-bit float type."""

    kind: Literal["mixed_variance"]
    dtype: Literal["float16", "bfloat16"] = "float16"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5


class MixedBudget(Rounding):
    """The bits of each layer that lose least within a budget; layers at 16 bits in a 16-bit float type.

    The losses are those of the stage `sensitivity`, and its `bits` are the choices.
    """

    kind: Literal["mixed_budget"]
    dtype: Literal["float16", "bfloat16"] = "float16"
    mean_bits: Annotated[float, Field(gt=0, le=16)] | None = None
    """Stored bits a weight, scales included."""
    bit_operations: Annotated[float, Field(gt=0, le=1)] | None = None
    """Σ MACs · weight bits · activation bits, as a share of fp32's."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> "MixedBudget":
        if self.mean_bits is None and self.bit_operations is None:
            raise ValueError("kind mixed_budget needs the key mean_bits or bit_operations")
        return self


class QatStatic(Static):
    """The static scheme, fine-tuned."""

    kind: Literal["qat_static"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _is_plain(self) -> "QatStatic":
        self._refuse("equalize", "weight_range", "rounding", "gain_correction", "bias_correction", "finetune")
        return self


class QatWithScales(Static):
    """What the two methods share that train a static scheme with its scales, at a pace of their own."""

    weight_range: Literal["minmax", "mse"] = "mse"
    activation_range: Literal["minmax", "moving_average", "mse", "entropy"] = "mse"
    """Where the learned scales start, as `weight_range` is."""
    schedule: Schedule = "cosine"
    epochs: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """None: the study's, as `epochs`; a study's `qat.methods` goes before both."""

    def of_study(self, row: Qat, name: str) -> Qat:
        """Return a study's row with the numbers of the method, called `name`, in it."""
        here = row.methods.get(name, Pace()).model_dump()
        own = here | {"schedule": self.schedule}
        for key in ("epochs", "learning_rate"):
            own[key] = here[key] or getattr(self, key)
        return row.model_copy(update={"methods": {}} | {key: value for key, value in own.items() if value is not None})


class QatLsq(QatWithScales):
    """The static scheme, fine-tuned with learned scales; BatchNorm is folded after training."""

    kind: Literal["qat_lsq"]  # type: ignore[assignment]
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the fp32 model's predictions in what is learned, beside the labels."""

    @model_validator(mode="after")
    def _is_trained(self) -> "QatLsq":
        self._refuse("equalize", "rounding", "gain_correction", "bias_correction", "finetune", "saturation_free")
        return self


class QatJoint(QatWithScales):
    """Joint fine-tuning on the training images: a post-training result learns to predict what fp32 does.

    It starts from what its keys make of the model after training, and needs no labels but to choose the best epoch.
    """

    kind: Literal["qat_joint"]  # type: ignore[assignment]
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    """Of the codes, in steps of the grid."""

    @model_validator(mode="after")
    def _moves_codes(self) -> "QatJoint":
        self._refuse("saturation_free")
        return self


class QatCast(Section):
    """Mixed-precision fine-tuning, then a cast; float16 uses a gradient scaler."""

    kind: Literal["qat_cast"]
    dtype: Literal["float16", "bfloat16"]


Method = Annotated[
    Cast
    | WeightOnly
    | Dynamic
    | Static
    | MixedLinear
    | MixedVariance
    | MixedBudget
    | QatStatic
    | QatLsq
    | QatJoint
    | QatCast,
    Field(discriminator="kind"),
]
BUDGET = "mixed_budget"
METHOD_ROWS: tuple[type[Section], ...] = get_args(get_args(Method)[0])


class Measure(Section):
    """How accuracy and latency are measured."""

    runtimes: list[Literal["inductor", "onnxruntime", "openvino"]]
    """What is tried beside eager mode, which always is."""
    seconds: Annotated[float, Field(gt=0)]
    """Time spent timing each batch size on each runtime, the variant and fp32 together."""
    threads: Annotated[int, Field(ge=1)] | None = None


class Sensitivity(Rounding):
    """What quantizing one layer alone is measured with: the same rounding as the methods that use the result."""

    bits: Annotated[list[Bits | Literal[16]], Field(min_length=1)]
    """Widths of the one layer's weights; 16 is float16."""
    images: Annotated[int, Field(ge=1)] | None = None
    """The first so many calibration images; None: all."""

    @field_validator("bits")
    @classmethod
    def _bits_differ(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value} lists a width twice")
        return value


class Budget(Section):
    """Mixed precision within a budget, which rests on the sensitivity of each layer."""

    studies: list[Name]
    """Studies of `run` whose sensitivity is measured."""
    methods: list[Name]
    """Methods of kind mixed_budget; like those of `ptq` they run in every study of `run`."""


class Runtime(Section):
    """What the stages run on."""

    processes: Annotated[int, Field(ge=1)] = 1
    """Processes of a training stage: one a GPU, or that share a CPU's cores."""


class Export(Section):
    """The methods of `ptq`, `budget.methods` and `qat` whose variants are also written as ONNX files."""

    ptq: list[str]
    budget: list[str]
    qat: list[str]


class ScalingLaw(Section):
    """The variants on the scaling-law plot: the same schemes with and without training."""

    ptq: list[str]
    qat: list[str]


class Outliers(Section):
    """The outlier study: the percentiles it reports, and at which a method may clip activations."""

    percentiles: Annotated[list[Annotated[float, Field(gt=50, lt=100)]], Field(min_length=1)]


class Methods(Section):
    """The part of `params.yaml` that defines methods."""

    methods: dict[Name, Method]


class Params(Section):
    """The whole of `params.yaml`."""

    run: list[Name]
    ptq: list[Name]
    budget: Budget
    qat: list[Name]
    export: Export
    studies: dict[Name, Study]
    methods: dict[Name, Method]
    outliers: Outliers
    sensitivity: Sensitivity
    measure: Measure
    runtime: Runtime
    scaling_law: ScalingLaw

    @property
    def variants(self) -> list[str]:
        """Every variant of a study: fp32, then the methods of `ptq`, `budget.methods` and `qat` in their order."""
        return ["fp32", *self.ptq, *self.budget.methods, *self.qat]

    def study(self, name: str) -> Study:
        """Return a study's row; raise `UserError` for a name that is not in `studies`."""
        if name not in self.studies:
            raise unknown("study", name, self.studies)
        return self.studies[name]

    def method(self, name: str) -> Any:
        """Return a method's row; raise `UserError` for a name that is not in `methods`."""
        if name not in self.methods:
            raise unknown("method", name, self.methods)
        return self.methods[name]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate `params.yaml`; raise `UserError` with one line for the first mistake in it."""
    raw = _read(path)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, raw)) from None
    _check_lists(params)
    return params


def load_methods(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Return the rows of `methods` by name: those of a `params.yaml` that has them, else those of this package.

    Raises:
        UserError: a row has a mistake.
    """
    raw = _read(path) if path.is_file() else {}
    if "methods" not in raw:
        raw = _read(DEFAULT_METHODS)
    try:
        return dict(Methods.model_validate({"methods": raw["methods"]}).methods)
    except ValidationError as error:
        raise UserError(_one_line(error, raw)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's root") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {raw!r} is not a mapping of sections")
    return raw


def _check_lists(params: Params) -> None:
    lowered: dict[str, str] = {}
    for name in params.studies:
        other = lowered.setdefault(name.lower(), name)
        if other != name:
            raise UserError(f"studies: {other!r} and {name!r} differ only in case; rename one")
    for key, names, choices in (
        ("run", params.run, list(params.studies)),
        ("ptq", params.ptq, [m for m, row in params.methods.items() if not row.kind.startswith(("qat", BUDGET))]),
        ("budget.studies", params.budget.studies, params.run),
        ("budget.methods", params.budget.methods, [m for m, row in params.methods.items() if row.kind == BUDGET]),
        ("qat", params.qat, [m for m, row in params.methods.items() if row.kind.startswith("qat")]),
        ("export.ptq", params.export.ptq, params.ptq),
        ("export.budget", params.export.budget, params.budget.methods),
        ("export.qat", params.export.qat, params.qat),
        ("scaling_law.ptq", params.scaling_law.ptq, params.variants),
        ("scaling_law.qat", params.scaling_law.qat, params.variants),
    ):
        if not names and not key.startswith(("export", "budget")):
            raise UserError(f"{key}: [] is empty; list one or more of {', '.join(choices)}")
        for name in names:
            if name not in choices:
                raise unknown(key, name, choices)
        if len(set(names)) < len(names):
            raise UserError(f"{key}: {names} lists a name twice")
    _check_names(params)
    _check_paces(params)
    _check_percentiles(params)
    unmeasured = [study for study in params.run if study not in params.budget.studies]
    if params.budget.methods and unmeasured:
        raise UserError(f"budget.studies: {', '.join(unmeasured)} is missing; budget.methods run in every study of run")


def _check_names(params: Params) -> None:
    """A method's name says where its model lies, so `qat_` marks the methods that train, and them alone."""
    for name, row in params.methods.items():
        if name in ("fp32", "finetune"):
            raise UserError(f"methods.{name}: this name is taken; choose another")
        trains = row.kind.startswith("qat")
        if name.startswith("qat_") != trains:
            rule = "begins with qat_" if trains else "does not begin with qat_"
            raise UserError(f"methods.{name}: kind {row.kind} wants a name that {rule}; rename it")


def _check_paces(params: Params) -> None:
    learned = [name for name, row in params.methods.items() if isinstance(row, QatWithScales)]
    for study, row in params.studies.items():
        for name in row.qat.methods:
            if name not in learned:
                raise unknown(f"studies.{study}.qat.methods", name, learned)


def _check_percentiles(params: Params) -> None:
    listed = params.outliers.percentiles
    for name, row in params.methods.items():
        percentile = getattr(row, "clip_percentile", None)
        if percentile is not None and percentile not in listed:
            choices = ", ".join(map(str, listed))
            key = f"methods.{name}.clip_percentile"
            raise UserError(f"{key}: {percentile} is not in outliers.percentiles; choose one of {choices} or add it")


def _one_line(error: ValidationError, raw: dict[str, Any]) -> str:
    first = error.errors()[0]
    loc = _real_location(first["loc"], raw)
    key = ".".join(str(part) for part in loc) or "params.yaml"
    value = first["input"]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(loc[:-1], raw)
        return str(unknown(key, loc[-1], owner.model_fields)).replace("is unknown", "is an unknown key")
    if kind == "missing":
        return f"{key}: missing; this key is required"
    if kind == "union_tag_invalid":
        tags = str(context["expected_tags"]).replace("'", "").split(", ")
        return str(unknown(f"{key}.kind", context["tag"], tags))
    if kind == "union_tag_not_found":
        return f"{key}.kind: missing; this key is required"
    if kind == "literal_error":
        return str(unknown(key, value, re.findall(r"'([^']*)'", str(context["expected"]))))
    if kind == "string_pattern_mismatch" and "[key]" in key:
        return _bad_name(str(value), raw)
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if message.startswith(str(value)) else f"{key}: {value!r}: {message}"


def _bad_name(value: str, raw: dict[str, Any]) -> str:
    for section in ("studies", "methods"):
        names = [str(name) for name in raw.get(section) or {}]
        twins = [name for name in names if name.lower() == value.lower() and name != value]
        if value in names and twins:
            return f"{section}: {twins[0]!r} and {value!r} differ only in case; rename one"
    return f"{value!r}: a study's or method's name is made of a-z, 0-9 and _ only"


def _real_location(loc: tuple[int | str, ...], raw: Any) -> list[int | str]:
    """Drop the union tags that pydantic puts into a location, which are not keys of the file."""
    kept: list[int | str] = []
    for index, part in enumerate(loc):
        is_tag = len(kept) == 2 and kept[0] == "methods" and index == 2
        if not is_tag:
            kept.append(part)
    return kept


def _model_at(loc: list[int | str], raw: dict[str, Any]) -> type[Section]:
    """Return the section that a location of the file belongs to."""
    if not loc:
        return Params
    if loc[0] == "methods":
        kind = raw["methods"][loc[1]]["kind"]
        return next(row for row in METHOD_ROWS if kind in get_args(row.model_fields["kind"].annotation))
    if loc[0] == "studies":
        return Study if len(loc) == 2 else _section(Study, str(loc[2]))
    return _section(Params, str(loc[0]))


def _section(owner: type[Section], key: str) -> type[Section]:
    section: Any = owner.model_fields[key].annotation
    return section
