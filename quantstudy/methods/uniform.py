"""The uniform integer methods: the same scheme in every layer, after training or with fine-tuning.

`methods.post_training` has the steps beyond rounding to nearest. Static fine-tuning rounds the weights in each forward
pass, with a straight-through gradient (Jacob et al., *Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference*, CVPR 2018). Joint fine-tuning does what `methods.joint` does, for whole epochs.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from quantstudy import params as P
from quantstudy.errors import UserError, one_line
from quantstudy.methods.bias_correction import correct_own_biases
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.fragile import (
    LOW_ACTIVATION_BITS,
    LOW_BITS,
    input_losses_alone,
    losses_alone,
    with_fragile_inputs,
    with_fragile_layers,
)
from quantstudy.methods.post_training import equalized, freeze
from quantstudy.methods.recipe import Recipe, Row, TrainedRecipe, register
from quantstudy.methods.trainable import freeze_trained, make_trainable, parameter_groups
from quantstudy.network.attention import operands
from quantstudy.network.graph import Graph, capture, put, relative_error
from quantstudy.network.macs import count_macs
from quantstudy.quantization.layers import ActivationQuantizer, LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import collect
from quantstudy.quantization.ranges import activation_range
from quantstudy.quantization.saturation import limit_of
from quantstudy.quantization.schemes import ActivationScheme, Mode, WeightScheme
from quantstudy.quantization.variant import Skipped, Variant, merged


class UniformRecipe(Recipe[Row]):
    """Equalize, put in quantized layers, round: the steps of all integer methods without training."""

    mode: Mode = "none"

    def chosen(self, layers: dict[str, Any], row: Row) -> Collection[str]:
        """Return the names of the layers to quantize, out of the `layers` that can be quantized."""
        return layers

    def simulated(self, model: nn.Module, calibration: Calibration, row: Any) -> Variant:
        """Return a copy of `model` with quantized layers whose weights are still float."""
        network = copy.deepcopy(model)
        names = self.chosen(calibration.replaceable, row)
        schemes = self.schemes(model, calibration, row, names)
        stray = put_quantized(network, schemes, calibration)
        skipped = merged(left_as_they_are(model, calibration.graph), {"quantization": stray})
        if getattr(row, "attention_products", False) and not self.put_operands(network, calibration, row):
            skipped["attention_products"] = {"": "no nn.MultiheadAttention of the network's is opened"}
        return Variant(network, skipped=skipped)

    def schemes(
        self, model: nn.Module, calibration: Calibration, row: Any, names: Collection[str]
    ) -> dict[str, LayerScheme]:
        """Return the scheme of each named layer."""
        return layer_schemes(model, calibration, row, names, self.mode)

    def put_operands(self, network: nn.Module, calibration: Calibration, row: Any) -> list[str]:
        """Put quantizers on the operands of attention's products, in place; return the operands' names."""
        scheme = ActivationScheme(self.mode, row.activation_bits)
        found, batches = operands(calibration.model), [(images, torch.empty(0)) for images in calibration.images]
        seen = collect(calibration.model, batches, calibration.bins, found)["layers"] if found else {}
        put(network, {name: self.quantizer(scheme, statistics, row) for name, statistics in seen.items()})
        return list(seen)

    def quantizer(self, scheme: ActivationScheme, statistics: dict[str, Any], row: Any) -> ActivationQuantizer:
        """Return the quantizer of an activation with these statistics."""
        return ActivationQuantizer(scheme)

    def quantize(self, model: nn.Module, calibration: Calibration, row: Any) -> Variant:
        plain = self.rounded(model, calibration, row)
        if not row.equalize:
            return plain
        other, own, skipped = equalized(model, calibration, row)
        if other is not model:
            variant = self.rounded(other, own, row)
            errors = [output_error(model, network, calibration.images) for network in (plain, variant)]
            if errors[1] < errors[0]:
                variant.skipped |= skipped
                return variant
            reason = "undone: on calibration images the logits are off by {1:.3g} of their norm, without it by {0:.3g}"
            skipped = {"equalize": {"": reason.format(*errors)}}
        plain.skipped |= skipped
        return plain

    def rounded(self, model: nn.Module, calibration: Calibration, row: Any) -> Variant:
        """Return a quantized copy of `model`; this does not equalize."""
        variant = self.simulated(model, calibration, row)
        variant.skipped = merged(variant.skipped, freeze(model, variant.network, calibration, row))
        return variant


@torch.no_grad()
def output_error(model: nn.Module, variant: nn.Module, batches: Sequence[torch.Tensor]) -> float:
    """Return how far a variant's logits lie from the logits of `model`, relative to the norm of the latter."""
    wanted, found = (torch.cat([network(batch.clone()) for batch in batches]) for network in (model, variant))
    return relative_error(wanted, found)


