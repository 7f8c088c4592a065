"""The pages of documentation, taken apart: fenced blocks, inline code, links."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
SHOWN = [ROOT / name for name in ("README.md", "docs/ship.md", "docs/experiments.md")]
"""Pages whose outputs are checked, and whose Python runs, in `test_readme`."""
COMMAND = re.compile(r"dvc |(make|pip|pytest|torchrun|python -m)( |$)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it is on, the line it begins at, its kind and its text."""

    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> list[Block]:
    """Return the fenced blocks of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            found.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_commands(page: Path) -> list[str]:
    """Return what stands between backticks and is a command."""
    return [code for code in re.findall(r"`([^`\n]+)`", prose(page)) if COMMAND.match(code)]


def dialogues(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a `console` block, each with its output."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0], f"{block}: a console block begins with a command"
    return [(command, output.strip("\n")) for command, _, output in (part.partition("\n") for part in parts[1:])]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
