"""A training run as files: its curve, and the state that it resumes from."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from quantstudy import params as P
from quantstudy.files import save_tensors, write_csv
from quantstudy.network.checkpoint import load_into, load_tensors

COLUMNS = (
    *("epoch", "train_loss", "train_top1", "validation_loss", "validation_top1"),
    *("learning_rate", "images_per_second", "waiting_percent"),
)


@dataclass(frozen=True)
class Run:
    """What one training run is called, where its files lie, and the arithmetic it uses."""

    name: str
    settings: P.Training
    curve: Path
    resume: Path
    fingerprint: str
    """Identifies data, model and settings: a saved state with another fingerprint is not resumed."""
    dtype: torch.dtype | None = None
    """Autocast type, None for float32; float16 brings a gradient scaler."""
    score_start: bool = False
    """Whether the untrained model competes as epoch 0, so that training can never lose on validation."""
    before_validation: Callable[[nn.Module], None] | None = None
    """Called with the model at the start and after each epoch, before it is scored and kept."""
    groups: list[dict[str, Any]] | None = None
    """Adam's groups, each with its rate, to train in eval mode; None: all parameters, as the settings say."""
    teacher: nn.Module | None = None
    distillation: float = 0.0
    """The share of the teacher's probabilities in the targets (Hinton et al. 2015, at temperature 1)."""


@dataclass
class State:
    """What changes during a run."""

    epoch: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_score: tuple[float, float] = (-1.0, -math.inf)


def keep(state: State, model: nn.Module, row: dict[str, float]) -> None:
    """Add the row of an epoch, and keep the weights if they are the best so far."""
    state.rows.append(row)
    score = (row["validation_top1"], -row["validation_loss"])
    if score > state.best_score:
        state.best_score, state.best_epoch = score, int(row["epoch"])
        state.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_curve(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the curve, one row per epoch, as CSV."""
    write_csv(path, COLUMNS, [{name: f"{value:.6g}" for name, value in row.items()} for row in rows])


def save(run: Run, parts: dict[str, Any], state: State) -> float:
    """Write all that a run needs to resume, and return the seconds that this took."""
    started = time.perf_counter()
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"fingerprint": run.fingerprint, "state": vars(state), "random": torch.get_rng_state()}
    if torch.cuda.is_available():  # dropout draws there
        content["random_cuda"] = torch.cuda.get_rng_state()
    save_tensors(run.resume, content)
    return time.perf_counter() - started


def restore(run: Run, parts: dict[str, Any]) -> State:
    """Load the state of an interrupted run of the same fingerprint; a broken or foreign file is ignored."""
    if not run.resume.is_file():
        return State()
    try:
        content = load_tensors(run.resume)
        if content["fingerprint"] != run.fingerprint:
            return State()
    except Exception as error:
        tqdm.write(f"{run.name}: {run.resume} cannot be read ({error}); training starts anew")
        return State()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_into(part, content[name])
        else:
            part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    if torch.cuda.is_available() and "random_cuda" in content:
        torch.cuda.set_rng_state(content["random_cuda"])
    state = State(**content["state"])
    tqdm.write(f"{run.name}: resumes after epoch {state.epoch} of {run.settings.epochs}")
    return state
