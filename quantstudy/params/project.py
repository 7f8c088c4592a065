"""The whole of `params.yaml`, and how it is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from quantstudy.errors import shown, unknown
from quantstudy.params.checks import section_mistakes
from quantstudy.params.methods import Method, Rounding
from quantstudy.params.mistakes import mistakes, refusal
from quantstudy.params.presets import with_presets
from quantstudy.params.reading import read_params
from quantstudy.params.section import Images, Name, Seconds, Section, Target
from quantstudy.params.studies import Study

PARAMS_FILE = Path("params.yaml")
DEFAULT_METHODS = Path(__file__).with_name("defaults.yaml")
"""The repository's `params.yaml`; a folder without a `params.yaml` uses its methods."""


class Measure(Section):
    """How accuracy and latency are measured."""

    runtimes: list[Literal["inductor", "onnxruntime", "openvino"]]
    """The runtimes to try in addition to eager mode, which always runs."""
    seconds: Seconds
    """Time spent timing each batch size on each runtime, the variant and fp32 together."""
    threads: Annotated[int, Field(ge=1, le=512)] | None = None


class Sensitivity(Rounding):
    """How the stage `sensitivity` quantizes one layer alone: with the rounding of the methods that use the result."""

    bits: Annotated[list[int], Field(min_length=1)]
    """Widths of the one layer's weights, from 2 to 8; 16 is float16."""
    images: Images | None = None
    """How many of the first calibration images to use; None: all."""

    @field_validator("bits")
    @classmethod
    def _bits_differ(cls, value: list[int]) -> list[int]:
        if wrong := [bits for bits in value if bits not in (2, 3, 4, 5, 6, 7, 8, 16)]:
            raise ValueError(f"{shown(wrong[0])} is no width; choose from 2 to 8, and 16")
        if len(set(value)) < len(value):
            raise ValueError(f"{value} lists a width twice")
        return value


class Budget(Section):
    """Mixed precision within a budget, based on the sensitivity of each layer."""

    studies: list[Name]
    """Studies of `run` whose sensitivity is measured."""
    methods: list[Name]
    """Methods of kind mixed_budget; like those of `ptq` they run in every study of `run`."""


class Runtime(Section):
    """What the stages run on."""

    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of a training stage: one per GPU, or several that share a CPU's cores."""
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    """CPU threads of training, calibrating and quantizing; None: all cores. They change float sums in the last bit."""


class Export(Section):
    """The methods of `ptq`, `budget.methods` and `qat` whose variants are also written as ONNX files."""

    ptq: list[Name]
    budget: list[Name]
    qat: list[Name]


class ScalingLaw(Section):
    """The variants on the scaling-law plot: the same schemes with and without training."""

    ptq: list[Name]
    qat: list[Name]


class Outliers(Section):
    """The outlier study: the percentiles it reports, and at which a method may clip activations."""

    percentiles: Annotated[list[Annotated[float, Field(gt=50, lt=100)]], Field(min_length=1, max_length=20)]

    @field_validator("percentiles")
    @classmethod
    def _percentiles_differ(cls, value: list[float]) -> list[float]:
        if len({f"{percentile:g}" for percentile in value}) < len(value):
            raise ValueError("lists a percentile twice")
        return value


class Methods(Section):
    """The part of `params.yaml` that defines methods."""

    methods: dict[Name, Method]


class Params(Section):
    """The whole of `params.yaml`."""

    run: list[Name]
    ship: list[Name]
    """Studies of `run` with a goal; the stage `search` finds a variant to ship for each."""
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
    target: Target
    """The CPUs that int8 variants are made for; with `vnni`, `saturation_free` is off."""

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
    """Read and validate `params.yaml`; raise `UserError` with a line for each mistake in it."""
    raw, lines = with_presets(read_params(path))
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise refusal([*lines, *mistakes(error, Params), *section_mistakes(raw)]) from None
    if lines := lines + section_mistakes(raw):
        raise refusal(lines)
    return params


def load_methods(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Return the rows of `methods` by name: from a `params.yaml` that has them, else from this package.

    Raises:
        UserError: a row has a mistake.
    """
    raw = read_params(path) if path.is_file() else {}
    if "methods" not in raw:
        raw = read_params(DEFAULT_METHODS)
    try:
        return dict(Methods.model_validate({"methods": raw["methods"]}).methods)
    except ValidationError as error:
        raise refusal(mistakes(error, Methods)) from None
