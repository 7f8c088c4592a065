"""What a training step minimizes, and how: the loss, the optimizer, the learning rate by step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy import params as P


def training_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, taught: Tensor | None = None, share: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy of logits [N, classes] with labels int64 [N].

    With `taught`, a teacher's probabilities [N, classes] make up a `share` of the targets (Hinton et al.,
    *Distilling the Knowledge in a Neural Network*, 2015, at temperature 1).
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss if taught is None else (1 - share) * loss + share * F.cross_entropy(logits, taught)


def make_optimizer(
    model: nn.Module, settings: P.Training, groups: list[dict[str, Any]] | None = None, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Return SGD or AdamW of a model's parameters, or Adam of `groups` with their own rates.

    Weight decay applies to matrices and kernels, not to biases and BatchNorm. With a gradient scaler, do not set
    `fused`: the fused step on a CPU does not skip gradients that overflowed.
    """
    if groups is not None:
        return torch.optim.Adam(groups, fused=fused)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, settings: P.Training, steps_per_epoch: int) -> Any:
    """Return the learning rate by step: constant, cosine to zero, or one cycle (Smith 2018) with a 30 % warm-up."""
    steps = settings.epochs * steps_per_epoch
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if settings.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps + 1, cycle_momentum=False
        )
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
