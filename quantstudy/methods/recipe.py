"""A recipe is how the methods of one kind make a variant; it is registered by the class of their row in the params.

A new kind is a file in this package with a recipe, a row class in `quantstudy.params.methods`, an import in
`methods.recipes`, and a row in `params.yaml`. Nothing else asks what kind a method is.
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
        """Return what is stored of the trained `variant`; `model` is what it was prepared from."""
        raise NotImplementedError

    def parameter_groups(self, variant: Variant, learning_rate: float) -> list[dict[str, Any]] | None:
        """Return what Adam trains, each group at its own rate; None: all parameters, as the study's row says."""
        return None

    def autocast_dtype(self, row: Row) -> torch.dtype | None:
        """Return the type of mixed precision; None: float32."""
        return None

    def distillation(self, row: Row) -> float:
        """Return the share of the fp32 model's predictions in what is learned, beside the labels."""
        return 0.0

    def before_validation(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None] | None:
        """Return what is done to the network before each validation, if anything; `batches` are those it trains on."""
        return None


RECIPES: dict[type[P.MethodRow], Recipe[Any]] = {}


def register(row: type[P.MethodRow]) -> Callable[[type[Recipe[Any]]], type[Recipe[Any]]]:
    """Make the class below the recipe of the methods whose row is a `row`."""

    def add(recipe: type[Recipe[Any]]) -> type[Recipe[Any]]:
        RECIPES[row] = recipe()
        return recipe

    return add
