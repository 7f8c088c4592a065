"""Take convolutions that pad their own input apart, so that they are quantized like any other.

Networks that come from TensorFlow pad by its rule "SAME": as much as the image size asks for, and more at the end than
at the beginning. PyTorch's convolutions cannot do this. The ports of EfficientNet, MobileNet and MixNet use subclasses
whose `forward` pads and then convolves, and so do causal convolutions. The name of a class does not tell what it
computes, so each layer is run on a few sizes. It is taken apart only if it does nothing but pad with zeros, by that
rule or by a constant, and convolve with its own weight.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantstudy.network.graph import has_hooks, put

CONVOLUTIONS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
ZERO_PADS: dict[type[nn.Module], Any] = {nn.Conv1d: nn.ZeroPad1d, nn.Conv2d: nn.ZeroPad2d, nn.Conv3d: nn.ZeroPad3d}
SIDES = (20, 21, 22, 23)
"""Sizes of the inputs that a layer is tried on; they have all remainders of strides up to four."""


class SamePadding(nn.Module):
    """Pad with zeros so that a convolution's output is ceil(size / stride), by the rule "SAME" of TensorFlow."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.reach = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
        self.stride = list(stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, [N, C, *sizes], padded."""
        return F.pad(x, self.amounts(x.shape[2:]))

    def amounts(self, sizes: Sequence[int]) -> list[int]:
        """Return how much is added for an image of `sizes`, as `F.pad` takes it: the last axis comes first."""
        found: list[int] = []
        for size, reach, stride in zip(sizes, self.reach, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            found = [total // 2, total - total // 2, *found]
        return found


class _Watch(TorchFunctionMode):
    """Records the calls of functions that return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.calls.append((getattr(function, "__name__", ""), tuple(args), kwargs or {}, result))
        return result


def open_padding(model: nn.Module) -> None:
    """Replace convolutions that pad their own input by plain ones, in place.

    If a plain convolution can pad in the same way, it takes the layer's place. Otherwise a sequence of the padding,
    `pad`, and the convolution, `conv`, takes it.
    """
    for name, module in list(model.named_modules()):
        kind = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
        if not name or kind is None or type(module).forward is kind.forward or has_hooks(module):
            continue
        amounts = {side: _amounts(module, kind, side) for side in SIDES}
        first = amounts[SIDES[0]]
        if first is None:
            continue
        same = SamePadding(module.kernel_size, module.stride, module.dilation)  # type: ignore[arg-type]
        if all(found == first for found in amounts.values()):
            ends = list(zip(first[::2], first[1::2], strict=True))
            if all(left == right >= 0 for left, right in ends):
                put(model, {name: _plain(module, kind, [left for left, _ in reversed(ends)])})
                continue
            pad: nn.Module = ZERO_PADS[kind](tuple(first))
        elif all(found == same.amounts([side] * len(same.reach)) for side, found in amounts.items()):
            pad = same
        else:
            continue
        put(model, {name: nn.Sequential(OrderedDict(pad=pad, conv=_plain(module, kind, [0] * len(same.reach))))})


@torch.no_grad()
def _amounts(layer: Any, kind: type[nn.Module], side: int) -> list[int] | None:
    """Return how much a layer pads an input of that side before it convolves; None if it does anything else."""
    own = {name: torch.empty_like(value, device="meta") for name, value in layer.named_parameters()}
    x = torch.empty(1, layer.in_channels, *[side] * len(layer.kernel_size), device="meta")
    try:
        with _Watch() as watch:
            result = torch.func.functional_call(layer, own, x)
    except Exception:  # your own layer's code may raise anything
        return None
    *before, last = watch.calls or [("", (), {}, None)]
    name, args, kwargs, made = last
    if name != CONVOLUTIONS[kind] or made is not result or len(before) > 1:
        return None
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1} | dict(zip(keys, args, strict=False)) | kwargs
    is_plain = given["weight"] is own.get("weight", x) and given["bias"] is own.get("bias")
    is_plain = is_plain and given.get("groups", 1) == layer.groups and not isinstance(given["padding"], str)
    if not is_plain or any(_each(given[key], layer) != _each(getattr(layer, key), layer) for key in keys[3:6:2]):
        return None
    around = [amount for amount in reversed(_each(given["padding"], layer)) for _ in range(2)]
    if not before:
        return around if given["input"] is x else None
    name, args, kwargs, made = before[0]
    pads = zero_padding(args, kwargs) if name == "pad" and given["input"] is made else None
    if pads is None or (args[0] if args else kwargs["input"]) is not x:
        return None
    if len(pads) > len(around) or (any(around) and min(pads) < 0):  # values cut off and padded again become zeros
        return None
    amounts = [*pads, *[0] * (len(around) - len(pads))]
    return [one + other for one, other in zip(amounts, around, strict=True)]


def zero_padding(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int] | None:
    """Return what a call of `F.pad` with these arguments adds at each end; None if it does not pad with zeros."""
    given = {"mode": "constant", "value": None} | dict(zip(("input", "pad", "mode", "value"), args, strict=False))
    given |= kwargs
    return list(given["pad"]) if given["mode"] == "constant" and given["value"] in (None, 0) else None


def _each(value: Any, layer: Any) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * len(layer.kernel_size)


def _plain(layer: Any, kind: Any, padding: list[int]) -> nn.Module:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding)
    plain: nn.Module = kind(*sizes, layer.dilation, layer.groups, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def padded_names(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Return a state_dict with the names that `open_padding` gives to tensors; `own` are the names in the network."""
    renamed = {name: ".conv.".join(name.rsplit(".", 1)) for name in state if name not in own}
    return {renamed[name] if renamed.get(name) in own else name: value for name, value in state.items()}
