"""Model files: safe to load, and hardly larger than their tensors.

A file is a dictionary of plain values and tensors, so `torch.load(weights_only=True)` reads it and executes nothing in
it. Tensors must be finite when they are written and when they are read. `torch.save` spends some 200 bytes and a
64-byte alignment on each storage, so all tensors of one dtype are views into one storage.
"""

import argparse
import functools
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from quantstudy import layout
from quantstudy.errors import UserError, one_line
from quantstudy.files import check_records, save_tensors

FORMAT = "quantstudy-3"
Given = ParamSpec("Given")
Read = TypeVar("Read")
_SAFETENSORS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def save_checkpoint(path: Path, state_dict: dict[str, torch.Tensor], **facts: Any) -> None:
    """Write `state_dict` and the plain values `facts` to `path` atomically; raise `UserError` for a NaN in it."""
    check_finite(state_dict, path)
    save_tensors(path, {"format": FORMAT, **facts, "state_dict": _shared_storage(state_dict)})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that `save_checkpoint` wrote; raise `UserError` when it is missing, corrupt or another kind."""
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(f"{path}: format {found!r:.60} is not {FORMAT!r}; run the stage that writes it again")
    return checkpoint


def model_file(study: str, variant: str, architecture: str | None = None) -> Path:
    """Return the path of a study's model file, checked to be whole and of this study, variant and architecture.

    Raises:
        UserError: the file is missing, damaged, or belongs to another study, variant or architecture.
    """
    path = layout.model(study, variant)
    checkpoint = load_checkpoint(path)
    wanted = {"study": study, "variant": variant} | ({"architecture": architecture} if architecture else {})
    for key, value in wanted.items():
        if (found := checkpoint.get(key)) != value:
            raise UserError(f"{path}: its {key} is {found!r:.60}, not {value!r}; run the stage that writes it again")
    return path


def reads_model(load: Callable[Concatenate[Path, Given], Read]) -> Callable[Concatenate[Path, Given], Read]:
    """Make a function that reads a model file raise `UserError` if the file is not a whole model file."""

    @functools.wraps(load)
    def checked(path: Path, /, *args: Given.args, **kwargs: Given.kwargs) -> Read:
        try:
            return load(path, *args, **kwargs)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"not a whole model file of its architecture ({one_line(error)})"
            raise UserError(f"{path}: {what}; run the stage that writes it again") from None

    return checked


def check_dense(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raise `UserError`, naming `source` and the tensor, unless all are dense, real, and have all of their values."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "sparse"
        elif tensor.is_quantized:
            kind = "quantized"
        elif tensor.is_complex():
            kind = "complex"
        elif tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
            kind = "without values of its own"
        else:
            continue
        raise UserError(f"{source}: {name:.100} is {kind}; save dense tensors of real numbers")


def check_finite(state: Mapping[str, torch.Tensor], source: object) -> None:
    """Raise `UserError`, naming `source` and the tensor, for a NaN, an infinity or a negative variance."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        low, high = torch.aminmax(tensor.detach())
        if not (low.isfinite() and high.isfinite()):
            count = int(tensor.isfinite().logical_not().sum())
            raise UserError(f"{source}: {name:.100} has {count} values that are not finite (NaN or infinite)")
        if low < 0 and name.endswith("running_var"):
            raise UserError(f"{source}: {name:.100} has negative variances, down to {float(low):.3g}")


def load_into(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, strict: bool = True, assign: bool = False
) -> None:
    """Load tensors into a network, as tensors of the same version of its code; a plain dictionary holds no versions."""
    state = OrderedDict(state_dict)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=strict, assign=assign)


def load_tensors(path: Path) -> Any:
    """Read any file of tensors and plain values, safetensors too, on the CPU, executing nothing in it.

    Raises:
        UserError: the file is missing, damaged, or holds objects that only code could load.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that writes it, or put the file there")
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":
                return _safetensors(path.read_bytes())
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            check_records(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a training script, plain values
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from None


def _safetensors(content: bytes) -> dict[str, torch.Tensor]:
    """Read the format of https://huggingface.co/docs/safetensors: a header's length, the header in JSON, the values."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    state = {}
    for name, row in header.items():
        first, last = (start + offset for offset in row["data_offsets"])
        flat = torch.frombuffer(bytearray(content[first:last]) or bytearray(8), dtype=_SAFETENSORS[row["dtype"]])
        state[name] = (flat[:0] if first == last else flat).view(row["shape"])
    if start + max((row["data_offsets"][1] for row in header.values()), default=0) != len(content):
        raise ValueError("the values end elsewhere than the header says")
    return state


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say what a file that cannot be read holds, and what to save instead."""
    text = str(error)
    if "TorchScript" in text:
        return "a TorchScript program; save the state_dict of the model that it was made from"
    names = re.findall(r"(?:GLOBAL|class|type) `?([\w.]*[a-z]\w*\.\w+)`? was not an allowed", text)
    if names and zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if any("torch.nn.modules" in name for name in names):
        what = f"a whole pickled model ({names[0]:.60}), which only its code could load; save its weights alone"
        return f"{what}, torch.save(model.state_dict(), path)"
    if names:
        what = f"beside its tensors {', '.join(names)[:80]}, which only code could load; save the state_dict alone"
        return f"holds {what}, torch.save(checkpoint['state_dict'], path) for one"
    reason = f" ({text})" if isinstance(error, zipfile.BadZipFile) else ""
    return f"truncated, corrupt or not a file of tensors{reason}"


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
