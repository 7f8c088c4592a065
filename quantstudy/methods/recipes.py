"""Find the recipe of a method by its row; the imports here register all recipes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from quantstudy import params as P
from quantstudy.errors import UserError, unknown
from quantstudy.methods import budget, casts, lsq, mixed, uniform  # noqa: F401
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipe import RECIPES, TrainedRecipe
from quantstudy.quantization.variant import Variant


def trained_recipe_of(row: P.MethodRow) -> TrainedRecipe[Any]:
    """Return the recipe of a method that trains."""
    recipe = RECIPES[type(row)]
    assert isinstance(recipe, TrainedRecipe), f"{row.kind} does not train"
    return recipe


def method_row(params: P.Params, method: str, *, trains: bool) -> Any:
    """Return the row of a method; raise `UserError` unless there is one that trains, or does not, as `trains` says."""
    row = params.method(method)
    if row.trains != trains:
        raise unknown("method", method, [name for name, other in params.methods.items() if other.trains == trains])
    return row


def quantize(model: nn.Module, calibration: Calibration, row: P.MethodRow, key: str = "method") -> Variant:
    """Quantize an fp32 model after training, as a method's row says.

    Args:
        model: BatchNorm folded, eval mode; it stays untouched.
        calibration: the calibration of `model`.
        row: the row of a method that does not train.
        key: where the row lies in the params, for errors about its numbers.

    Raises:
        UserError: the method cannot be applied to this network.
    """
    with naming(row, key):
        variant = RECIPES[type(row)].quantize(model, calibration, row)
    variant.method = row.said()
    return variant


@contextlib.contextmanager
def naming(row: P.MethodRow, key: str) -> Iterator[None]:
    """Prefix the row's keys in an error with `key`, the place of the row in the params."""
    try:
        yield
    except UserError as error:
        keys, colon, rest = str(error).partition(":")
        names = keys.split(" and ")
        if not set(names) <= type(row).model_fields.keys():
            raise
        raise UserError(" and ".join(f"{key}.{name}" for name in names) + colon + rest) from None
