"""Casts to 16-bit floats, after training or after mixed-precision fine-tuning (Micikevicius et al., *Mixed Precision
Training*, ICLR 2018), where float16 uses a gradient scaler."""

import copy

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.machine.device import DTYPES
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipe import Recipe, TrainedRecipe, register
from quantstudy.quantization.variant import Variant, cast


@register(P.Cast)
class CastRecipe(Recipe[P.Cast]):
    """Cast every parameter; the arithmetic runs in that type too."""

    def quantize(self, model: nn.Module, calibration: Calibration, row: P.Cast) -> Variant:
        return cast(model, DTYPES[row.dtype])


@register(P.QatCast)
class TrainedCastRecipe(TrainedRecipe[P.QatCast]):
    """Fine-tune in mixed precision, then cast."""

    def prepare(self, model: nn.Module, calibration: Calibration, row: P.QatCast) -> Variant:
        return Variant(copy.deepcopy(model).requires_grad_(True))

    def finish(self, variant: Variant, model: nn.Module, row: P.QatCast) -> Variant:
        return cast(variant.network, DTYPES[row.dtype])

    def autocast_dtype(self, row: P.QatCast) -> torch.dtype:
        return DTYPES[row.dtype]
