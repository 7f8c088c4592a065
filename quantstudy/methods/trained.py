"""A method that trains, from its row to its variant: prepare, train on the study's images, finish."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.data.container import Split
from quantstudy.files import sha256
from quantstudy.machine.device import describe
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import naming, trained_recipe_of
from quantstudy.network.architectures import check_logits
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.quantization.variant import Variant
from quantstudy.training import loop, parallel


@dataclass(frozen=True)
class Place:
    """Where a training run finds what it needs, and where it leaves its files."""

    study: str
    fp32: Path
    curve: Path
    resume: Path
    inputs: Sequence[Path]
    """The other files that the run depends on; a state that was saved with different ones is not resumed."""


def train(
    place: Place,
    study: P.Study,
    method: str,
    row: Any,
    calibrate: Callable[[nn.Module], Calibration],
    split: Split,
    device: torch.device,
) -> tuple[Variant | None, dict[str, Any]]:
    """Return the finished variant and the facts of its training; the variant is None in all processes but one.

    Args:
        place: the files of the run.
        study: the study's row.
        method: the name of a method that trains.
        row: the method's row, as `made_for` its target.
        calibrate: returns the calibration of the fp32 network, folded or not.
        split: the training images; a part of them validates.
        device: the device to train on.

    Raises:
        UserError: the method cannot be applied to this network.
    """
    recipe = trained_recipe_of(row)
    model, preprocessing = load_fp32(place.fp32, fold=not recipe.keeps_batchnorm), load_preprocessing(place.fp32)
    key = f"studies.{place.study}.model.architecture"
    check_logits(model, load_checkpoint(place.fp32)["classes"], preprocessing.shape, key, trains=True)
    with naming(row, f"methods.{method}"):
        variant = recipe.prepare(model, calibrate(model), row)
    variant.to(device)

    settings = row.training(study.qat, method)
    settings = settings.model_copy(update={"validation_fraction": study.training.validation_fraction})
    batches, validation = loop.training_and_validation(
        split, preprocessing, settings, study.seed, device, f"studies.{place.study}.qat.epochs"
    )
    distillation = recipe.distillation(row)
    run = loop.Run(
        name=f"{place.study} {method}",
        settings=settings,
        curve=place.curve,
        resume=place.resume,
        fingerprint=loop.fingerprint(
            __file__,
            *(settings, row, study.seed, preprocessing),
            *(sha256(path) for path in (place.fp32, *place.inputs)),
        ),
        dtype=recipe.autocast_dtype(row),
        score_start=True,
        before_validation=recipe.before_validation(batches),
        groups=recipe.parameter_groups(variant, settings.learning_rate),
        teacher=load_fp32(place.fp32).to(device) if distillation else None,
        distillation=distillation,
    )
    state = loop.train(variant, batches, validation, run)
    facts = loop.summary(state, batches, validation) | {"arithmetic": describe(device, run.dtype)}
    if parallel.rank():
        return None, facts
    skipped = variant.skipped
    stored = recipe.finish(variant.cpu(), model, row)
    stored.skipped, stored.method = skipped, row.said()
    return stored, facts
