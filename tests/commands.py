"""Whether a command of the documentation is one: its targets, options and overrides exist."""

import argparse
import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.cli import parse_args
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

from quantstudy.params import load_params
from tests.conftest import ROOT


class _ParsedError(Exception):
    """The arguments are parsed; the program need not run."""


def check(line: str, folder: Path) -> None:
    """Fail unless every command of a line could run; `folder` is for a copy of params.yaml."""
    for command in re.split(r" && | \| ", line):
        words = shlex.split(command.strip(), comments=True)
        program = words[0] if words else ""
        assert program in CHECKS, f"{program!r} of {line!r} is no command that the tests know"
        CHECKS[program](words[1:], folder)


def _make(words: list[str], folder: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, given, _ = word.partition("=")
        if given:
            assert f"$({name})" in makefile, f"the Makefile reads no {name}"
        else:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), f"no target {name} in the Makefile"


def _python(words: list[str], folder: Path) -> None:
    assert words[0] == "-m", words
    module, rest = words[1], words[2:]
    if module == "stages":
        module, rest = f"stages.{rest[0]}", rest[1:]
    if module in ("quantstudy", "docs.drawing"):
        module += ".__main__"
    if module.startswith(("tools.", "tests.harness.")):  # they take no arguments, or another command's
        assert importlib.util.find_spec(module), module
        return
    parses(importlib.import_module(module).main, rest)


def parses(main: Callable[[list[str]], Any], words: list[str]) -> None:
    """Fail unless `main` takes these arguments; it runs no further."""
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, given: Any = None, namespace: Any = None) -> None:
        original(self, given, namespace)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(_ParsedError):
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        main(words)


def _dvc(words: list[str], folder: Path) -> None:
    arguments = parse_args(words)
    overrides = getattr(arguments, "set_param", None) or []
    sweeps = get_hydra_sweeps({"params.yaml": overrides}) if overrides else []
    assert len(sweeps) <= 1 or arguments.queue, f"{words}: several values need --queue"
    for sweep in sweeps:
        copy = folder / "params.yaml"
        shutil.copy(ROOT / "params.yaml", copy)
        apply_overrides(copy, sweep["params.yaml"])
        load_params(copy)
    for target in getattr(arguments, "targets", None) or []:
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        assert target.partition("@")[0] in stages or (ROOT / target).exists(), target


def _pip(words: list[str], folder: Path) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in project["optional-dependencies"], extra


def _ray(words: list[str], folder: Path) -> None:
    from ray.scripts.scripts import cli

    cli.commands[words[0]].make_context(words[0], words[1:])


def _gto(words: list[str], folder: Path) -> None:
    from gto.cli import app

    app.commands[words[0]].make_context(words[0], words[1:])


def _plain(words: list[str], folder: Path) -> None:
    """What the shell, git and pytest do is not tested."""


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "make": _make,
    "python": _python,
    "dvc": _dvc,
    "pip": _pip,
    "torchrun": lambda words, folder: _python(words[words.index("-m") :], folder),
    "ray": _ray,
    "pytest": _plain,
    "export": _plain,
    "git": _plain,
    "gto": _gto,
    "cd": _plain,
    "source": _plain,
}