@register(P.WeightOnly)
class WeightOnlyRecipe(UniformRecipe[P.WeightOnly]):
    """Integer weights in every layer; activations stay float32."""


@register(P.Dynamic)
class DynamicRecipe(UniformRecipe[P.Dynamic]):
    """Integer weights and activations; the activation range is the batch's own, found at run time."""

    mode = "dynamic"


@register(P.Static)
class StaticRecipe(UniformRecipe[P.Static]):
    """Integer weights and activations; the activation range comes from calibration."""

    mode = "static"

    def schemes(
        self, model: nn.Module, calibration: Calibration, row: Any, names: Collection[str]
    ) -> dict[str, LayerScheme]:
        schemes = super().schemes(model, calibration, row, names)
        inputs = {name: scheme.activation for name, scheme in schemes.items()}
        low = {name: scheme for name, scheme in inputs.items() if scheme.bits <= LOW_ACTIVATION_BITS}
        if not low or row.fragile_bits is None or row.fragile_bits <= row.activation_bits:
            return schemes
        images = torch.cat(calibration.images)
        quantizers = {name: self.quantizer(scheme, calibration.statistics[name], row) for name, scheme in low.items()}
        losses = input_losses_alone(model, quantizers, images)
        _, macs = count_macs(model, (images.shape[1], images.shape[2], images.shape[3]))
        return with_fragile_inputs(macs, schemes, losses, row.fragile_bits, row.fragile_operations)

    def simulated(self, model: nn.Module, calibration: Calibration, row: P.Static) -> Variant:
        variant = super().simulated(model, calibration, row)
        for name, layer in quantized_layers(variant.network).items():
            layer.activation = self.quantizer(layer.scheme.activation, calibration.statistics[name], row)
        return variant

    def quantizer(self, scheme: ActivationScheme, statistics: dict[str, Any], row: P.Static) -> ActivationQuantizer:
        bounds = activation_range(statistics, scheme, row.activation_range, row.clip_percentile)
        return ActivationQuantizer(scheme, *scheme.choose_qparams(*bounds))


@register(P.QatStatic)
class TrainedStaticRecipe(TrainedRecipe[P.QatStatic]):
    """The static scheme, fine-tuned with float weights that are rounded in each forward pass."""

    def prepare(self, model: nn.Module, calibration: Calibration, row: P.QatStatic) -> Variant:
        variant = StaticRecipe().simulated(model, calibration, row)
        variant.requires_grad_(True)
        return variant

    @torch.no_grad()
    def finish(self, variant: Variant, model: nn.Module, row: P.QatStatic) -> Variant:
        for layer in quantized_layers(variant.network).values():
            layer.freeze()
        return variant


@register(P.QatJoint)
class JointRecipe(TrainedRecipe[P.QatJoint]):
    """Quantize as the row says after training, then let codes, scales and biases learn on the training images."""

    def prepare(self, model: nn.Module, calibration: Calibration, row: P.QatJoint) -> Variant:
        variant = StaticRecipe().quantize(model, calibration, row)
        if kept := make_trainable(variant.network):
            variant.skipped["finetune"] = kept
        if not any(parameter.requires_grad for parameter in variant.parameters()):
            raise UserError("kind: qat_joint finds nothing to train: no layer of this network is quantized")
        return variant

    def finish(self, variant: Variant, model: nn.Module, row: P.QatJoint) -> Variant:
        freeze_trained(variant.network)
        return variant

    def parameter_groups(self, variant: Variant, learning_rate: float) -> list[dict[str, Any]]:
        return parameter_groups(variant.network, learning_rate)

    def distillation(self, row: P.QatJoint) -> float:
        """Return 1: it learns from the fp32 model alone."""
        return 1.0


