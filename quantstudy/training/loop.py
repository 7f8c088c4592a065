"""The one training loop, for fine-tuning and for quantization-aware training.

It keeps the epoch with the best top-1 on the validation images (a part of the training split), writes its
curve after every epoch, and resumes after a kill from the last epoch whose state it saved. Saving is skipped
while it would take more than a tenth of the time trained since the last save, so it does not slow down a large model on
a small data set.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from quantstudy import params as P
from quantstudy.data.batches import Batches
from quantstudy.data.container import Split
from quantstudy.data.sampling import validation_indices
from quantstudy.errors import UserError
from quantstudy.machine.device import autocast
from quantstudy.network.checkpoint import load_into
from quantstudy.network.source_code import scripts_sha256
from quantstudy.training import parallel
from quantstudy.training.optimization import make_optimizer, make_schedule, training_loss
from quantstudy.training.progress import Run, State, keep, restore, save, write_curve

__all__ = ["MEMORY_FORMAT", "Run", "State", "evaluate", "fingerprint", "summary", "train", "training_and_validation"]

SAVE_SHARE = 0.1
MEMORY_FORMAT = torch.channels_last


def train(model: nn.Module, training: Batches, validation: Batches, run: Run) -> State:
    """Train `model` in place, leave it with the weights of its best epoch, return the run's state.

    With 0 epochs it is only scored, if there are validation images.
    """
    if not run.settings.epochs:
        state = State()
        if validation.images:
            _score(state, model, validation, run, {"epoch": 0})
        if not parallel.rank():
            write_curve(run.curve, state.rows)
        return state
    device = next(model.parameters()).device
    averaging = parallel.averaging(model)
    optimizer = make_optimizer(model, run.settings, run.groups, fused=run.dtype != torch.float16)
    schedule = make_schedule(optimizer, run.settings, len(training))
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    state = restore(run, parts)
    saved_at = time.perf_counter()
    save_seconds = 0.0
    if run.score_start and not state.rows:
        _score(state, model, validation, run, {"epoch": 0})
    for epoch in range(state.epoch + 1, run.settings.epochs + 1):
        training.set_epoch(epoch)
        row = _one_epoch(averaging, training, optimizer, schedule, scaler, run, epoch)
        _score(state, model, validation, run, row)
        state.epoch = epoch
        elapsed = time.perf_counter() - saved_at
        if parallel.rank():
            continue
        write_curve(run.curve, state.rows)
        tqdm.write(_line(run, row))
        if epoch < run.settings.epochs and save_seconds <= SAVE_SHARE * elapsed:
            save_seconds = save(run, parts, state)
            saved_at = time.perf_counter()
    load_into(model, state.best)
    if not parallel.rank():
        run.resume.unlink(missing_ok=True)
    return state


def _score(state: State, model: nn.Module, validation: Batches, run: Run, row: dict[str, float]) -> None:
    if run.before_validation:
        run.before_validation(model)
    parallel.share_buffers(model)
    row["validation_loss"], row["validation_top1"] = evaluate(model, validation, run.dtype)
    if not math.isfinite(row["validation_loss"]):
        cause = f"; lower learning_rate, which is {run.settings.learning_rate}" if row["epoch"] else " before training"
        raise UserError(f"{run.name}: the logits of the validation images are not finite{cause}")
    keep(state, model, row)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, dtype: torch.dtype | None = None) -> tuple[float, float]:
    """Return the mean cross-entropy and the top-1 in percent of `model`, in eval mode, on all of `batches`."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for images, labels in batches:
        with autocast(images.device, dtype):
            logits = model(images).float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
    return loss / seen, 100 * correct / seen


