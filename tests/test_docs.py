"""README and the pages of docs/ hold: commands parse, rows validate, links resolve, methods and figures are there."""

import contextlib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from docs.drawing.__main__ import FIGURES, FOLDER, main
from quantstudy import layout
from quantstudy import params as P
from quantstudy.files import read_json
from quantstudy.methods.registry import quantize
from quantstudy.network import models
from quantstudy.quantization.variant import save_variant
from quantstudy.report.ablation import markdown
from tests.blocks import PAGES, Block, blocks, dialogues, headings, inline_commands, prose
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
    assert block.page == ROOT / "README.md"


def check_rows(block: Block, folder: Path) -> None:
    rows = yaml.safe_load(block.text.replace("<its SHA-256>", "ab" * 32))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, given in rows.items():
        for name, row in given.items():
            assert params[section].get(name, row) == row, f"{block}: {name} is another in params.yaml"
        params[section] |= given
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    P.load_params(folder / "params.yaml")


def check_python(block: Block, folder: Path) -> None:
    """Run a block of docs/; `test_readme` runs README's."""
    if block.page == ROOT / "README.md":
        return
    facts = {"architecture": "mobilenet_v2", "classes": 10, "preprocessing": {"image_size": 32}}
    network = models.skeleton("mobilenet_v2", 10).to_empty(device="cpu").requires_grad_(False)
    for tensor in network.state_dict().values():
        tensor.fill_(1)
    variant = quantize(network, {}, P.WeightOnly(kind="weight_only", weight_bits=8))
    with contextlib.chdir(folder):
        save_variant(layout.model("mobilenetv2_digits", "int8_static"), variant, facts, "int8_static")
        exec(block.text, {})


def check_flowchart(block: Block, folder: Path) -> None:
    stages = set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]) - {"code"}
    assert set(re.findall(r"\w+", block.text.replace("flowchart LR", ""))) == stages


KINDS: dict[str, Callable[[Block, Path], None]] = {
    "bash": check_commands,
    "console": check_dialogue,
    "yaml": check_rows,
    "python": check_python,
    "mermaid": check_flowchart,
}


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_fenced_block_holds(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert block.kind in KINDS, f"{block}: no test for blocks of kind {block.kind!r}"
    KINDS[block.kind](block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_the_text_hold(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in inline_commands(page):
        check(re.sub(r"<(\w+)>", r"\1", command), tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("make repo", "no target"),
        ("make front STUDIES=a", "reads no STUDIES"),
        ("dvc exp run -S methods.int4_gptq.group_sise=64", "Invalid"),
        ("dvc exp run -S methods.int4_gptq.group_size=48", "group_size"),
        ("dvc exp run -S methods.int4_gptq.group_size=32,64", "--queue"),
        ("python -m quantstudy quantise", "2"),
        ("pip install '.[onnx]'", "onnx"),
        ("rm -r models", "no command"),
    ],
)
def test_a_wrong_command_is_found(line: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(BaseException, match=re.escape(complaint)):
        check(line, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{link}: no such file"
        assert not anchor or anchor in headings(found), f"{link}: no such heading"


def test_every_page_is_in_the_index() -> None:
    for index in (ROOT / "docs" / "README.md", ROOT / "docs" / "methods" / "README.md"):
        for page in index.parent.glob("*.md"):
            assert page == index or f"]({page.name})" in index.read_text(), f"{page.name} is not in {index}"


def test_every_kind_and_key_of_a_method_is_described() -> None:
    texts = "\n".join(page.read_text() for page in METHOD_PAGES)
    for row in P.METHOD_ROWS:
        names = set(row.model_fields) | set(get_args(row.model_fields["kind"].annotation)) - {"kind"}
        for name in names:
            assert re.search(rf"`{name}[`:]|\b{name}:", texts), f"{row.__name__}: {name} is in no page of docs/methods"


def test_a_methods_page_has_all_its_parts() -> None:
    for page in METHOD_PAGES:
        if page.name != "README.md":
            text = page.read_text()
            parts = ("$$", "- **Paper", "- **Code**", "- **Cost**", "- **Use", "```yaml")
            assert [part for part in parts if part not in text] == [], page.name


def test_the_figures_are_there_and_shown() -> None:
    assert {path.name for path in (ROOT / FOLDER).iterdir()} == {f"{name}.png" for name in FIGURES}
    texts = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in FIGURES if f"figures/{name}.png)" not in texts] == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn(name: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main([name])
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train little: that the code runs is tested, not what it draws."""
    from docs.drawing import mixed, tiny, training
    from quantstudy.methods import joint, reconstruction

    monkeypatch.setattr(tiny, "EPOCHS", 1)
    monkeypatch.setattr(training, "EPOCHS", 1)
    monkeypatch.setattr(mixed, "WIDTHS", [4, 16])
    monkeypatch.setattr(mixed, "BUDGETS", (mixed.SHOWN + 2, mixed.SHOWN + 4))
    monkeypatch.setattr(mixed, "SHOWN", mixed.SHOWN + 2)
    monkeypatch.setattr(joint, "STEPS", 2)
    monkeypatch.setattr(reconstruction.Effort, "__init__", functools.partialmethod(_little_effort))


def _little_effort(self: Any, **limits: Any) -> None:
    for key, value in ({"steps": 2, "batch_size": 8, "seconds": 5.0, "memory_mb": 100.0} | limits).items():
        object.__setattr__(self, key, value)


def test_the_ablations_that_are_committed_agree_with_their_rows() -> None:
    for path in ROOT.glob("reports/*/ablation.json"):
        assert path.with_suffix(".md").read_text().startswith(markdown(read_json(path))), path
