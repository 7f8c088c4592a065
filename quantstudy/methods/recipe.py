"""A recipe makes the variants of one kind of method; it is registered by the class of their rows in the params.

To add a kind, write a recipe in a file of this package, a row class in `quantstudy.params.methods`, an import in
`methods.recipes`, and a row in `params.yaml`. No other code asks what kind a method is.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.methods.calibration import Calibration
from quantstudy.quantization.variant import Variant

Row = TypeVar("Row", bound=P.MethodRow)


class Recipe(Generic[Row]):
    """How a method that needs no training makes its variant."""

    def quantize(self, model: nn.Module, calibration: Calibration, row: Row) -> Variant:
        """Return the finished variant of `model`: fp32, BatchNorm folded, eval mode; it stays untouched."""
        raise NotImplementedError


class TrainedRecipe(Recipe[Row]):
    """How a method that trains makes its variant: `prepare`, then the training loop, then `finish`."""

    keeps_batchnorm = False
    """Whether `prepare` and `finish` get the network with its BatchNorm not folded."""

    def prepare(self, model: nn.Module, calibration: Calibration, row: Row) -> Variant:
        """Return a variant of the fp32 `model` whose parameters can be trained."""
        raise NotImplementedError

    def finish(self, variant: Variant, model: nn.Module, row: Row) -> Variant:
        """Return the variant to store, from the trained `variant`; `model` is the model that `prepare` got."""
        raise NotImplementedError

    def parameter_groups(self, variant: Variant, learning_rate: float) -> list[dict[str, Any]] | None:
        """Return Adam's parameter groups, each with its own rate; None: all parameters, as the study's row says."""
        return None

    def autocast_dtype(self, row: Row) -> torch.dtype | None:
        """Return the type of mixed precision; None: float32."""
        return None

    def distillation(self, row: Row) -> float:
        """Return the share of the fp32 model's predictions in the targets; the labels have the rest."""
        return 0.0

    def before_validation(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None] | None:
        """Return what to call on the network before each validation, or None; `batches` are the training batches."""
        return None


RECIPES: dict[type[P.MethodRow], Recipe[Any]] = {}


def register(row: type[P.MethodRow]) -> Callable[[type[Recipe[Any]]], type[Recipe[Any]]]:
    """Register the decorated class as the recipe of the methods whose rows have the class `row`."""

    def add(recipe: type[Recipe[Any]]) -> type[Recipe[Any]]:
        RECIPES[row] = recipe()
        return recipe

    return add
