"""The device, the threads and the seed that a stage runs with."""

import contextlib
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantstudy.machine.hardware import arithmetic_is_native

DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    """Return the CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_up(seed: int, threads: int | None = None, *, tf32: bool = False) -> torch.device:
    """Seed every generator, fix the number of CPU threads and return the device to run on.

    Without `tf32`, float32 convolutions stay float32 on a GPU too; PyTorch would round their operands to TF32.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
    return pick_device()


class RoundedOperands(TorchFunctionMode):
    """Mixed precision for a CPU that does not multiply 16-bit matrices: float32 arithmetic on rounded operands.

    The input and the weight of every 2d convolution and linear layer are rounded to `dtype`, and so are the gradients
    that flow back to them; sums are float32, as in a tensor core. On a CPU, the gradient of a float16 convolution has
    no fast kernel.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Round the first two arguments of a convolution or a linear layer."""
        if function in (nn.functional.conv2d, nn.functional.linear):
            args = (*(operand.to(self.dtype).float() for operand in args[:2]), *args[2:])
        return function(*args, **(kwargs or {}))


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the context of mixed precision in `dtype`; None means float32."""
    if dtype is None:
        return contextlib.nullcontext()
    if _lacks_matrices_of(dtype, device):
        return RoundedOperands(dtype)
    return torch.autocast(device.type, dtype=dtype)


def describe(device: torch.device, dtype: torch.dtype | None) -> str:
    """Say in words what `autocast` does with the same arguments."""
    if dtype is None:
        return "float32"
    name = str(dtype).removeprefix("torch.")
    return f"float32 on operands rounded to {name}" if _lacks_matrices_of(dtype, device) else f"{name} autocast"


def _lacks_matrices_of(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and not arithmetic_is_native(str(dtype).removeprefix("torch."), "cpu")


def training_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type that a `training.precision` param means on this device, None for float32.

    `auto` is bfloat16 where the hardware multiplies bfloat16 matrices: CUDA compute capability 8.0, CPUs with AMX.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None
