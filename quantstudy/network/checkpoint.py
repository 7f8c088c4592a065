"""Model files: safe to load, and as small as what they hold.

A file is a dictionary of plain values and tensors, so `torch.load(weights_only=True)` reads it and nothing in
it is executed. `torch.save` spends some 200 bytes and a 64-byte alignment on each storage; therefore the tensors of one
dtype are views into one storage.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantstudy.errors import UserError
from quantstudy.files import save_tensors

FORMAT = "quantstudy-3"


def save_checkpoint(path: Path, state_dict: dict[str, torch.Tensor], **facts: Any) -> None:
    """Write `state_dict` and the plain values `facts` to `path` atomically."""
    save_tensors(path, {"format": FORMAT, **facts, "state_dict": _shared_storage(state_dict)})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that `save_checkpoint` wrote; raise `UserError` when it is missing, corrupt or another kind."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{path}: format {found!r} is not {FORMAT!r}; run the stage that writes it again")
    return checkpoint


def load_into(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, strict: bool = True, assign: bool = False
) -> None:
    """Load tensors into a network of the same version of its code: what a plain dictionary does not say."""
    state = OrderedDict(state_dict)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=strict, assign=assign)


def load_tensors(path: Path) -> Any:
    """Read any file of tensors and plain values on the CPU, executing nothing in it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; run the stage that writes it, or put the file there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AssertionError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"{path}: truncated, corrupt or not a file of tensors ({reason})") from None


def _shared_storage(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, tensor in state_dict.items():
        by_dtype.setdefault(tensor.dtype, []).append(name)
    views: dict[str, torch.Tensor] = {}
    for dtype, names in by_dtype.items():
        flat = torch.empty(sum(state_dict[name].numel() for name in names), dtype=dtype)
        start = 0
        for name in names:
            tensor = state_dict[name].detach()
            views[name] = flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += tensor.numel()
    return {name: views[name] for name in state_dict}