def _one_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    scaler: torch.amp.GradScaler,
    run: Run,
    epoch: int,
) -> dict[str, float]:
    model.train(run.groups is None)
    device = next(model.parameters()).device
    total_loss = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    seen, started, waited = 0, time.perf_counter(), batches.seconds_waiting
    title = f"{run.name} {epoch}/{run.settings.epochs}"
    own = batches.images // parallel.world()
    with tqdm(total=own, desc=title, unit="img", leave=False, mininterval=1.0, disable=parallel.rank() > 0) as bar:
        for images, labels in batches:
            with autocast(device, run.dtype):
                taught = _taught(run, images)
                logits = model(images).float()
                loss = training_loss(logits, labels, run.settings.label_smoothing, taught, run.distillation)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total_loss += loss.detach() * len(labels)
            correct += (logits.detach().argmax(1) == labels).sum()
            seen += len(labels)
            bar.update(len(labels))
            if not bar.disable and bar.n == bar.last_print_n:
                bar.set_postfix_str(f"loss {total_loss.item() / seen:.3f} top1 {100 * correct.item() / seen:.1f}%")
    seconds = time.perf_counter() - started
    totals = parallel.sum_over_processes(torch.stack([total_loss, correct, torch.full_like(correct, seen)]))
    loss_sum, correct_sum, seen_sum = totals.tolist()
    mean_loss = loss_sum / seen_sum
    if not math.isfinite(mean_loss):
        rate = run.settings.learning_rate
        raise UserError(f"{run.name}: the loss is {mean_loss} in epoch {epoch}; lower learning_rate, which is {rate}")
    return {
        "epoch": epoch,
        "train_loss": mean_loss,
        "train_top1": 100 * correct_sum / seen_sum,
        "learning_rate": schedule.get_last_lr()[0],
        "images_per_second": seen_sum / seconds,
        "waiting_percent": 100 * (batches.seconds_waiting - waited) / seconds,
    }


@torch.no_grad()
def _taught(run: Run, images: Tensor) -> Tensor | None:
    return None if run.teacher is None else run.teacher(images.clone()).float().softmax(1)


def _line(run: Run, row: dict[str, float]) -> str:
    return (
        f"{run.name} epoch {row['epoch']}/{run.settings.epochs}: loss {row['train_loss']:.4f}, "
        f"top-1 {row['train_top1']:.2f} %, validation top-1 {row['validation_top1']:.2f} %, "
        f"{row['images_per_second']:.0f} images/s, waiting for data {row['waiting_percent']:.1f} %"
    )


def training_and_validation(
    split: Split, preprocessing: P.Preprocessing, settings: P.Training, seed: int, device: torch.device, key: str = ""
) -> tuple[Batches, Batches]:
    """Return the batches to train on and the validation batches, both of the training split.

    With 0 epochs the split may be empty; then the batches are empty too.

    Raises:
        UserError: naming `key`, the param that asks for training: a class has no images, though there are as many
            images as classes, or a batch has fewer than two images per process.
    """
    if settings.epochs:
        _check_classes(split, f"{key or 'training.epochs'}: {settings.epochs}")
    if settings.epochs or len(split) > 1:
        kept, held_out = validation_indices(split.labels, settings.validation_fraction, seed)
    else:
        kept = held_out = torch.arange(len(split))
    if settings.max_images is not None:
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        kept = kept[order[: settings.max_images]]
    if settings.epochs and min(settings.batch_size, len(kept)) < 2 * parallel.world():
        found = f"batches of {settings.batch_size} from {len(kept)} images have less than two images for each process"
        raise UserError(f"{key or 'training.epochs'}: {found}, which batch normalization needs; raise one of them")
    drawn: Any = {"augmentation": settings.augmentation, "seed": seed, "share": (parallel.rank(), parallel.world())}
    training = Batches(split, preprocessing, settings.batch_size, device, indices=kept, shuffle=True, **drawn)
    return training, Batches(split, preprocessing, 2 * settings.batch_size, device, indices=held_out)


def _check_classes(split: Split, setting: str) -> None:
    absent = split.labels.bincount(minlength=len(split.classes)).eq(0).nonzero().flatten().tolist()
    if absent and not 0 < len(split) < len(split.classes):
        lacking = f"{len(absent)} of {len(split.classes)} classes"
        found = f"{lacking} have no training images, {split.classes[absent[0]]} for one"
        remedy = "add some, or set training.epochs to 0 and leave out the methods that train"
        raise UserError(f"{setting} would train, but {found}; {remedy}")


def summary(state: State, training: Batches, validation: Batches) -> dict[str, Any]:
    """Return the facts to keep of a finished run."""
    return {
        "train_images": training.images,
        "validation_images": validation.images,
        "best_epoch": state.best_epoch,
        "validation_top1": state.best_score[0] if state.rows else None,
    }


def fingerprint(script: str, *parts: Any) -> str:
    """Return a text that is equal only for runs of equal code and `parts`: settings, seed, checksums of files read.

    `script` is the file that trains; all code that it runs counts.
    """
    root = Path(__file__).resolve().parents[2]
    code = scripts_sha256([Path(script).resolve().relative_to(root)], root)
    plain = [part.model_dump() if isinstance(part, P.Section) else part for part in parts]
    return json.dumps([*code.values(), *plain])
