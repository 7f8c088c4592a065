"""Build a torchvision classifier, load weights into it, fold its BatchNorm."""

import copy
import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from quantstudy import params as P
from quantstudy.checkpoint import load_checkpoint, load_tensors, save_checkpoint
from quantstudy.errors import UserError, unknown
from quantstudy.files import check_sha256

AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Tensors of GoogLeNet and Inception that only their own training needs."""
ATTENTION = ("MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")
"""Modules that read the weights of the linear layers in them, so that these cannot be replaced."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors a weights file gave and which keep their random start."""

    source: str
    loaded: list[str]
    random: list[str]

    def __str__(self) -> str:
        """One line for the log."""
        text = f"weights from {self.source}: {len(self.loaded)} tensors loaded"
        names = ", ".join(self.random) if self.loaded else "all"
        return text + (f", random: {names}" if self.random else "")


def build(architecture: str, classes: int, key: str = "model.architecture") -> nn.Module:
    """Return a torchvision classifier with a head of `classes` outputs and random weights.

    Raises:
        UserError: torchvision has no classifier of that name, or one with attention; `key` is the param that the
            error names.
    """
    models = _torchvision_models()
    choices = models.list_models(module=models)
    if architecture not in choices:
        raise unknown(key, architecture, choices)
    has_auxiliary_heads = architecture in ("googlenet", "inception_v3")
    kwargs = {"init_weights": True, "aux_logits": False} if has_auxiliary_heads else {}
    model: nn.Module = models.get_model(architecture, weights=None, num_classes=classes, **kwargs)
    for module in model.modules():
        if (kind := type(module).__name__) in ATTENTION:
            raise UserError(f"{key}: {architecture!r} has {kind}, which is not quantized here; choose another")
    return model


def load_pretrained(model: nn.Module, row: P.Model, study: str) -> LoadReport:
    """Load the weights that `row` names into `model`, in place.

    A head of another number of classes keeps its random start, and so does whatever a partial file lacks.

    Raises:
        UserError: the file is missing, corrupt, has another SHA-256, or belongs to another architecture.
    """
    if row.weights is None:
        return LoadReport("nowhere (random start)", [], list(model.state_dict()))
    if row.weights == "imagenet":
        source, state = f"torchvision ImageNet {row.architecture}", _imagenet(row.architecture)
    else:
        check_sha256(Path(row.weights), row.weights_sha256, f"studies.{study}.model.weights_sha256")
        source, state = row.weights, _state_dict(Path(row.weights))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(AUXILIARY_HEADS)}
    own = model.state_dict()
    head = _head_names(model)
    strange = [k for k in state if k not in own or (state[k].shape != own[k].shape and k not in head)]
    if strange:
        first = strange[0]
        found = f"holds {first}" + (f" of shape {tuple(state[first].shape)}" if first in own else "")
        wanted = f"of shape {tuple(own[first].shape)} here" if first in own else "which it lacks"
        raise UserError(
            f"studies.{study}.model.weights: {source!r} is not of architecture {row.architecture}: "
            f"it {found}, {wanted} ({len(strange)} of {len(state)} tensors do not fit)"
        )
    usable = {name: tensor for name, tensor in state.items() if tensor.shape == own[name].shape}
    model.load_state_dict(usable, strict=False)
    return LoadReport(source, list(usable), [name for name in own if name not in usable])


def _imagenet(architecture: str) -> dict[str, torch.Tensor]:
    models = _torchvision_models()
    try:
        return dict(models.get_model_weights(architecture).DEFAULT.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: imagenet weights of {architecture} could not be downloaded ({error}); "
            "put a state_dict on disk and name its path instead"
        ) from None


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    state = load_tensors(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state_dict (a mapping from names to tensors)")
    return state


def _head_names(model: nn.Module) -> set[str]:
    name = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    return {f"{name}.weight", f"{name}.bias"}


def save_fp32(path: Path, model: nn.Module, architecture: str, classes: int, preprocessing: P.Preprocessing) -> None:
    """Write the trained model: torchvision's own state_dict, BatchNorm not folded, and what its input has to be."""
    facts = {"architecture": architecture, "classes": classes, "preprocessing": preprocessing.model_dump()}
    save_checkpoint(path, model.state_dict(), **facts, variant="fp32")


def load_preprocessing(path: Path) -> P.Preprocessing:
    """Return what the model of a file, fp32 or a variant, wants its input to be."""
    return P.Preprocessing.model_validate(load_checkpoint(path)["preprocessing"])


def load_fp32(path: Path, *, fold: bool = True) -> nn.Module:
    """Read a model that `save_fp32` wrote: float32, BatchNorm folded or not, eval mode, channels_last, on the CPU."""
    checkpoint = load_checkpoint(path)
    model = copy.deepcopy(_without_storage(checkpoint["architecture"], checkpoint["classes"]))
    model.load_state_dict(checkpoint["state_dict"], assign=True)
    model.eval()
    if fold:
        _fold_in_place(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def skeleton(architecture: str, classes: int) -> nn.Module:
    """Return an architecture as quantization sees it, BatchNorm folded, eval mode, its tensors without storage."""
    model = copy.deepcopy(_without_storage(architecture, classes)).eval()
    _fold_in_place(model)
    return model


@functools.cache
def _without_storage(architecture: str, classes: int) -> nn.Module:
    try:
        with torch.device("meta"), _SkipRandomStart():
            return build(architecture, classes)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return build(architecture, classes).to("meta")


class _SkipRandomStart(TorchFunctionMode):
    """Leave new tensors as they are: where there is nothing to fill, filling it took half a second all the same."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function in (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_):
            return args[0]
        return function(*args, **kwargs)


@functools.cache
def _torchvision_models() -> ModuleType:
    """Import torchvision's models without torch._dynamo: 0.15 s instead of 1.4 s.

    Only its operators for detectors want a function of it, which is called when they are. A stand-in holds its place
    during the import; a torchvision that wants more of it gets the real one.
    """
    if "torch._dynamo" in sys.modules:
        return importlib.import_module("torchvision.models")
    names = ("torch._dynamo", "torch._dynamo.utils")
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules["torch._dynamo.utils"].is_compile_supported = lambda device_type: False  # type: ignore[attr-defined]
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, AttributeError):
        pass
    finally:
        for name in names:
            del sys.modules[name]
    return importlib.import_module("torchvision.models")


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode where each BatchNorm2d that follows a Conv2d is folded into it.

    The names of the layers stay: the convolution takes the folded weight and a bias, the BatchNorm becomes an
    `Identity`. A BatchNorm that does not directly follow a convolution stays as it is.
    """
    folded = copy.deepcopy(model).eval()
    _fold_in_place(folded)
    return folded


def _fold_in_place(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for conv_name, norm_name in conv_norm_pairs(model):
        conv, norm = modules[conv_name], modules[norm_name]
        model.set_submodule(conv_name, _fused(conv, norm))
        model.set_submodule(norm_name, nn.Identity())
    model.requires_grad_(False)


def _fused(conv: Any, norm: Any) -> nn.Module:
    if not conv.weight.is_meta:
        return fuse_conv_bn_eval(conv, norm)
    conv.bias = nn.Parameter(torch.empty(norm.num_features, device="meta"))  # empty_like would import sympy
    return conv  # type: ignore[no-any-return]


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm2d that alone reads it."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return []
    graph = fx.Tracer().trace(model)
    modules = dict(model.named_modules())
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        is_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
        if is_conv and len(before.users) == 1:
            pairs.append((before.target, node.target))
    return pairs
