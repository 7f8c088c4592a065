"""Load the weights that a model starts from: torchvision's, or a state_dict on disk.

A training script's file may hold several state_dicts. Tensor names may begin with the names of modules that were around
the network.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.errors import UserError, unknown
from quantstudy.files import check_sha256
from quantstudy.network.architectures import Shape, build, check_layers, check_logits, torchvision_names
from quantstudy.network.attention import opened_names
from quantstudy.network.checkpoint import check_dense, check_finite, load_into, load_tensors
from quantstudy.network.graph import head_name
from quantstudy.network.padding import padded_names

AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
"""Tensors of GoogLeNet and Inception that only their own training needs."""
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Modules that DataParallel, torch.compile and FSDP put around others."""
_DEPTH = 6
"""The most modules that may lie around a network."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors a weights file gave and which keep their random start."""

    source: str
    loaded: list[str]
    random: list[str]

    @property
    def missing(self) -> list[str]:
        """The missing tensors that matter: old files lack BatchNorm's counters too, which nothing needs."""
        return [name for name in self.random if not name.endswith("num_batches_tracked")]

    def __str__(self) -> str:
        """One line for the log."""
        text = f"weights from {self.source}: {len(self.loaded)} tensors loaded"
        names = ", ".join(self.random) if self.loaded else "all"
        return text + (f", random: {names}" if self.random else "")


def load_pretrained(model: nn.Module, row: P.Model, study: str) -> LoadReport:
    """Load the weights that `row` names into `model`, in place.

    A head with another number of classes keeps its random start, and so do all tensors that a partial file lacks.

    Raises:
        UserError: the file is missing, corrupt, has another SHA-256, or belongs to another architecture.
    """
    if row.weights is None:
        return LoadReport("nowhere (random start)", [], list(model.state_dict()))
    key = f"studies.{study}.model.weights"
    if row.weights == "imagenet":
        source, state = f"torchvision ImageNet {row.architecture}", _imagenet(row.architecture, key)
    else:
        check_sha256(Path(row.weights), row.weights_sha256, f"{key}_sha256")
        source, state = row.weights, read_state_dict(Path(row.weights), row.weights_key, f"{key}_key")
    return load_state(model, state, source, key, row.architecture)


def load_state(model: nn.Module, state: dict[str, Tensor], source: str, key: str, architecture: str) -> LoadReport:
    """Load a state_dict into `model`, in place, as `load_pretrained` does.

    Position embeddings of a vision transformer for another image size are interpolated. `source` is the state's name in
    the report and in errors, `key` the param or file that an error names.
    """
    own = model.state_dict()
    state = padded_names(opened_names(fitted(state, own, source, f"{key}_key"), own.keys()), own)
    check_dense(state, source)
    state = {k: v for k, v in state.items() if not k.startswith(AUXILIARY_HEADS) or k in own}
    _fit_positions(model, state, own)
    head = {f"{head_name(model)}.{tensor}" for tensor in ("weight", "bias")}
    strange = [k for k in state if k not in own or (state[k].shape != own[k].shape and k not in head)]
    if strange:
        first = strange[0]
        found = f"holds {first:.100}" + (f" of shape {tuple(state[first].shape)}" if first in own else "")
        wanted = f"of shape {tuple(own[first].shape)} here" if first in own else "which it lacks"
        found += f", {wanted} ({len(strange)} of {len(state)} tensors do not fit)"
        raise UserError(f"{key}: {source!r} is not of architecture {architecture}: it {found}")
    usable = {name: tensor for name, tensor in state.items() if tensor.shape == own[name].shape}
    for name, tensor in usable.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{source}: {name} is of {tensor.dtype}, not of {own[name].dtype} as in {architecture}")
    load_into(model, usable, strict=False)
    check_finite({name: tensor for name, tensor in model.state_dict().items() if name in usable}, source)
    return LoadReport(source, list(usable), [name for name in own if name not in usable])


