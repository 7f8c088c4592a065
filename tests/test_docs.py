"""README and the pages of docs/ hold: commands parse, rows validate, links resolve, methods and figures are there."""

import contextlib
import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import quantstudy as qs
from docs.drawing.__main__ import FIGURES, FOLDER, main
from quantstudy import layout
from quantstudy import params as P
from quantstudy.files import read_json
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipe import RECIPES
from quantstudy.methods.recipes import quantize
from quantstudy.network.architectures import build
from quantstudy.params.reading import read_params
from quantstudy.quantization.variant import Variant
from quantstudy.report.ablation import markdown
from tests.blocks import PAGES, SHOWN, Block, blocks, dialogues, headings, inline_commands, prose
from tests.commands import check
from tests.conftest import ROOT

METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def check_commands(block: Block, folder: Path) -> None:
    for line in block.text.splitlines():
        check(line.replace("<this repository>", "repository"), folder)


def check_dialogue(block: Block, folder: Path) -> None:
    """The outputs are those of `test_readme`."""
    for command, output in dialogues(block):
        check(command, folder)
        assert output, f"{block}: no output; make it a bash block"
    assert block.page in SHOWN


def check_rows(block: Block, folder: Path) -> None:
    rows = yaml.safe_load(block.text.replace("<its SHA-256>", "ab" * 32))
    params = read_params(ROOT / "params.yaml")
    for section, given in rows.items():
        for name, row in given.items():
            assert params[section].get(name, row) == row, f"{block}: {name} is another in params.yaml"
        params[section] |= given
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    P.load_params(folder / "params.yaml")


def check_python(block: Block, folder: Path) -> None:
    """Run a block of docs/ beside a ResNet-18's weights and a study's variant; `test_readme` runs those it shows."""
    if block.page in SHOWN:
        return
    if block.page == ROOT / "CONTRIBUTING.md":
        return check_recipe(block)
    torch.manual_seed(0)
    with contextlib.chdir(folder):
        torch.save(build("resnet18", 10).state_dict(), "resnet18.pth")
        model = qs.load_model("resnet18.pth", "resnet18", image_size=32)
        variant = qs.quantize(model, torch.rand(2, 3, 32, 32), "int8_weight_only")
        qs.save(variant, layout.model("mobilenetv2_digits", "int8_static"))
        exec(block.text, {})


def check_recipe(block: Block) -> None:
    """Run the example of a recipe for a row of its own, and a method of it."""

    class MyRow(P.MethodRow):
        pass

    network, row = nn.Sequential(nn.Linear(2, 2)), MyRow(kind="mine")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(P, "MyRow", MyRow, raising=False)
        exec(block.text, {})
        assert isinstance(quantize(network, Calibration(network, []), row), Variant)
        RECIPES.pop(MyRow)


def check_chart(block: Block, folder: Path) -> None:
    """The stages of the DAG, or the rooms of the import rules."""
    names = set(re.findall(r"[a-z]\w*", re.sub(r"flowchart LR|base", "", block.text)))
    if block.page.name == "architecture.md":
        rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
        assert names == set(re.findall(r"\w+", " ".join(rules["contracts"][0]["layers"])))
    else:
        assert names == set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


KINDS: dict[str, Callable[[Block, Path], None]] = {
    "bash": check_commands,
    "console": check_dialogue,
    "yaml": check_rows,
    "python": check_python,
    "": lambda block, folder: None,
    "mermaid": check_chart,
}


def is_slow(block: Block) -> bool:
    """Whether the block quantizes a ResNet-18 with GPTQ."""
    return block.kind == "python" and "quantize(" in block.text


@pytest.mark.parametrize(
    "block", [pytest.param(one, id=str(one), marks=[pytest.mark.slow] if is_slow(one) else []) for one in blocks()]
)
def test_a_fenced_block_holds(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert block.kind in KINDS, f"{block}: no test for blocks of kind {block.kind!r}"
    KINDS[block.kind](block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_hold_and_links_resolve(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    for command in inline_commands(page):
        check(re.sub(r"<(\w+)>", r"\1", command), tmp_path)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{link}: no such file"
        assert not anchor or anchor in headings(found), f"{link}: no such heading"


def test_every_page_is_in_the_index_and_every_figure_is_shown() -> None:
    for index in (ROOT / "docs" / "README.md", ROOT / "docs" / "methods" / "README.md"):
        for page in index.parent.glob("*.md"):
            assert page == index or f"]({page.name})" in index.read_text(), f"{page.name} is not in {index}"
    assert {path.name for path in (ROOT / FOLDER).iterdir()} == {f"{name}.png" for name in FIGURES}
    texts = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in FIGURES if f"figures/{name}.png)" not in texts] == []


def test_every_kind_and_key_of_a_method_is_described() -> None:
    texts = "\n".join(page.read_text() for page in METHOD_PAGES)
    for kind, row in P.METHOD_ROWS.items():
        for name in {kind, *row.model_fields}:
            assert re.search(rf"`{name}[`:]|\b{name}:", texts), f"{kind}: {name} is in no page of docs/methods"


TRAINING = ("joint", "trained", "adaround")
"""Figures for which something is trained."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in TRAINING else []) for name in FIGURES]
)
def test_a_figure_is_drawn(name: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main([name])
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train little: that the code runs is tested, not what it draws."""
    from docs.drawing import mixed, tiny, training
    from quantstudy.methods import reconstruction

    monkeypatch.setattr(tiny, "EPOCHS", 1)
    monkeypatch.setattr(training, "EPOCHS", 1)
    monkeypatch.setattr(mixed, "WIDTHS", [4, 16])
    monkeypatch.setattr(mixed, "BUDGETS", (mixed.SHOWN + 2, mixed.SHOWN + 4))
    monkeypatch.setattr(mixed, "SHOWN", mixed.SHOWN + 2)
    monkeypatch.setattr(reconstruction.Limits, "__init__", functools.partialmethod(_little_effort))


def _little_effort(self: Any, **limits: Any) -> None:
    for key, value in ({"steps": 2, "batch_size": 8, "memory_mb": 100.0} | limits).items():
        object.__setattr__(self, key, value)


def test_the_ablations_that_are_committed_agree_with_their_rows() -> None:
    for path in ROOT.glob("reports/*/ablation.json"):
        assert path.with_suffix(".md").read_text().startswith(markdown(read_json(path))), path
