"""Quantize a vision model in every way worth trying, and measure what each way costs and saves.

The names below are the interface for Python code (`docs/library.md`). `__getattr__` imports their module on first use,
by a string and not by an `import` statement. A stage that imports quantstudy thus depends only on the modules that it
uses.
"""

import importlib
from typing import Any

__all__ = ["Model", "export_onnx", "load_model", "quantize", "run", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("quantstudy.runtimes.library"), name)
