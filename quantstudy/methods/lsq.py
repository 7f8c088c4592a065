"""Quantization-aware training with learned step sizes, while BatchNorm is still in the network.

Weights are quantized before BatchNorm is folded. The usual schemes simulate the folding in training, at some cost
(Krishnamoorthi 2018, *Quantizing Deep Convolutional Networks for Efficient Inference*, section 3.2). Here nothing needs
simulating: a scale belongs to a channel or a part of it, so folding multiplies it by gamma / sigma and leaves the codes
alone. Only a negative gamma would turn the grid [-2^(b-1), 2^(b-1) - 1] around, so channels with a negative gamma are
negated first.

Schedule: weight scales start where `weight_range` puts them, by default at the least squared error of the weights;
activation scales start where calibration puts them (`activation_range`). Both learn from the first step; zero points
stay. Before each scoring, at the start and after each epoch, the statistics of BatchNorm are estimated anew with the
current weights (Nagel, Fournarakis, Bondarenko and Blankevoort 2022, *Overcoming Oscillations in Quantization-Aware
Training*, section 3). At the end, weights are rounded and BatchNorm is folded into scales and biases.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipe import TrainedRecipe, register
from quantstudy.methods.uniform import layer_schemes, left_as_they_are, put_quantized
from quantstudy.network.folding import NORMS, copy_of, fold_pairs, scaled_outputs
from quantstudy.network.graph import put
from quantstudy.quantization.layers import LayerScheme, quantized_layers
from quantstudy.quantization.learned import LearnedActivation, LearnedWeight
from quantstudy.quantization.ranges import activation_range
from quantstudy.quantization.variant import Variant, merged

RE_ESTIMATION_BATCHES = 50
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@torch.no_grad()
def learnable(
    model: nn.Module,
    calibration: Calibration,
    schemes: dict[str, LayerScheme],
    row: P.QatLsq,
    pairs: list[tuple[str, str]],
) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of `model`, its BatchNorm not folded, whose layers quantize with learned scales.

    `schemes` names the layers to quantize. The `row` chooses the ranges that activation scales start from. `pairs`
    lists each layer with the BatchNorm that folds into it.

    Returns:
        The network, and the layers that had to stay in float, each with the reason.
    """
    network = copy_of(model)
    for name, norm_name in pairs:
        before: Any = network.get_submodule(name)
        norm: Any = network.get_submodule(norm_name)
        if norm.weight is None:
            continue
        sign = torch.where(norm.weight < 0, -1.0, 1.0)
        before.weight.copy_(scaled_outputs(before, sign))
        if before.bias is not None:
            before.bias.mul_(sign)
        norm.weight.mul_(sign)
        norm.running_mean.mul_(sign)
    stray = put_quantized(network, schemes, calibration)
    for name, layer in quantized_layers(network).items():
        scheme, how = layer.scheme.activation, (row.activation_range, row.clip_percentile)
        layer.weight_quantizer = LearnedWeight(layer.weight.detach(), layer.scheme.weight)
        if scheme.mode == "static":
            scale, zero_point = scheme.choose_qparams(*activation_range(calibration.statistics[name], scheme, *how))
            layer.activation.learned = LearnedActivation(scale, zero_point, scheme.highest)
    return network, stray


@torch.no_grad()
def estimate_batchnorm(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the running mean and variance of every BatchNorm to their averages over some training batches, in place."""
    norms = [m for m in network.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
        norm.train()
    for number, (images, _) in enumerate(batches):
        if number == RE_ESTIMATION_BATCHES:
            break
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


@torch.no_grad()
def freeze_learned(network: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Round the weights of a trained network and fold BatchNorm, in place; `pairs` are those of `fold_pairs`.

    If gamma became negative in training, its channel gets the codes of the negated weight; the lowest code is clipped.
    """
    for trained in quantized_layers(network).values():
        trained.activation.adopt_learned()
        trained.freeze()
    for name, norm_name in pairs:
        layer: Any = network.get_submodule(name)
        norm: Any = network.get_submodule(norm_name)
        factor, scheme = (norm.running_var + norm.eps).rsqrt(), layer.scheme.weight
        beta = 0 if norm.bias is None else norm.bias
        factor = factor if norm.weight is None else factor * norm.weight
        sign = torch.where(factor < 0, -1, 1).view(-1, *[1] * (len(layer.shape) - 1))
        codes = layer.weight_codes().int() * sign
        codes = codes.clamp(scheme.lowest, scheme.highest).to(torch.int8)
        layer.set_codes(codes, (layer.weight_scale.float() * factor.abs()[:, None]).clamp_min(_SMALLEST_SCALE))
        before = 0 if layer.bias is None else layer.bias
        layer.bias = nn.Parameter((before - norm.running_mean) * factor + beta, requires_grad=False)
        put(network, {norm_name: nn.Identity()})


@register(P.QatLsq)
class LsqRecipe(TrainedRecipe[P.QatLsq]):
    """The static scheme with learned scales, trained with its BatchNorm."""

    keeps_batchnorm = True

    def prepare(self, model: nn.Module, calibration: Calibration, row: P.QatLsq) -> Variant:
        """Return a copy with learned scales."""
        graph = calibration.graph
        schemes = layer_schemes(model, calibration, row, calibration.replaceable, "static")
        pairs, unfolded = fold_pairs(graph, [name for name, m in model.named_modules() if isinstance(m, NORMS)])
        network, stray = learnable(model, calibration, schemes, row, pairs)
        variant = Variant(network.requires_grad_(True))
        variant.pairs = [pair for pair in pairs if pair[0] not in stray]
        unfolded |= {norm: f"{stray[name]}: {name}" for name, norm in pairs if name in stray}
        variant.skipped = merged(left_as_they_are(model, graph), {"quantization": stray, "folding": unfolded})
        return variant

    def finish(self, variant: Variant, model: nn.Module, row: P.QatLsq) -> Variant:
        freeze_learned(variant.network, variant.pairs)
        return variant

    def distillation(self, row: P.QatLsq) -> float:
        return row.distillation

    def before_validation(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None]:
        return lambda network: estimate_batchnorm(network, batches)
