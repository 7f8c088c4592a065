"""Figures of methods that train."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.drawing.tiny import Example, figure, train
from quantstudy import params as P
from quantstudy.methods.lsq import estimate_batchnorm
from quantstudy.methods.recipes import quantize, trained_recipe_of
from quantstudy.quantization.learned import LearnedActivation
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.report import style

EPOCHS, LEARNING_RATE = 4, 1e-3
HIGHEST = 3
WIDTHS = (2, 3, 4)


def straight_through(example: Example) -> Figure:
    """Draw the rounding of a weight in the forward pass, and the gradient that passes back."""
    drawn, (left, right) = figure(1, 2)
    weight = torch.linspace(-1, 1, 1001).view(1, -1).requires_grad_(True)
    rounded = WeightScheme(3).fake_quantize(weight)
    rounded.sum().backward()
    values = weight.detach().flatten()
    left.plot(values, rounded.detach().flatten(), color=style.BLUE)
    left.plot(values, values, color=style.GREY, lw=1)
    left.set(xlabel="weight", ylabel="rounded weight", title="Forward, 3 bits")
    right.plot(values, weight.grad.flatten(), color=style.VERMILLION, label="straight through")  # type: ignore[union-attr]
    right.axhline(0, color=style.BLUE, label="the true one, almost everywhere")
    right.set(xlabel="weight", ylabel="gradient", ylim=(-0.2, 1.4), title="Backward")
    right.legend(loc="upper right")
    return drawn


def learned_step(example: Example) -> Figure:
    """Draw the gradient that a learned step size gets from each value."""
    drawn, axes = figure(1, 1)
    values = torch.linspace(-1, HIGHEST + 1, 501)
    gradients = [_scale_gradient(value) for value in values]
    axes.plot(values, gradients, color=style.VERMILLION, label="gradient of the step size")
    axes.plot(values, values.round().clamp(0, HIGHEST), color=style.BLUE, lw=1, label="code")
    axes.set(xlabel="value / step size", title=f"Learned step size, codes 0 to {HIGHEST}")
    axes.legend(loc="upper left")
    return drawn


def _scale_gradient(value: Tensor) -> float:
    quantizer = LearnedActivation(1.0, 0, HIGHEST)
    quantizer(value.view(1, 1)).sum().backward()
    return float(quantizer.scale.grad) * np.sqrt(HIGHEST)  # type: ignore[arg-type]


def accuracy(example: Example) -> Figure:
    """Draw the accuracy of static schemes without training, trained straight through, and with learned steps."""
    drawn, axes = figure(1, 1)
    series = (
        ("rounded to nearest", _rounded, style.GREY, "o"),
        ("qat_static", _trained_static, style.SKY, "s"),
        ("qat_lsq", _trained_steps, style.VERMILLION, "^"),
    )
    for name, make, colour, marker in series:
        found = [example.top1(make(example, bits)) for bits in WIDTHS]
        axes.plot(WIDTHS, found, marker=marker, color=colour, label=name)
    axes.axhline(example.top1(example.model), color=style.BLACK, lw=1, ls=":", label="fp32")
    axes.set_xticks(WIDTHS)
    axes.set(xlabel="bits of the weights and of the activations", ylabel="top-1 on test images, %")
    axes.set_title(f"Static schemes, {EPOCHS} epochs of training")
    axes.legend()
    return drawn


def _rounded(example: Example, bits: int) -> nn.Module:
    return quantize(
        example.model,
        example.calibration,
        P.Static(kind="static", weight_bits=bits, activation_bits=bits, fragile_bits=None),
    )


def _trained_static(example: Example, bits: int) -> nn.Module:
    settings = P.QatStatic(kind="qat_static", weight_bits=bits, activation_bits=bits, fragile_bits=None)
    variant = trained_recipe_of(settings).prepare(example.model, example.calibration, settings)
    train(variant, example.train, EPOCHS, LEARNING_RATE)
    return trained_recipe_of(settings).finish(variant, example.model, settings)


def _trained_steps(example: Example, bits: int) -> nn.Module:
    settings = P.QatLsq(kind="qat_lsq", weight_bits=bits, activation_bits=bits, fragile_bits=None)
    variant = trained_recipe_of(settings).prepare(example.unfolded, example.calibration, settings)
    train(variant, example.train, EPOCHS, LEARNING_RATE)
    estimate_batchnorm(variant, [(images, torch.empty(0)) for images in example.train[0].split(64)])
    return trained_recipe_of(settings).finish(variant, example.unfolded, settings)
