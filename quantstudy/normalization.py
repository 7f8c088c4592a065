"""BatchNorm and the activation behind it in one (`normalization.cpp`), for networks that are trained on an x86 CPU.

Neither computes much: what takes time is to read and write their maps. PyTorch does one after the other, keeps what is
before and what is behind each, and copies it where the activation is in place: some 16 reads and writes of a map,
forward and backward, of which 8 are left. On an AMD EPYC (Zen 3) they were 45 % of MobileNetV2's training at 96 px.
"""

import collections
import ctypes
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
    """Computes the BatchNorm of a batch, and the activation behind it at once, where the network says which that is."""

    def __init__(self, model: nn.Module) -> None:
        """Look at what follows the BatchNorms of `model`."""
        self._ranges = {id(norm.weight): _range(activation) for norm, activation in _pairs(model)}
        self._clamped: Tensor | None = None

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
        """Replace `torch.nn.functional.batch_norm`; where the activation follows, the result is clamped already."""
        running = (running_mean, running_var)
        halved = (running_mean is None) != (running_var is None)
        if weight is None or bias is None or not training or halved or not _fits(x, weight, bias, *running):
            return F.batch_norm(x, *running, weight, bias, training, momentum, eps)
        low, high = self._ranges.get(id(weight), (-torch.inf, torch.inf))
        y: Tensor = _Fused.apply(x, *running, weight, bias, momentum, eps, low, high)
        self._clamped = y if id(weight) in self._ranges else None
        return y

    def relu(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Replace `torch.nn.functional.relu`."""
        return x if self._is_clamped(x) else F.relu(x, inplace)

    def hardtanh(self, x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
        """Replace `torch.nn.functional.hardtanh`, which ReLU6 is too."""
        return x if self._is_clamped(x) else F.hardtanh(x, min_val, max_val, inplace)

    def _is_clamped(self, x: Tensor) -> bool:
        clamped, self._clamped = self._clamped, None
        return x is clamped


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


def _pairs(model: nn.Module) -> list[tuple[nn.BatchNorm2d, nn.Module]]:
    """Return each BatchNorm that an nn.Sequential calls an activation in place after: nobody sees what is between."""
    seen = collections.Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = []
    for chain in model.modules():
        if not isinstance(chain, nn.Sequential) or type(chain).forward is not nn.Sequential.forward:
            continue
        for norm, activation in itertools.pairwise(chain):
            watched = norm._forward_hooks or activation._forward_pre_hooks
            clamps = isinstance(activation, nn.ReLU | nn.Hardtanh) and activation.inplace
            if isinstance(norm, nn.BatchNorm2d) and norm.affine and clamps and not watched and seen[id(norm)] == 1:
                pairs.append((norm, activation))
    return pairs


def _range(activation: nn.Module) -> tuple[float, float]:
    return (activation.min_val, activation.max_val) if isinstance(activation, nn.Hardtanh) else (0.0, torch.inf)
