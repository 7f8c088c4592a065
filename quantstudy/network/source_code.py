"""Which code a script runs, and the SHA-256 of what that code does.

A script runs the local modules that it imports, directly or through other modules, anywhere in their text. A module is
hashed by its syntax tree without comments, docstrings and positions. So two texts that Python runs alike have the same
digest.
"""

import ast
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantstudy.files import write_text

KNOWN = Path(".cache") / "code.json"
"""The cache of parsed modules: path -> SHA-256 of the text, digest of the tree, names that it imports."""


def transitive_imports(script: Path, root: Path) -> list[Path]:
    """Return `script` and every module below `root` that it imports, relative to `root`, sorted.

    A package counts as its `__init__.py`.
    """
    return _reached(script, lambda path: _modules(_names(ast.parse((root / path).read_bytes()), path), root))


def scripts_sha256(scripts: Sequence[Path], root: Path) -> dict[Path, str]:
    """Return the SHA-256 of all code that each script runs: its modules, and the data files that they read.

    A data file lies in the folder of a module, and the module has its name as a string in double quotes. If it has the
    name of a folder, all files in that folder count. Links do not count. Parsed texts are kept in `KNOWN` below `root`,
    so only changed texts are parsed again.
    """
    known: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, ValueError):
        known = dict(json.loads((root / KNOWN).read_text(encoding="utf-8")))
    changed = False
    modules: dict[Path, list[Path]] = {}
    digests: dict[Path, str] = {}

    def direct(path: Path) -> list[Path]:
        nonlocal changed
        if path not in modules:
            text = (root / path).read_bytes()
            key, name = _digest(_RULES, text), path.as_posix()
            if known.get(name, [""])[0] != key:
                tree = ast.parse(text)
                known[name], changed = [key, _digest(repr(_plain(tree)).encode()), *_names(tree, path)], True
            _, digest, *names = known[name]
            modules[path] = _modules(names, root)
            digests[path] = _digest(name.encode(), digest.encode(), *_data(root / path, text))
        return modules[path]

    found = {script: _digest(*(digests[path].encode() for path in _reached(script, direct))) for script in scripts}
    if changed:
        write_text(root / KNOWN, json.dumps(known))
    return found


_RULES = Path(__file__).read_bytes()
"""The rules of parsing, which are this file's text: when they change, the cache is not used."""


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _reached(script: Path, direct: Callable[[Path], Sequence[Path]]) -> list[Path]:
    seen, todo = {script}, [script]
    while todo:
        new = set(direct(todo.pop())) - seen
        seen |= new
        todo += new
    return sorted(seen)


def _names(tree: ast.Module, path: Path) -> list[str]:
    """Return the dotted names that a module may import, each a module or a name in a module."""
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= dict.fromkeys([base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)])
    return list(filter(None, names))


def _modules(names: Sequence[str], root: Path) -> list[Path]:
    """Return the files below `root` that Python runs to import the names, relative to it."""
    parts = [name.split(".") for name in names]
    places = {Path(*part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return [file for file in files if (root / file).is_file()]


def _plain(value: Any) -> Any:
    """Return a syntax tree as nested lists, without what has no effect: positions, empty fields, loose strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value if not _is_docstring(item)]
    if not isinstance(value, ast.AST):
        return value
    if isinstance(value, ast.JoinedStr):  # Python 3.12.1 parses empty parts into format specifications
        parts = [part for part in value.values if getattr(part, "value", None) != ""]
        return ["JoinedStr", _plain(parts)]
    fields = [(name, field) for name, field in ast.iter_fields(value) if field is not None and field != []]
    return [type(value).__name__, *(part for name, field in fields for part in (name, _plain(field)))]


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _data(module: Path, text: bytes) -> Iterator[bytes]:
    """Yield the name and content of each data file that a module names."""
    for place in sorted(module.parent.iterdir()):
        if place.suffix == ".py" or place.is_symlink() or f'"{place.name}"'.encode() not in text:
            continue
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                yield file.relative_to(module.parent).as_posix().encode()
                yield file.read_bytes()
