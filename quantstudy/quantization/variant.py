"""A quantized model as one object, and its file.

A `Variant` is a network of ordinary and quantized layers, the float type of its unquantized arithmetic, and the plain
facts of its method. Its file holds all that is needed to build it again: the architecture, one row per quantized layer
(bits, group size, activation grid), and the tensors, with integer codes packed.
"""

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.network.checkpoint import (
    check_dense,
    check_finite,
    load_checkpoint,
    load_into,
    reads_model,
    save_checkpoint,
)
from quantstudy.network.folding import channels_last
from quantstudy.network.fp32 import load_fp32, network_facts, skeleton_of
from quantstudy.network.graph import put
from quantstudy.quantization.layers import (
    ActivationQuantizer,
    ChannelReLU,
    LayerScheme,
    quantize_layers,
    quantized_layers,
    quantized_operands,
)
from quantstudy.quantization.schemes import ActivationScheme, WeightScheme

Skipped = dict[str, dict[str, str]]
"""What a method could not do: technique -> layer -> reason."""
MOST_NAMES = 12
"""The most layers that a line names; it counts the rest."""
WHAT = {"quantization": "layers not quantized", "folding": "BatchNorms not folded"}


class Variant(nn.Module):
    """A quantized network: float32 images [N, 3, S, S] in, float32 logits [N, classes] out."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32, skipped: Skipped | None = None) -> None:
        super().__init__()
        self.network, self.dtype, self.skipped = network, dtype, skipped or {}
        self.method: dict[str, Any] = {}
        """The keys that the params set for the method that made it."""
        self.pairs: list[tuple[str, str]] = []
        """Each layer with the BatchNorm to fold into it, while the network trains with BatchNorm."""

    def forward(self, images: Tensor) -> Tensor:
        """Cast the images to the network's type, and its logits to float32."""
        logits: Tensor = self.network(images.to(self.dtype))
        return logits.float()


def save_variant(path: Path, variant: Variant, fp32: dict[str, Any], name: str) -> None:
    """Write a variant whose quantized layers are all frozen; `fp32` is the checkpoint of the model it came from."""
    layers = {
        layer: asdict(module.scheme) | {"scale": module.activation.scale, "zero_point": module.activation.zero_point}
        for layer, module in quantized_layers(variant.network).items()
    }
    rounded = {
        name: {"scheme": asdict(module.scheme), "scale": module.scale, "zero_point": module.zero_point}
        for name, module in quantized_operands(variant.network).items()
    }
    _check_grids(path, quantized_layers(variant.network))
    facts = {
        **network_facts(fp32),
        "variant": name,
        "method": variant.method,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "layers": layers,
        "operands": rounded,
        "skipped": variant.skipped,
        "channel_relus": {n: m.axis for n, m in variant.network.named_modules() if isinstance(m, ChannelReLU)},
    }
    save_checkpoint(path, variant.network.state_dict(), **facts)


@reads_model
def load_variant(path: Path) -> Variant:
    """Read a file that `save_variant` wrote: same layers, same codes, so bit-identical logits."""
    checkpoint = load_checkpoint(path)
    dtype: torch.dtype = getattr(torch, checkpoint["dtype"])
    network = skeleton_of(checkpoint, path)
    schemes = {
        name: LayerScheme(WeightScheme(**row["weight"]), ActivationScheme(**row["activation"]))
        for name, row in checkpoint["layers"].items()
    }
    replaced = quantize_layers(network, schemes)
    for name, layer in replaced.items():
        layer.empty_codes()
        layer.dtype = dtype
        row = checkpoint["layers"][name]
        layer.activation.scale, layer.activation.zero_point = row["scale"], row["zero_point"]
    for name, row in checkpoint["operands"].items():
        put(network, {name: ActivationQuantizer(**row | {"scheme": ActivationScheme(**row["scheme"])})})
    relus = checkpoint["channel_relus"].items()
    put(network, {name: ChannelReLU(checkpoint["state_dict"][f"{name}.bound"], axis) for name, axis in relus})
    check_dense(checkpoint["state_dict"], path)
    load_into(network, checkpoint["state_dict"], assign=True)
    _check_grids(path, replaced)
    check_finite(network.state_dict(), path)
    network = channels_last(network.requires_grad_(False).eval())
    variant = Variant(network, dtype, checkpoint["skipped"]).eval()
    variant.method = checkpoint.get("method", {})
    return variant


def _check_grids(path: Path, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        grid = layer.activation
        if not (0 < grid.scale < math.inf and 0 <= grid.zero_point <= grid.scheme.highest):
            what = f"the input of {name} has the scale {grid.scale} and the zero point {grid.zero_point}"
            raise UserError(f"{path}: {what}; a scale is finite and positive, a zero point one of the codes")


@reads_model
def load_any(path: Path) -> nn.Module:
    """Read the file of an fp32 model or of a variant."""
    return load_fp32(path) if load_checkpoint(path)["variant"] == "fp32" else load_variant(path)


def cast(network: nn.Module, dtype: torch.dtype, skipped: Skipped | None = None) -> Variant:
    """Return a copy of `network` with every floating-point parameter in `dtype`; packed codes and scales stay."""
    network = copy.deepcopy(network)
    scales = {layer: layer.weight_scale for layer in quantized_layers(network).values()}
    network.requires_grad_(False).to(dtype)
    for layer, scale in scales.items():
        layer.dtype, layer.weight_scale = dtype, scale
    return Variant(network, dtype, skipped)


def network_of(model: nn.Module) -> tuple[nn.Module, torch.dtype]:
    """Return the network inside a variant, or the model itself, and the float type of its arithmetic."""
    return (model.network, model.dtype) if isinstance(model, Variant) else (model, torch.float32)


def merged(*parts: Skipped) -> Skipped:
    """Return all that some parts of a method could not do, without techniques that left nothing out."""
    found: Skipped = {}
    for technique, layers in (item for part in parts for item in part.items()):
        if layers:
            found[technique] = found.get(technique, {}) | layers
    return found


def left_out(skipped: Skipped) -> list[str]:
    """Return one line per technique: how many layers it left out, and the first of them with their reasons."""
    lines = []
    for technique, layers in skipped.items():
        shown = [f"{name or 'the network'}: {reason}" for name, reason in list(layers.items())[:MOST_NAMES]]
        more = f"; and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
        what = WHAT.get(technique, f"without {technique.replace('_', ' ')}")
        lines.append(f"{len(layers)} {what}: {'; '.join(shown)}{more}")
    return lines
