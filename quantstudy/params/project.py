"""The whole of `params.yaml`, and how it is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from quantstudy.errors import UserError, unknown
from quantstudy.params.checks import check_sections
from quantstudy.params.methods import Method, Rounding
from quantstudy.params.mistakes import first_mistake
from quantstudy.params.presets import with_presets
from quantstudy.params.section import Bits, Name, Section
from quantstudy.params.studies import Study

PARAMS_FILE = Path("params.yaml")
DEFAULT_METHODS = Path(__file__).with_name("defaults.yaml")
"""The repository's `params.yaml`, whose methods a folder without one has."""


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
    raw = with_presets(_read(path))
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(first_mistake(error, raw, Params)) from None
    check_sections(params)
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
        raise UserError(first_mistake(error, raw, Methods)) from None


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
