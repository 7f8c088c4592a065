"""Load weights into a classifier, fold its BatchNorm, keep it in a file."""

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.files import check_sha256
from quantstudy.network.architectures import (
    IMAGE_SIZE,
    build,
    check_code,
    code_sha256,
    is_own,
    torchvision_models,
    torchvision_names,
)
from quantstudy.network.attention import opened_names
from quantstudy.network.checkpoint import load_checkpoint, load_tensors, save_checkpoint

AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Tensors of GoogLeNet and Inception that only their own training needs."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors a weights file gave and which keep their random start."""

    source: str
    loaded: list[str]
    random: list[str]

    @property
    def missing(self) -> list[str]:
        """What a whole file would have given: old ones lack BatchNorm's counters, which nothing needs."""
        return [name for name in self.random if not name.endswith("num_batches_tracked")]

    def __str__(self) -> str:
        """One line for the log."""
        text = f"weights from {self.source}: {len(self.loaded)} tensors loaded"
        names = ", ".join(self.random) if self.loaded else "all"
        return text + (f", random: {names}" if self.random else "")


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
        source, state = row.weights, read_state_dict(Path(row.weights))
    return load_state(model, state, source, f"studies.{study}.model.weights", row.architecture)


def load_state(model: nn.Module, state: dict[str, Tensor], source: str, key: str, architecture: str) -> LoadReport:
    """Load a state_dict of torchvision's or of this project into `model`, in place, as `load_pretrained` does.

    Position embeddings of a vision transformer for another image size are interpolated. `source` is what the report
    and errors call the state, `key` the param or file that an error names.
    """
    state = {k: v for k, v in opened_names(state).items() if not k.startswith(AUXILIARY_HEADS)}
    own = model.state_dict()
    _fit_positions(model, state, own)
    head = {f"{head_name(model)}.{tensor}" for tensor in ("weight", "bias")}
    strange = [k for k in state if k not in own or (state[k].shape != own[k].shape and k not in head)]
    if strange:
        first = strange[0]
        found = f"holds {first}" + (f" of shape {tuple(state[first].shape)}" if first in own else "")
        wanted = f"of shape {tuple(own[first].shape)} here" if first in own else "which it lacks"
        raise UserError(
            f"{key}: {source!r} is not of architecture {architecture}: "
            f"it {found}, {wanted} ({len(strange)} of {len(state)} tensors do not fit)"
        )
    usable = {name: tensor for name, tensor in state.items() if tensor.shape == own[name].shape}
    model.load_state_dict(usable, strict=False)
    return LoadReport(source, list(usable), [name for name in own if name not in usable])


