"""Gather the model, images and settings of a study's search, from the files of its stages."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import images_of
from quantstudy.data.container import load_split
from quantstudy.errors import UserError
from quantstudy.files import sha256
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.trained import Place, train
from quantstudy.network.checkpoint import load_checkpoint, model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.quantization.variant import Variant
from quantstudy.runtimes.onnx_graph import load_graph
from quantstudy.runtimes.sessions import why_missing
from quantstudy.search.candidates import Candidate
from quantstudy.search.judging import Judge, drawn
from quantstudy.search.search import Workshop

CHECKED = 64
"""The number of calibration images on which the shipped form is compared with eager PyTorch."""


def opened(params: P.Params, name: str, study: P.Study, goal: P.Goal, device: torch.device) -> Workshop:
    """Return what the search of a study works with; raise `UserError` if a file, image or runtime is missing."""
    fp32 = model_file(name, "fp32", study.model.architecture)
    model, preprocessing = load_fp32(fp32), load_preprocessing(fp32)
    splits = {part: load_split(layout.split(name, part)) for part in ("train", "calibration")}
    if reason := why_missing(goal.runtime):
        raise UserError(f"studies.{name}.goal.runtime: {goal.runtime} is {reason}")
    images, rest = drawn(study, goal, name, splits["train"])
    own = splits["calibration"]
    graph = load_graph(layout.graph(name), name)
    judge = Judge(model, graph, preprocessing, images, goal, torch.get_num_threads())
    few = own.subset(torch.arange(min(CHECKED, len(own))))

    def calibrated(network: nn.Module) -> Calibration:
        batches = images_of(own, preprocessing, study.calibration.batch_size)
        return Calibration(network, batches, bins=study.calibration.bins)

    inputs = [layout.split(name, part) for part in splits]
    folder = layout.searching(name) / _digest(params, study, goal, fp32, *inputs)
    folder.mkdir(parents=True, exist_ok=True)

    def trained(candidate: Candidate) -> Variant:
        variant, _ = train(
            Place(name, fp32, folder / f"{candidate.name}.csv", folder / f"{candidate.name}.resume.pt", inputs),
            *(study, candidate.name, candidate.row.made_for(params.target)),
            calibrated,
            *(rest, device),
        )
        assert variant is not None, "a search trains in one process"
        return variant

    return Workshop(params, name, goal, fp32, load_checkpoint(fp32), calibrated(model), few, judge, folder, trained)


def _digest(params: P.Params, study: P.Study, goal: P.Goal, *files: Path) -> str:
    """Return a name that differs for a search with other inputs; the limits of the goal do not count."""
    rows = {name: row.said() for name, row in params.methods.items()}
    parts: list[Any] = [rows, params.target, study.qat, study.seed, study.calibration, *map(sha256, files)]
    parts += [study.training.validation_fraction, goal.runtime, goal.batch_size, goal.minimize, torch.get_num_threads()]
    code = Path("code.yaml")  # which code made what a killed search left
    parts.append(code.read_text(encoding="utf-8") if code.is_file() else "")
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
