"""What each layer costs and loses: the stored bytes of its weights, and the distance of its output from fp32's."""

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import network_of

LAYER_IMAGES = 16
"""The number of test images for comparing the outputs of layers."""


def weight_storage(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (bytes, weights) of every Conv2d and Linear by name, quantized or not; scales count, biases do not."""
    network, _ = network_of(model)
    found: dict[str, tuple[int, int]] = {
        name: (layer.packed.nbytes + layer.weight_scale.nbytes, layer.shape.numel())
        for name, layer in quantized_layers(network).items()
    }
    rest: dict[str, Any] = quantizable_layers(network)
    return found | {name: (layer.weight.nbytes, layer.weight.numel()) for name, layer in rest.items()}


@torch.no_grad()
def layer_sqnr_db(reference: nn.Module, model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the SQNR in decibels of every layer's output, with all layers before it quantized too.

    Both models run in eager mode, so a quantized layer simulates its arithmetic in floating point. A layer is left out
    if only one of them runs it, or on another shape: the code of a network may depend on the values.

    Args:
        reference: the fp32 model with BatchNorm folded: its layers compute the same as the variant's.
        model: a variant of it.
        images: float32 [N, 3, S, S], on the models' device; all layers' outputs on them are held in memory.
    """
    wanted, found = _outputs(reference, images), _outputs(model, images)
    known = {name: output for name, output in found.items() if name in wanted and wanted[name].shape == output.shape}
    return {name: sqnr_db(wanted[name], output) for name, output in known.items()}


def _outputs(model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    network, _ = network_of(model)
    layers: dict[str, Any] = quantizable_layers(network) | quantized_layers(network)
    found: dict[str, np.ndarray] = {}
    with contextlib.ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(layer.register_forward_hook(functools.partial(_keep, found, name)))
        model(images.clone())
    return found


def _keep(found: dict[str, np.ndarray], name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
    found[name] = output.clone().float().cpu().numpy()  # the activation that follows may work in place
