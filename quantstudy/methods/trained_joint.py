"""Joint fine-tuning (`methods.joint`) by the epoch, on the training images."""

from typing import Any

from torch import nn

from quantstudy import params as P
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.joint import freeze_trained, make_trainable, parameter_groups
from quantstudy.methods.recipe import TrainedRecipe, register
from quantstudy.methods.uniform import StaticRecipe
from quantstudy.quantization.variant import Variant


@register(P.QatJoint)
class JointRecipe(TrainedRecipe[P.QatJoint]):
    """Quantize as the row says after training, then let codes, scales and biases learn on the training images."""

    def prepare(self, model: nn.Module, calibration: Calibration, row: P.QatJoint) -> Variant:
        """Return the post-training result, ready to learn."""
        variant = StaticRecipe().quantize(model, calibration, row)
        if kept := make_trainable(variant.network):
            variant.skipped["finetune"] = kept
        return variant

    def finish(self, variant: Variant, model: nn.Module, row: P.QatJoint) -> Variant:
        """Freeze what learned."""
        freeze_trained(variant.network)
        return variant

    def parameter_groups(self, variant: Variant, learning_rate: float) -> list[dict[str, Any]]:
        """Return codes, scales and biases with their rates."""
        return parameter_groups(variant.network, learning_rate)

    def distillation(self, row: P.QatJoint) -> float:
        """Return 1: it learns from the fp32 model alone."""
        return 1.0
