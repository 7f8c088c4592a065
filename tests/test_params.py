"""Every kind of mistake in the params is one line: the key, the value, the choices. All are told at once."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from dvc.utils.serialize import parse_yaml

from quantstudy.__main__ import check
from quantstudy.errors import UserError
from quantstudy.params import Params, load_methods, load_params
from quantstudy.params.section import Section
from tests.conftest import ROOT, Project
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
    "misspelt section": ("studies.tiny.qat.epoch", 1, "'epoch' is an unknown key .did you mean epochs"),
    "misspelt key of an override": (
        "studies.tiny.qat.methods",
        {"qat_w4a8": {"epoch": 1}},
        "'epoch' is an unknown key .did you mean epochs.*choose one of epochs, learning_rate, augmentation",
    ),
    "no number": ("studies.tiny.data.channels", 2, "2 is unknown; choose one of 1, 3"),
    "no width": ("sensitivity.bits", [4, 9], "sensitivity.bits: .*9 is no width"),
    "path without its source": ("studies.tiny.data.path", "images", "data.path: 'images': source digits takes no path"),
    "set without its source": ("studies.tiny.data.dataset", "MNIST", "source digits takes no dataset"),
    "checksum without its source": ("studies.tiny.data.sha256", "ab" * 32, "source digits takes no sha256"),
    "checksum without weights": ("studies.tiny.model.weights_sha256", "ab" * 32, "goes with the path of a file"),
    "checksum of no code": ("studies.tiny.model.code_sha256", "ab" * 32, "goes with an architecture package.module:"),
    "checksum without images": ("studies.tiny.calibration.sha256", "ab" * 32, "goes with the key path"),
    "name too long": ("methods." + "a" * 65, {"kind": "cast", "dtype": "float16"}, "at most 64 characters"),
    "path too long": ("studies.tiny.model.weights", "a" * 256, "more than 255"),
    "path of no letter": ("studies.tiny.model.weights", "a\0b", "none that controls a terminal"),
    "percentile listed twice": ("outliers.percentiles", [99.9, 99.0, 95.0, 99], "lists a percentile twice"),
    "folder taken": ("studies.pages", {}, "studies.pages: this name is taken"),
    "long text": ("methods.int8_static.kind", "x" * 10**5, "kind: 'xxx.*xxx' is unknown; choose one of cast"),
    "large value": ("studies.tiny.seed", [[7] * 1000] * 50, "seed: .*valid integer"),
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
    "nothing listed": ("run", [], r"run: \[\] is empty"),
    "width listed twice": ("sensitivity.bits", [4, 4], "lists a width twice"),
    "name taken": ("methods.fp32", {"kind": "cast", "dtype": "float16"}, "methods.fp32: this name is taken"),
    "name with capitals": ("studies.Tiny", {}, "Tiny"),
    "override of a plain method": ("studies.tiny.qat.methods", {"qat_int8": {"epochs": 2}}, "'qat_int8' is unknown"),
    "validation images of one's own": ("studies.tiny.qat.validation_fraction", 0.2, "set training.validation_fraction"),
    "budget without its study": ("budget", {"studies": [], "methods": ["mixed_budget"]}, "studies: tiny is missing"),
    "export of what does not run": ("export.ptq", ["int8_gptq"], "export.ptq: 'int8_gptq' is unknown"),
    "scaling law of what does not run": ("scaling_law.ptq", ["int9"], "scaling_law.ptq: 'int9' is unknown"),
    "export of what is not listed": ("export.ptq", ["qat_int8", "fp16"], "export.ptq: not in ptq: qat_int8; remove"),
}
BEYOND: dict[str, tuple[Any, ...]] = {
    "studies.tiny.seed": (-1, 2**32, 10**40, 1e30),
    "studies.tiny.training.epochs": (10**5, -1, 1e30),
    "studies.tiny.training.batch_size": (1, 0, 10**9),
    "studies.tiny.training.learning_rate": (0.0, -1.0, 1e30, float("inf"), float("nan"), True),
    "studies.tiny.training.weight_decay": (-1e-9, 1e30),
    "studies.tiny.training.max_images": (1, 10**12),
    "studies.tiny.qat.epochs": (0, 10**5),
    "studies.tiny.calibration.bins": (10**12, 63),
    "studies.tiny.calibration.batches": (0, 10**12),
    "studies.tiny.calibration.batch_size": (0, 10**12),
    "studies.tiny.data.crop_fraction": (1e-30, 1.5),
    "studies.tiny.data.std": ([0.5, 0.5, 0.0], [0.5, 0.5, 1e-30], [0.5, 0.5, float("inf")]),
    "studies.tiny.data.mean": ([0.5, 0.5, float("inf")], [0.5, 0.5, 1e30], [0.5]),
    "studies.tiny.data.image_size": (10**12, [32, 0]),
    "studies.tiny.data.max_train": (0, 10**12),
    "methods.int8_static.steps": (0, float("inf"), 10**9),
    "methods.qat_w4a8.epochs": (0, 10**12),
    "methods.qat_w4a8.learning_rate": (0, float("inf")),
    "measure.seconds": (0, float("inf"), 1e30),
    "measure.threads": (0, 100_000),
    "runtime.processes": (0, 100_000),
    "sensitivity.images": (0, 10**12),
    "outliers.percentiles": ([99.9, 99.0, 95.0, float("nan")], [99 - number / 100 for number in range(30)]),
}
"""Numbers that no machine bears, or that mean nothing."""


def refused(path: Path = Path("params.yaml")) -> list[str]:
    """Return the lines by which a file is refused, each of at most 200 characters."""
    with pytest.raises(UserError) as raised:
        load_params(path)
    lines = str(raised.value).split("\n")
    assert all(line and len(line) <= 200 for line in lines)
    return lines


@pytest.mark.parametrize(("key", "value", "line"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line(key: str, value: Any, line: str, project: Project) -> None:
    project.edit(key, value)
    assert any(re.search(line, found) for found in refused())


def sections(kind: type[Section], place: str) -> Iterator[str]:
    """Return where the sections below a class of sections lie, optional ones and the rows of a mapping too."""
    for name, field in kind.model_fields.items():
        row = {"studies": ".tiny", "methods": ".qat_w4a8"}.get(name, "")
        for one in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(one) and issubclass(one, Section):
                yield f"{place}{name}{row}"
                yield from sections(one, f"{place}{name}{row}.")


@pytest.mark.parametrize("place", [*sections(Params, "")])
def test_a_misspelt_key_of_any_section_is_one_line(place: str, project: Project) -> None:
    path = project.root / "params.yaml"
    section = params = yaml.safe_load(path.read_text())
    for part in place.split("."):
        section = section.setdefault(part, {})
    section["misspelt"] = 1
    path.write_text(yaml.safe_dump(params))
    assert any("'misspelt' is an unknown key" in line and "choose one of" in line for line in refused())


@pytest.mark.parametrize("key", BEYOND)
def test_a_number_has_bounds(key: str, project: Project) -> None:
    for value in BEYOND[key]:
        project.edit(key, value)
        assert [line for line in refused() if not line.startswith(key)] == []


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x' * 50] * 9)}]\n" for i in range(12))
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "YAML": (b"a: [", "not valid YAML at line 2, column 1"),
    "list": (b"- a", "is not a mapping"),
    "nothing": (b"", "is not a mapping"),
    "key twice": (b"run: [a]\nptq: []\nrun: [b]\n", 'not valid YAML at line 3, column 1: found duplicate key "run"'),
    "UTF-16": ("run: [a]".encode("utf-16"), "not UTF-8.*save it as UTF-8"),
    "zero bytes": (b"run: \0", "not valid YAML"),
    "deep": (b"run: " + b"[" * 100_000, "more than 20 levels"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(900)), "more than 20 levels"),
    "aliases": (BOMB.encode(), "stand for more than"),
    "aliases twice": (f"{BOMB}b: 1\nb: *a11\n".encode(), "stand for more than"),
    "alias of itself": (b"run: &a [*a]", "or for themselves"),
    "large": (b"a: " + b"x" * 2_000_000, "more than 1000000 bytes"),
    "date": (b"run: 2001-13-45", "not valid YAML"),
    "code": (b"run: !!python/object:os.system x", "not valid YAML"),
    "digits": (b"run: " + b"9" * 5000, "not valid YAML"),
    "number as a key": (b"studies: {7: {}}", "the key 7 is not text"),
    "two documents": (b"run: []\n---\nrun: []\n", "not valid YAML"),
}


@pytest.mark.parametrize(("content", "line"), UNREADABLE.values(), ids=list(UNREADABLE))
def test_a_file_that_is_no_mapping_is_refused(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    (found,) = refused(path)
    assert re.search(line, found)


def test_a_file_is_read_as_dvc_reads_it(project: Project) -> None:
    path = Path("params.yaml")
    text = path.read_text().replace("seed: 0", "seed: 010").replace("learning_rate: 1.0e-05", "learning_rate: 1e-5")
    path.write_text(text)
    row = load_params().study("tiny")
    seen = parse_yaml(text, path)["studies"]["tiny"]
    assert (row.seed, row.qat.learning_rate) == (seen["seed"], seen["qat"]["learning_rate"]) == (10, 1e-5)
    path.write_text(text.replace("seed: 010", "seed: 1:30"))
    assert refused() == ["studies.tiny.seed: '1:30': Input should be a valid integer"]


def test_all_mistakes_are_told_at_once(project: Project) -> None:
    project.edit("studies.tiny.data.imagesize", 32)
    project.edit("studies.tiny.data.image_size", ABSENT)
    project.edit("studies.tiny.data.path", "images")
    project.edit("methods.int8_static.group_size", 32)
    project.edit("measure.threads", 0)
    project.edit("ptq", ["int8_static"])
    found = refused()
    for line in (
        r"^studies\.tiny\.data\.image_size: missing",
        r"^studies\.tiny\.data\.imagesize: 'imagesize' is an unknown key \(did you mean image_size\?\)",
        r"^studies\.tiny\.data\.path: 'images': source digits takes no path",
        r"^methods\.int8_static\.saturation_free",
        r"^measure\.threads: 0",
        r"^export\.ptq: not in ptq: int4_weight_only; remove",
        r"^scaling_law\.ptq: not in ptq, budget.methods or qat: fp16, int4_static; remove",
    ):
        assert sum(bool(re.search(line, each)) for each in found) == 1, line
    assert len(found) == 7


def test_a_preset_that_is_wrong_hides_no_other_mistake(project: Project) -> None:
    for key in ("image_size", "mean", "std"):
        project.edit(f"studies.tiny.data.{key}", ABSENT)
    project.edit("studies.tiny.data.preprocessing", "IMAGENET1K_V9")
    project.edit("studies.tiny.seed", -1)
    preset, seed = refused()
    assert preset.startswith("studies.tiny.data.preprocessing: 'IMAGENET1K_V9' is unknown") and "seed: -1" in seed


def test_hundreds_of_mistakes_are_not_all_told(project: Project) -> None:
    project.edit("ptq", [f"wrong_{number}" for number in range(500)])
    found = refused()
    assert len(found) == 41 and re.fullmatch(r"and \d+ more mistakes", found[-1])


def test_check_tells_what_params_name_and_is_not_there(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    check()
    assert capsys.readouterr().out == "params.yaml: no mistake found; studies: 1, variants of each: 18\n"
    project.edit("measure.threads", 0)
    project.edit("studies.tiny.model", {"architecture": "mobilenetv2", "weights": "w.pth", "weights_sha256": "ab" * 32})
    project.edit("studies.tiny.data.source", "torchvision")
    project.edit("studies.tiny.data.dataset", "CIFAR-10")
    project.edit("studies.tiny.calibration.path", "images")
    with pytest.raises(UserError) as raised:
        check()
    lines = str(raised.value).split("\n")
    assert [line.partition(" ")[0].removeprefix("studies.tiny.").rstrip(":") for line in lines] == [
        *("measure.threads", "model.architecture", "data.dataset", "model.weights", "calibration.path")
    ]
    assert all(len(line) <= 200 for line in lines)


@pytest.mark.parametrize("name", ["sys:exit", "builtins:print", "math:hypot", "quits:network", "itertools:chain"])
def test_an_architecture_without_code_of_its_own_is_refused(name: str, project: Project, monkeypatch: Any) -> None:
    Path("quits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(Path.cwd())
    project.edit("studies.tiny.model.architecture", name)
    with pytest.raises(UserError, match=r"studies\.tiny\.model\..*(has no source file|cannot be imported)"):
        check()


@pytest.mark.slow
def test_the_command_ends_with_a_line_for_each_mistake_and_repro_with_the_same(project: Project) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        called = [sys.executable, "-m", *command]
        return subprocess.run(called, env=environment, text=True, capture_output=True, check=False)

    for file in ("dvc.yaml", "code.yaml"):
        Path(file).write_text((ROOT / file).read_text())
    project.edit("ptq", ["int8_static"])
    for command in (("quantstudy", "check"), ("tools.dvc", "repro")):
        done = run(*command)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and done.stdout == ""
        assert [line.split()[:2] for line in lines] == [["error:", "export.ptq:"], ["error:", "scaling_law.ptq:"]]
    project.edit("export.ptq", [])
    project.edit("scaling_law.ptq", [])
    assert run("quantstudy", "check").returncode == 0


def test_a_folder_without_params_has_only_the_methods_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    assert {"int8_static", "int4_gptq", "qat_int8"} <= load_methods(tmp_path / "params.yaml").keys()


def test_a_method_may_have_any_name(project: Project) -> None:
    project.edit("methods.tuned_int8", TINY_PARAMS["methods"]["qat_int8"])
    params = load_params()
    assert params.method("tuned_int8").trains and not params.method("int8_static").trains
