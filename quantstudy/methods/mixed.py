"""Mixed precision by the two rules of thumb of the reference study: some layers in integers, the rest in 16 bits."""

from collections.abc import Collection
from typing import Any

from torch import nn

from quantstudy import params as P
from quantstudy.machine.device import DTYPES
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipe import Row, register
from quantstudy.methods.uniform import UniformRecipe
from quantstudy.quantization.variant import Variant, cast


class MixedRecipe(UniformRecipe[Row]):
    """The chosen layers in integers, every other layer in a 16-bit float type."""

    def quantize(self, model: nn.Module, calibration: Calibration, row: Any) -> Variant:
        variant = super().quantize(model, calibration, row)
        return cast(variant.network, DTYPES[row.dtype], variant.skipped)


@register(P.MixedLinear)
class MixedLinearRecipe(MixedRecipe[P.MixedLinear]):
    """Linear layers in integers (the reference study's simple rule)."""

    def chosen(self, layers: dict[str, Any], row: P.MixedLinear) -> Collection[str]:
        return [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]


@register(P.MixedVariance)
class MixedVarianceRecipe(MixedRecipe[P.MixedVariance]):
    """The `fraction` of layers, at least one, with the lowest weight variance in integers."""

    def chosen(self, layers: dict[str, Any], row: P.MixedVariance) -> Collection[str]:
        by_variance = sorted(layers, key=lambda name: float(layers[name].weight.var(correction=0)))
        return by_variance[: max(round(row.fraction * len(layers)), 1)]
