"""Quantize a vision model every way worth trying and measure what each way costs and buys.

The names below are for use from Python (`docs/library.md`). They are imported when they are first asked for, by a name
that no `import` statement has, so that a stage depends on the rooms that it uses alone.
"""

import importlib
from typing import Any

__all__ = ["Model", "export_onnx", "load_model", "quantize", "run", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("quantstudy.runtimes.library"), name)
