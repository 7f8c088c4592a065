"""Load the weights that a model starts from: torchvision's, or a state_dict on disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.files import check_sha256
from quantstudy.network.architectures import Shape, build, check_layers, check_logits, torchvision_names
from quantstudy.network.attention import opened_names
from quantstudy.network.checkpoint import load_into, load_tensors
from quantstudy.network.graph import head_name

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
    own = model.state_dict()
    state = opened_names(state, own.keys())
    state = {k: v for k, v in state.items() if not k.startswith(AUXILIARY_HEADS) or k in own}
    _fit_positions(model, state, own)
    head = {f"{head_name(model)}.{tensor}" for tensor in ("weight", "bias")}
    strange = [k for k in state if k not in own or (state[k].shape != own[k].shape and k not in head)]
    if strange:
        first = strange[0]
        found = f"holds {first}" + (f" of shape {tuple(state[first].shape)}" if first in own else "")
        wanted = f"of shape {tuple(own[first].shape)} here" if first in own else "which it lacks"
        found += f", {wanted} ({len(strange)} of {len(state)} tensors do not fit)"
        raise UserError(f"{key}: {source!r} is not of architecture {architecture}: it {found}")
    usable = {name: tensor for name, tensor in state.items() if tensor.shape == own[name].shape}
    load_into(model, usable, strict=False)
    return LoadReport(source, list(usable), [name for name in own if name not in usable])


def _fit_positions(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    name = "encoder.pos_embedding"
    if name in state and name in own and state[name].ndim == 3 and state[name].shape[2] == own[name].shape[2]:
        from torchvision.models.vision_transformer import interpolate_embeddings

        interpolate_embeddings(model.image_size, model.patch_size, state)


def _imagenet(architecture: str) -> dict[str, torch.Tensor]:
    if architecture not in torchvision_names():
        raise UserError(f"model.weights: torchvision has no imagenet weights of {architecture}; name a file, or null")
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(architecture).DEFAULT.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        what = f"imagenet weights of {architecture} could not be downloaded ({error})"
        raise UserError(f"model.weights: {what}; put a state_dict on disk and name its path instead") from None


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


def network_of_state(
    state: dict[str, Tensor], source: str, architecture: str, image_size: int | Shape
) -> tuple[nn.Module, int]:
    """Return the network that a whole state_dict is of, and its classes: as many as its head has.

    `source` is what errors call the state.

    Raises:
        UserError: there is no such architecture, or the state is not of it.
    """
    network = build(architecture, 1, image_size, "architecture")
    check_layers(network, "architecture")
    head = f"{head_name(network)}.weight"
    weight = opened_names(state).get(head)
    if weight is None:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {head}")
    model = build(architecture, weight.shape[0], image_size, "architecture")
    check_logits(model, weight.shape[0], image_size, "image_size")
    missing = load_state(model, state, source, "model", architecture).missing
    if missing:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {len(missing)} tensors, {missing[0]}")
    return model, weight.shape[0]
