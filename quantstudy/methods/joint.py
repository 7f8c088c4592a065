"""Joint fine-tuning: every degree of freedom of a quantized network at once, without labels.

Finkelstein, Fuchs, Tal, Grobman, Vosco and Meller, *QFT: Post-training Quantization via Fast Joint Finetuning of All
Degrees of Freedom*, 2022. The fp32 network is the teacher; its pupil's weights, scales and biases learn together by
Adam and straight-through gradients, starting from what the earlier steps of a method made: here codes, e.g. of GPTQ.
All layers move with each pass over a batch, so that a few hundred steps on two cores do what layer-wise reconstruction
needs thousands a layer for.

A weight is s exp(t) clip(round(v)): v starts at its code and learns in units of the step, so that one learning rate
suits layers of any size; t and the activation scales learn relative to their start. The loss is the Kullback-Leibler
divergence of the predictions (the paper: features before the head). Images are flipped at random. Layers of more than
`LARGE` weights keep their codes: Adam on a hundred million takes seconds a step.

`finetune_jointly` is the last step of post-training methods, on the calibration images. The kind `qat_joint` trains the
same way by the epoch, on the training images: `JointRecipe`.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.methods.reconstruction import LARGE, progress_of
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.learned import LearnedActivation
from quantstudy.quantization.schemes import WeightScheme

STEPS = 500
BATCH_SIZE = 64
CODE_RATE = 0.03
SCALE_SHARE, BIAS_SHARE = 1 / 15, 1 / 30
"""The rates of scales, relative to their start, and of biases, as shares of that of codes."""


class MovingCodes(nn.Module):
    """A weight quantizer whose codes and scales learn; it starts at those of a frozen layer."""

    def __init__(self, codes: Tensor, scale: Tensor, scheme: WeightScheme) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, codes.shape
        self.register_buffer("start", scale.clone())
        self.start: Tensor
        self.codes = nn.Parameter(scheme.grouped(codes.float()))
        self.log_scale = nn.Parameter(torch.zeros_like(scale))

    def scale(self) -> Tensor:
        """Return the scales, float32 [O, groups]."""
        return self.start * self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight; the argument, a layer's own, is not used."""
        rounded = torch.fake_quantize_per_tensor_affine(self.codes, 1.0, 0, self.scheme.lowest, self.scheme.highest)
        return self.scheme.ungrouped(rounded * self.scale().unsqueeze(2), self.shape)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 codes and the scales."""
        codes = self.codes.round().clamp(self.scheme.lowest, self.scheme.highest).to(torch.int8)
        return self.scheme.ungrouped(codes, self.shape), self.scale()


def finetune_jointly(reference: nn.Module, network: nn.Module, images: list[Tensor], seconds: float) -> dict[str, str]:
    """Train `network`, whose layers are frozen, to predict what `reference` does; it is frozen again afterwards.

    Args:
        reference: the fp32 network.
        network: the quantized one, in place.
        images: batches of float32 [N, 3, S, S].
        seconds: at most; the schedule is then shorter.

    Returns:
        The layers whose codes and scales did not learn, with why.
    """
    kept = make_trainable(network)
    optimizer = torch.optim.Adam(parameter_groups(network, CODE_RATE), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    pixels = torch.cat(images)
    with torch.no_grad():
        both = (images, [x.flip(3) for x in images])
        taught = [torch.cat([reference(x).log_softmax(1) for x in batches]) for batches in both]
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for progress in progress_of(STEPS, time.monotonic() + seconds):
            chosen = torch.randint(len(pixels), (min(BATCH_SIZE, len(pixels)),), generator=generator)
            flip = int(torch.randint(2, (), generator=generator))
            x = pixels[chosen].flip(3) if flip else pixels[chosen]
            x = x.contiguous(memory_format=torch.channels_last)
            predicted = network(x).log_softmax(1)
            loss = F.kl_div(predicted, taught[flip][chosen], log_target=True, reduction="batchmean")
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    freeze_trained(network)
    return kept


def make_trainable(network: nn.Module) -> dict[str, str]:
    """Let what frozen layers have learn, and nothing else, in place: biases, activation scales, codes if not LARGE.

    Returns:
        The layers whose codes and weight scales do not learn, with why.
    """
    network.requires_grad_(False)
    layers = quantized_layers(network)
    for layer in layers.values():
        layer.forget_dense()
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
        activation = layer.activation
        if activation.scheme.mode == "static":
            grid = (activation.scale, activation.zero_point, activation.scheme.highest)
            activation.learned = LearnedActivation(*grid)
        if layer.shape.numel() <= LARGE:
            layer.weight_quantizer = MovingCodes(layer.weight_codes(), layer.weight_scale.float(), layer.scheme.weight)
    reason = f"more than {LARGE:,} weights: codes and scales stay"
    return {name: reason for name, layer in layers.items() if layer.weight_quantizer is None}


def parameter_groups(network: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return what `make_trainable` lets learn, for Adam: codes at `rate`, all else in proportion to it."""
    layers = list(quantized_layers(network).values())
    quantizers = [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    found = [
        {"params": [quantizer.codes for quantizer in quantizers], "lr": rate},
        {"params": [quantizer.log_scale for quantizer in quantizers], "lr": rate * SCALE_SHARE},
        {"params": [layer.bias for layer in layers if layer.bias is not None], "lr": rate * BIAS_SHARE},
    ]
    for layer in layers:
        if (learned := layer.activation.learned) is not None:
            found.append({"params": [learned.scale], "lr": rate * SCALE_SHARE * layer.activation.scale})
    return [group for group in found if group["params"]]


@torch.no_grad()
def freeze_trained(network: nn.Module) -> None:
    """Freeze what `make_trainable` made trainable, in place."""
    for layer in quantized_layers(network).values():
        layer.activation.adopt_learned()
        if layer.weight_quantizer is not None:
            layer.freeze()
        layer.requires_grad_(False)
