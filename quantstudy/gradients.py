"""The same training, quicker: functions of PyTorch that are slow on an x86 CPU, computed in another way."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantstudy.machine.hardware import cpu_flags, is_x86
from quantstudy.normalization import FusedNormalization

_GEOMETRY = 4
"""Arguments of a convolution behind its bias."""


class Replaced(TorchFunctionMode):
    """Calls other functions, of the same arguments, in place of some functions and of some modules' forward.

    Not where hooks see what is kept for the gradients: torch.utils.checkpoint computes a part of a network again, when
    this context was left, and has to find the same.
    """

    def __init__(
        self,
        functions: Mapping[Callable[..., Any], Callable[..., Any]],
        forwards: Mapping[nn.Module, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.functions, self.forwards = functions, forwards or {}

    def __enter__(self) -> "Replaced":
        """Give the modules another forward."""
        for module, forward in self.forwards.items():
            module.forward = forward
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Give them back their own."""
        super().__exit__(*raised)
        for module in self.forwards:
            del module.forward

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what replaces `function`, or itself."""
        other = self.functions.get(function)
        if other is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            other = function
        return other(*args, **(kwargs or {}))


def quick_gradients(model: nn.Module, device: torch.device) -> Any:
    """Return the context in which `model`, trained on `device`, computes its logits; it can be entered again."""
    if device.type != "cpu" or not is_x86():
        return contextlib.nullcontext()
    functions: dict[Callable[..., Any], Callable[..., Any]] = {}
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if "avx512f" not in cpu_flags():
        functions[F.conv2d] = padded_conv2d
    if FusedNormalization.pays(model):
        fused = FusedNormalization(model)
        functions[F.batch_norm], forwards = fused.batch_norm, fused.forwards
    return Replaced(functions, forwards) if functions else contextlib.nullcontext()


def padded_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any, **named: Any) -> Tensor:
    """Convolve as torch.nn.functional.conv2d: depthwise, of maps smaller than the kernel, with quick gradients.

    Without AVX512 oneDNN 3.12 has none by the weight: for 960 maps of one pixel, 64 images, it took 18 ms, and
    MobileNetV2 at 32 px more than half of its training. A map that is padded beforehand is not smaller; one pixel meets
    one weight. Named arguments are left alone.
    """
    if len(geometry) < _GEOMETRY or named or isinstance(geometry[1], str):
        return F.conv2d(x, weight, bias, *geometry, **named)
    stride, padding, dilation, groups = geometry
    kernel, size = weight.shape[2:], x.shape[2:]
    depthwise = groups > 1 and x.dim() == weight.dim() and x.shape[1] == groups and weight.shape[1] == 1
    if not depthwise or x.dtype != weight.dtype or (kernel[0] <= size[0] and kernel[1] <= size[1]):
        return F.conv2d(x, weight, bias, *geometry)
    height, width = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])
    centered = kernel == (2 * height + 1, 2 * width + 1) and dilation in (1, (1, 1))
    if size == (1, 1) and centered and len(weight) == groups:
        y = x * weight[:, 0, height, width].reshape(1, -1, 1, 1)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)
    padded = F.pad(x, (width, width, height, height))
    return F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
