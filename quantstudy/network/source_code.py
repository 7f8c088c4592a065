"""Which local modules a script runs: those it imports, directly or through another, anywhere in their text."""

import ast
from collections.abc import Iterator
from pathlib import Path


def transitive_imports(script: Path, root: Path) -> list[Path]:
    """Return `script` and every module below `root` that it imports, relative to `root`, sorted.

    A package counts as the `__init__.py` that makes it one. With a module comes the C++ file of its name, if any.
    """
    seen, todo = {script}, [script]
    while todo:
        for module in _local_imports(todo.pop(), root):
            if module not in seen:
                seen.add(module)
                todo.append(module)
    beside = {module.with_suffix(".cpp") for module in seen}
    return sorted(seen | {path for path in beside if (root / path).is_file()})


def _local_imports(path: Path, root: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
        for name in filter(None, names):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                place = Path(*parts[:depth])
                for module in (place.with_suffix(".py"), place / "__init__.py"):
                    if (root / module).is_file():
                        yield module