def put_quantized(network: nn.Module, schemes: dict[str, LayerScheme], calibration: Calibration) -> dict[str, str]:
    """Put quantized layers into `network` in place; return the layers that had to stay, each with the reason.

    The network is captured again, and must make the same calls as before.

    Raises:
        UserError: it makes other calls, or fails.
    """
    before = {name: network.get_submodule(name) for name in schemes}
    replaced = quantize_layers(network, schemes)
    try:
        graph = capture(network, calibration.images[0])
        stray = [name for name in replaced if name not in graph.calls_of]
        put(network, {name: before[name] for name in stray})
        graph = capture(network, calibration.images[0]) if stray else graph
    except Exception as error:  # a network may use attributes that only its original layers have
        raise UserError(f"method: the network fails with quantized layers: {one_line(error)}") from None
    is_known = graph.problem is None and calibration.graph.problem is None
    if is_known and [call.name for call in graph.calls] != [call.name for call in calibration.graph.calls]:
        raise UserError("method: the network computes otherwise with quantized layers; it asks for a layer's class")
    return dict.fromkeys(stray, "the network calls it from outside its modules, from a list for one")


def left_as_they_are(model: nn.Module, graph: Graph) -> Skipped:
    """Return the layers that no method quantizes and the normalizations that were not folded, with the reasons."""
    return merged({"quantization": graph.left, "folding": getattr(model, "unfolded", {})})


def layer_schemes(
    model: nn.Module, calibration: Calibration, row: P.Scheme, names: Collection[str], mode: Mode
) -> dict[str, LayerScheme]:
    """Return the scheme of each named layer.

    `edge_bits` are the least bits of the first layer that runs and of the head. Where weights have few bits,
    `fragile_bits` are the most bits that a layer may get.
    """
    graph = calibration.graph
    edges = (graph.order[0], graph.head() or graph.order[-1]) if graph.order else ()
    activation_bits = int(getattr(row, "activation_bits", 32))

    def scheme(name: str) -> LayerScheme:
        least = (row.edge_bits or 0) if name in edges else 0
        bits = max(row.weight_bits, least)
        limited = bits == 8 and getattr(row, "saturation_free", False)
        limit = limit_of(graph.plain[name]) if limited else "none"
        weight = WeightScheme(bits, row.group_size, row.weight_range, limit)
        return LayerScheme(weight, ActivationScheme(mode, max(activation_bits, least)))

    schemes = {name: scheme(name) for name in names}
    low = {name: found for name, found in schemes.items() if found.weight.bits <= LOW_BITS}
    if row.fragile_bits is None or not low:
        return schemes
    layers, images = calibration.replaceable, torch.cat(calibration.images)
    learned = row.rounding in ("adaround", "brecq")
    rounding = row.model_copy(update={"rounding": "gptq"}) if learned else row  # learned rounding would take minutes
    losses = losses_alone(model, layers, rounded_alone(model, calibration, rounding, low)[0], images)
    highest = row.fragile_bits if mode == "none" else min(row.fragile_bits, 7)  # int8 sums may saturate with eight
    held = edges if row.edge_bits else ()
    given = (layers, schemes, losses, highest, row.fragile_share)
    return with_fragile_layers(*given, between=row.fragile_between, edges=held)


def rounded_alone(
    model: nn.Module, calibration: Calibration, row: P.Rounding, schemes: dict[str, LayerScheme]
) -> tuple[dict[str, Any], Skipped]:
    """Return frozen layers by name, each rounded by itself, and what could not be done; activations stay float.

    Steps that look at other layers' errors are left out: fine-tuning, and all of bias correction but the layer's own
    mean error. Only learned rounding sees the other layers, rounded to the same bits.
    """
    network = copy.deepcopy(model)
    quantize_layers(network, {name: LayerScheme(scheme.weight) for name, scheme in schemes.items()})
    skipped = freeze(model, network, calibration, row.model_copy(update={"bias_correction": False, "finetune": False}))
    layers = quantized_layers(network)
    if row.bias_correction and row.rounding != "brecq":  # which has learned the biases
        correct_own_biases(model, network, calibration.moments(layers))
    return layers, skipped
