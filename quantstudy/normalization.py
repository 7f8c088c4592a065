"""BatchNorm and the activation behind it in one (`normalization.cpp`), for networks that are trained on an x86 CPU.

Neither computes much: what takes time is to read and write their maps. PyTorch does one after the other, keeps what is
before and what is behind each, and copies it where the activation is in place: some 16 reads and writes of a map,
forward and backward, of which 8 are left. On an AMD EPYC (Zen 3) they were 45 % of MobileNetV2's training at 96 px.

Some hundred rows are summed in float32, their sums in float64. Gradients have no gradient: PyTorch raises RuntimeError.
"""

import ctypes
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.machine.compiler import library

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 8
_LEAST = 2**18
"""Values of a batch of maps, of which fewer are in a cache."""


class _Normalization(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "mean", "inverse")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_variance", "to")),
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        *((name, ctypes.c_float) for name in ("low", "high", "eps", "momentum")),
    ]


class _Gradient(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "weight", "bias", "mean", "inverse")),
        *((name, ctypes.c_void_p) for name in ("dx", "dweight", "dbias")),
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        *((name, ctypes.c_float) for name in ("low", "high")),
    ]


class FusedNormalization:
    """Computes the BatchNorm of a batch, and the activation that an nn.Sequential calls behind it at once."""

    def __init__(self, model: nn.Module) -> None:
        """Look for the chains of `model` in which an activation follows a BatchNorm."""
        chains = (module for module in model.modules() if isinstance(module, nn.Sequential) and _joins(module))
        self.forwards: dict[nn.Module, Any] = {chain: functools.partial(self._forward, chain) for chain in chains}
        """What computes these chains; within another function nobody can say what becomes of a BatchNorm's output."""
        self._limits: tuple[float, float] | None = None

    @staticmethod
    def pays(model: nn.Module) -> bool:
        """Whether there is a BatchNorm, and a kernel for it."""
        return any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) and library(_SOURCE) is not None

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Replace `torch.nn.functional.batch_norm`; the result is clamped where one of `forwards` wants it so."""
        running = (running_mean, running_var)
        refused = eps <= 0 or (running_mean is None) != (running_var is None)
        if weight is None or bias is None or not training or refused or not _fits(x, weight, bias, *running):
            return F.batch_norm(x, *running, weight, bias, training, momentum, eps)
        limits, self._limits = self._limits or (-torch.inf, torch.inf), None
        y: Tensor = _Fused.apply(x, *running, weight, bias, momentum, eps, *limits)
        return y

    def _forward(self, chain: nn.Sequential, x: Any) -> Any:
        """Compute `chain`, without an activation that a BatchNorm has clamped for already."""
        is_done = False
        for layer, behind in itertools.zip_longest(chain, itertools.islice(chain, 1, None)):
            if is_done:
                is_done = False
                continue
            limits = self._limits = _limits(layer, behind)
            try:
                x = layer(x)
                is_done = limits is not None and self._limits is None
            finally:
                self._limits = None
        return x


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        momentum: float,
        eps: float,
        *limits: float,
    ) -> Tensor:
        y, mean, inverse = torch.empty_like(x), torch.empty_like(bias), torch.empty_like(bias)
        running = [None if tensor is None else tensor.data_ptr() for tensor in (running_mean, running_var)]
        pointers = [tensor.data_ptr() for tensor in (x, weight, bias, mean, inverse)]
        _call("normalize", _Normalization(*pointers, *running, y.data_ptr(), *_matrix(x), *limits, eps, momentum))
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.limits = limits
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(parameters[0]), torch.empty_like(parameters[1])
        pointers = [tensor.data_ptr() for tensor in (x, dy, *parameters, dx, dweight, dbias)]
        _call("normalize_backward", _Gradient(*pointers, *_matrix(x), *ctx.limits))
        return dx, None, None, dweight, dbias, None, None, None, None


def _call(name: str, given: ctypes.Structure) -> None:
    kernels = library(_SOURCE)
    assert kernels is not None, "ask `pays` first"
    getattr(kernels, name)(ctypes.byref(given), ctypes.c_int64(torch.get_num_threads()))


def _matrix(x: Tensor) -> tuple[int, int]:
    """Return the rows and channels of [N, C, H, W], channels_last."""
    return x.numel() // x.shape[1], x.shape[1]


def _fits(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the kernels take x, of a size that pays, and what there is of `vectors`, one value a channel."""
    if x.ndim != 4 or x.shape[1] % _LANES or x.numel() < max(_LEAST, 2 * x.shape[1]):
        return False
    tensors = [x, *(vector for vector in vectors if vector is not None)]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    whole = x.is_contiguous(memory_format=torch.channels_last) and all(each.is_contiguous() for each in tensors[1:])
    return plain and whole and all(each.shape == (x.shape[1],) for each in tensors[1:])


def _joins(chain: nn.Sequential) -> bool:
    """Whether there are layers of `chain` to join; not if it computes, or is told to compute, anything of its own."""
    plain = type(chain).forward is nn.Sequential.forward and "forward" not in vars(chain)
    return plain and any(_limits(*layers) is not None for layers in itertools.pairwise(chain))


def _limits(layer: nn.Module, behind: nn.Module | None) -> tuple[float, float] | None:
    """Return what the output of a BatchNorm is clamped to by the activation behind it; None of other layers.

    Neither counts if it computes something of its own or if a hook sees what is between.
    """
    if behind is None or type(layer).forward is not nn.BatchNorm2d.forward:
        return None
    kind = type(behind).forward
    if kind is not nn.ReLU.forward and kind is not nn.Hardtanh.forward:
        return None
    if any(_is_watched(module) for module in (layer, behind)) or nn.modules.module._has_any_global_hook():
        return None
    return (behind.min_val, behind.max_val) if isinstance(behind, nn.Hardtanh) else (0.0, torch.inf)


def _is_watched(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)
