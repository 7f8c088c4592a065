"""Every kind of mistake in the params is one line: the key, the value, the choices."""

from pathlib import Path
from typing import Any

import pytest

from quantstudy.errors import UserError
from quantstudy.params import load_methods, load_params
from tests.conftest import Project
from tests.params import ABSENT, TINY_PARAMS

MISTAKES: dict[str, tuple[str, Any, str]] = {
    "unknown key": ("studies.tiny.data.imagesize", 32, "imagesize.*unknown key.*did you mean image_size"),
    "unknown section": ("measures", {}, "measures.*unknown key.*did you mean measure"),
    "missing key": ("studies.tiny.data.image_size", ABSENT, r"studies\.tiny\.data\.image_size: missing"),
    "missing section": ("qat", ABSENT, "qat: missing"),
    "wrong type": ("studies.tiny.seed", "0", r"studies\.tiny\.seed: '0'"),
    "out of range": ("studies.tiny.training.learning_rate", 0.0, r"learning_rate: 0.0: .*greater than 0"),
    "unknown choice": ("studies.tiny.training.optimizer", "adam", "'adam' is unknown.*choose one of sgd, adamw"),
    "unknown kind": ("methods.int8_static.kind", "statc", "kind: 'statc' is unknown.*did you mean static"),
    "no kind": ("methods.int8_static.kind", ABSENT, "methods.int8_static.kind: missing"),
    "unknown key of a kind": ("methods.fp16.bits", 8, "methods.fp16.bits.*unknown key.*choose one of kind, dtype"),
    "group size": ("methods.int4_weight_only.group_size", 48, "group_size: 48 does not divide.*one of 8, 16, 32"),
    "bits": ("methods.int8_static.weight_bits", 9, "weight_bits: 9: .*less than or equal to 8"),
    "no budget": ("methods.mixed_budget.mean_bits", None, "mixed_budget needs the key mean_bits or bit_operations"),
    "two ways to clip": ("methods.clip_int8_p99.activation_range", "mse", "cuts the range minmax, not mse"),
    "percentile not reported": ("methods.clip_int8_p99.clip_percentile", 98.5, "98.5 is not in outliers.percentiles"),
    "codes that cannot be held": ("methods.int8_static.group_size", 32, "saturation_free goes with scales per channel"),
    "source without its key": ("studies.tiny.data.source", "folder", "source folder needs the key path"),
    "study not defined": ("run", ["tinny"], "run: 'tinny' is unknown .did you mean tiny"),
    "method not defined": ("ptq", ["int8_statc"], "ptq: 'int8_statc' is unknown .did you mean int8_static"),
    "method that trains": ("ptq", ["qat_int8"], "ptq: 'qat_int8' is unknown"),
    "method that does not train": ("qat", ["int8_static"], "qat: 'int8_static' is unknown"),
    "method listed twice": ("ptq", ["fp16", "fp16"], r"ptq: .* lists a name twice"),
    "study listed twice": ("run", ["tiny", "tiny"], r"run: .* lists a name twice"),
    "nothing listed": ("ptq", [], r"ptq: \[\] is empty"),
    "width listed twice": ("sensitivity.bits", [4, 4], "lists a width twice"),
    "name taken": ("methods.fp32", {"kind": "cast", "dtype": "float16"}, "methods.fp32: this name is taken"),
    "name with capitals": ("studies.Tiny", {}, "Tiny"),
    "override of a plain method": ("studies.tiny.qat.methods", {"qat_int8": {"epochs": 2}}, "'qat_int8' is unknown"),
    "budget without its study": ("budget", {"studies": [], "methods": ["mixed_budget"]}, "studies: tiny is missing"),
    "export of what does not run": ("export.ptq", ["int8_gptq"], "export.ptq: 'int8_gptq' is unknown"),
    "scaling law of what does not run": ("scaling_law.ptq", ["int9"], "scaling_law.ptq: 'int9' is unknown"),
}


@pytest.mark.parametrize(("key", "value", "line"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line(key: str, value: Any, line: str, project: Project) -> None:
    project.edit(key, value)
    with pytest.raises(UserError, match=line) as raised:
        load_params()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "line"), [("a: [", "not valid YAML"), ("- a", "is not a mapping")], ids=["YAML", "list"]
)
def test_a_file_that_is_no_mapping_is_refused(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        load_params(path)


def test_a_folder_without_params_has_only_the_methods_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    assert {"int8_static", "int4_gptq", "qat_int8"} <= load_methods(tmp_path / "params.yaml").keys()


def test_a_method_may_have_any_name(project: Project) -> None:
    project.edit("methods.tuned_int8", TINY_PARAMS["methods"]["qat_int8"])
    params = load_params()
    assert params.method("tuned_int8").trains and not params.method("int8_static").trains