def _fit_positions(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    name = "encoder.pos_embedding"
    if name in state and name in own and state[name].ndim == 3 and state[name].shape[2] == own[name].shape[2]:
        from torchvision.models.vision_transformer import interpolate_embeddings

        interpolate_embeddings(model.image_size, model.patch_size, state)


def _imagenet(architecture: str) -> dict[str, torch.Tensor]:
    models = torchvision_models()
    if architecture not in torchvision_names():
        raise UserError(f"model.weights: torchvision has no imagenet weights of {architecture}; name a file, or null")
    try:
        return dict(models.get_model_weights(architecture).DEFAULT.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: imagenet weights of {architecture} could not be downloaded ({error}); "
            "put a state_dict on disk and name its path instead"
        ) from None


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of weights: a state_dict, alone or under the names that training scripts keep it by.

    Raises:
        UserError: the file is missing, corrupt, or holds anything else, such as a whole pickled model.
    """
    state = load_tensors(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state_dict (a mapping from names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}  # DistributedDataParallel's prefix


def head_name(model: nn.Module) -> str:
    """Return the name of the layer that makes the logits: the last Conv2d or Linear in the model's definition."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def save_fp32(path: Path, model: nn.Module, architecture: str, classes: int, preprocessing: P.Preprocessing) -> None:
    """Write the trained model, BatchNorm not folded, what its input has to be, and the SHA-256 of one's own code."""
    facts = {"architecture": architecture, "classes": classes, "preprocessing": preprocessing.model_dump()}
    code = {"code_sha256": code_sha256(architecture)} if is_own(architecture) else {}
    save_checkpoint(path, model.state_dict(), **facts, **code, variant="fp32")


def network_facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint that says which network its tensors belong to, and for which input."""
    keys = ("architecture", "classes", "preprocessing", "code_sha256")
    return {key: checkpoint[key] for key in keys if key in checkpoint}


def load_preprocessing(path: Path) -> P.Preprocessing:
    """Return what the model of a file, fp32 or a variant, wants its input to be."""
    return P.Preprocessing.model_validate(load_checkpoint(path)["preprocessing"])


def load_fp32(path: Path, *, fold: bool = True) -> nn.Module:
    """Read a model that `save_fp32` wrote: float32, BatchNorm folded or not, eval mode, channels_last, on the CPU."""
    checkpoint = load_checkpoint(path)
    model = _network_of(checkpoint, path)
    model.load_state_dict(checkpoint["state_dict"], assign=True)
    model.eval()
    if fold:
        _fold_in_place(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def skeleton_of(path: Path) -> nn.Module:
    """Return the network of a file, fp32 or a variant, as `skeleton` does."""
    return _as_quantized(_network_of(load_checkpoint(path), path))


def skeleton(architecture: str, classes: int, image_size: int = IMAGE_SIZE) -> nn.Module:
    """Return an architecture as quantization sees it: BatchNorm folded, eval mode.

    The tensors of torchvision's networks have no storage; those of one's own have their random start, since what
    its code computes besides parameters has to be there.
    """
    return _as_quantized(_without_weights(architecture, classes, image_size))


def _as_quantized(model: nn.Module) -> nn.Module:
    _fold_in_place(model.eval())
    return model


def _network_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    architecture = checkpoint["architecture"]
    check_code(architecture, checkpoint.get("code_sha256"), f"{path}: code_sha256")
    return _without_weights(architecture, checkpoint["classes"], checkpoint["preprocessing"]["image_size"])


def _without_weights(architecture: str, classes: int, image_size: int) -> nn.Module:
    if is_own(architecture):
        return build(architecture, classes, image_size)
    return copy.deepcopy(_without_storage(architecture, classes, image_size))


@functools.cache
def _without_storage(architecture: str, classes: int, image_size: int) -> nn.Module:
    try:
        with torch.device("meta"), _SkipRandomStart():
            return build(architecture, classes, image_size)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return build(architecture, classes, image_size).to("meta")


class _SkipRandomStart(TorchFunctionMode):
    """Leave new tensors as they are: where there is nothing to fill, filling it took half a second all the same."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function in (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_):
            return args[0]
        return function(*args, **kwargs)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode where each BatchNorm2d that follows a Conv2d is folded into it.

    The names of the layers stay: the convolution takes the folded weight and a bias, the BatchNorm becomes an
    `Identity`. What it said of the convolution's output stays as a buffer that is not stored, `output_normal`, float32
    [2, channels]: the mean and the standard deviation. A BatchNorm that does not directly follow a convolution stays as
    it is, and so does every one of a network that `torch.fx` cannot trace.
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
        fused = fuse_conv_bn_eval(conv, norm)
        fused.register_buffer("output_normal", _normal_behind(norm), persistent=False)
        return fused
    conv.bias = nn.Parameter(torch.empty(norm.num_features, device="meta"))  # empty_like would import sympy
    return conv  # type: ignore[no-any-return]


def _normal_behind(norm: nn.BatchNorm2d) -> Tensor:
    if not norm.affine:
        return torch.stack([torch.zeros(norm.num_features), torch.ones(norm.num_features)])
    return torch.stack([norm.bias, norm.weight.abs()]).detach()


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm2d that alone reads it."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return []
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # the code of a network of one's own may raise anything at the tracer's stand-in for an image
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        is_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
        if is_conv and len(before.users) == calls[before.target] == calls[node.target] == 1:
            pairs.append((before.target, node.target))
    return pairs
