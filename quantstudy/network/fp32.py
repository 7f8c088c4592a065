"""The file of an fp32 model, and the network of a file, with or without its weights."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.network.architectures import IMAGE_SIZE, Shape, build, check_code, code_sha256, is_own
from quantstudy.network.checkpoint import (
    check_dense,
    check_finite,
    load_checkpoint,
    load_into,
    reads_model,
    save_checkpoint,
)
from quantstudy.network.folding import channels_last, fold_in_place, fold_like, settle_weights


def save_fp32(
    path: Path,
    model: nn.Module,
    architecture: str,
    classes: int,
    preprocessing: P.Preprocessing,
    class_names: Sequence[str] | None = None,
    study: str | None = None,
) -> None:
    """Write the trained model, BatchNorm not folded, with its preprocessing, its classes and your own code's SHA-256.

    `study` is the study that the model and its variants belong to.
    """
    facts = new_facts(architecture, classes, preprocessing)
    facts |= {"class_names": list(class_names)} if class_names else {}
    facts |= {"study": study} if study else {}
    save_checkpoint(path, model.state_dict(), **facts, variant="fp32")


def new_facts(architecture: str, classes: int, preprocessing: P.Preprocessing) -> dict[str, Any]:
    """Return what the file of a new network holds in addition to its tensors."""
    facts = {"architecture": architecture, "classes": classes, "preprocessing": preprocessing.model_dump()}
    return facts | ({"code_sha256": code_sha256(architecture)} if is_own(architecture) else {})


def network_facts(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint that says which network its tensors belong to, and for which input."""
    keys = ("study", "architecture", "classes", "class_names", "preprocessing", "code_sha256")
    return {key: checkpoint[key] for key in keys if key in checkpoint}


@reads_model
def load_preprocessing(path: Path) -> P.Preprocessing:
    """Return the preprocessing of the input of a file's model, fp32 or a variant."""
    return _preprocessing_of(load_checkpoint(path))


@reads_model
def load_fp32(path: Path, *, fold: bool = True) -> nn.Module:
    """Read a model that `save_fp32` wrote: float32, BatchNorm folded or not, eval mode, channels_last, on the CPU."""
    checkpoint = load_checkpoint(path)
    model = _network_of(checkpoint, path)
    check_dense(checkpoint["state_dict"], path)
    load_into(model, checkpoint["state_dict"], assign=True)
    check_finite(model.state_dict(), path)
    model.eval()
    if fold:
        fold_in_place(model)
    else:
        settle_weights(model)
    return channels_last(model)


def skeleton_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """Return the network of a variant, read from `path`: folded like the variant, and without its weights."""
    return fold_like(_network_of(checkpoint, path).eval(), checkpoint["state_dict"].keys())


def skeleton(
    architecture: str, classes: int, image_size: int | Shape = IMAGE_SIZE, names: Collection[str] | None = None
) -> nn.Module:
    """Return an architecture as quantization sees it: BatchNorm folded, eval mode.

    The tensors of torchvision's networks have no storage. The tensors of your own network have their random start,
    since its code may compute more than parameters. `names` are the names in a state_dict; they say what is folded.
    """
    model = _without_weights(architecture, classes, image_size).eval()
    if names is not None:
        return fold_like(model, names)
    return fold_in_place(model)  # type: ignore[no-any-return]


def _preprocessing_of(checkpoint: dict[str, Any]) -> P.Preprocessing:
    return P.Preprocessing.model_validate(checkpoint["preprocessing"])


def _network_of(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    architecture = checkpoint["architecture"]
    check_code(architecture, checkpoint.get("code_sha256"), f"{path}: code_sha256")
    return _without_weights(architecture, checkpoint["classes"], _preprocessing_of(checkpoint).shape)


def _without_weights(architecture: str, classes: int, image_size: int | Shape) -> nn.Module:
    if is_own(architecture):
        return build(architecture, classes, image_size)
    try:
        with torch.device("meta"):
            return build(architecture, classes, image_size)
    except NotImplementedError:  # RegNet computes its widths with tensors
        return build(architecture, classes, image_size).to("meta")