def _fit_positions(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    name = "encoder.pos_embedding"
    if name in state and name in own and state[name].ndim == 3 and state[name].shape[2] == own[name].shape[2]:
        from torchvision.models.vision_transformer import interpolate_embeddings

        interpolate_embeddings(model.image_size, model.patch_size, state)


def _imagenet(architecture: str, key: str) -> dict[str, torch.Tensor]:
    if architecture not in torchvision_names():
        raise UserError(f"{key}: torchvision has no imagenet weights of {architecture}; name a file, or null")
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(architecture).DEFAULT.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        what = f"imagenet weights of {architecture} could not be downloaded ({error})"
        raise UserError(f"{key}: {what}; put a state_dict on disk and name its path instead") from None


def read_state_dict(path: Path, key: str | None = None, named_by: str = "weights_key") -> dict[str, Tensor]:
    """Read a file of weights: a state_dict, alone or under the name that a training script gives it.

    Args:
        path: a file of torch.save or safetensors.
        key: the state_dict's name, `ema.module` for a nested one, or the prefix of one network's tensor names.
        named_by: the name of `key` in errors.

    Raises:
        UserError: the file is missing or damaged, holds no state_dict, none that `key` names, or several and no `key`.
    """
    content = load_tensors(path)
    found = _state_dicts(content)
    if not found:
        inside = content.items() if isinstance(content, Mapping) else ()
        held = ", ".join(f"{name!s:.30}: {type(value).__name__}" for name, value in list(inside)[:5])
        what = f"holds {{{held}}}" if held else f"holds a {type(content).__name__}"
        raise UserError(f"{path}: {what:.150}, not a state_dict (a mapping from names to tensors)")
    if key is None and len(found) > 1:
        listed = ", ".join(f"{name:.40} ({len(state)} tensors)" for name, state in list(found.items())[:6])
        raise UserError(f"{named_by}: {path} holds several state_dicts; name one of {listed}")
    if key is None or key in found:
        return found[key or next(iter(found))]
    begun = {name: tensor for state in found.values() for name, tensor in state.items() if name.startswith(f"{key}.")}
    if len(found) > 1 or not begun:
        raise unknown(named_by, key, [name[:40] for name in found][:10])
    return begun


def _state_dicts(content: Any, name: str = "", depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """Return every state_dict in a file by its name, which is empty for the file itself."""
    entries = (
        {key: value for key, value in content.items() if isinstance(key, str)} if isinstance(content, dict) else {}
    )
    inside: dict[str, dict[str, Tensor]] = {}
    for key, value in entries.items() if depth else ():
        inside |= _state_dicts(value, f"{name}.{key}" if name else key, depth - 1)
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    return inside or ({name: tensors} if any(tensor.ndim > 1 for tensor in tensors.values()) else {})


def fitted(state: Mapping[str, Tensor], own: Collection[str], source: str, key: str) -> dict[str, Tensor]:
    """Return a state_dict by the names `own` of a network's tensors, without the names of modules that lay around it.

    If another module held the network, as Lightning's do, that module's other tensors are left out. `key` is
    the param that an error names.

    Raises:
        UserError: the other module held two networks that fit, a student and a teacher for example.
    """
    wanted = {_unwrapped(name): name for name in own}
    plain = {_unwrapped(name): tensor for name, tensor in state.items()}
    fits: Counter[str] = Counter()
    for name in plain:
        parts = name.split(".", _DEPTH)
        for at in range(len(parts)):
            if ".".join(parts[at:]) in wanted:
                fits["".join(f"{part}." for part in parts[:at])] += 1
    most = max(fits.values(), default=0)
    best = [prefix for prefix, count in fits.items() if count == most]
    prefix = "" if "" in best or not best else best[0]
    if prefix and len(best) > 1 and 2 * most > len(wanted):
        which = " and ".join(one.removesuffix(".") for one in best[:4])
        raise UserError(f"{key}: {source} holds several networks that fit: {which:.150}; name one")
    found = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    return {wanted.get(name, name): tensor for name, tensor in found.items() if name in wanted or name != "n_averaged"}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def network_of_state(
    state: dict[str, Tensor], source: str, architecture: str, image_size: int | Shape
) -> tuple[nn.Module, int]:
    """Return the network of a whole state_dict, with its weights, and the number of classes that its head has.

    `source` is the state's name in errors.

    Raises:
        UserError: there is no such architecture, or the state does not fit it.
    """
    network = build(architecture, 1, image_size, "architecture")
    check_layers(network, "architecture")
    head = f"{head_name(network)}.weight"
    own = network.state_dict()
    state = padded_names(opened_names(fitted(state, own, source, "weights_key")), own)
    check_dense(state, source)
    weight = state.get(head)
    if weight is None or not weight.ndim:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {head}")
    model = build(architecture, weight.shape[0], image_size, "architecture")
    check_logits(model, weight.shape[0], image_size, "image_size")
    missing = load_state(model, state, source, "model", architecture).missing
    if missing:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {len(missing)} tensors, {missing[0]}")
    return model, weight.shape[0]
