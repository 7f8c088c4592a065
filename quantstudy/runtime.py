"""The device, the threads and the seed that a stage runs with."""

import random
from typing import Any

import numpy as np
import torch

DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    """Return the CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_up(seed: int, threads: int | None = None) -> torch.device:
    """Seed every generator, fix the number of CPU threads and return the device to run on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    return pick_device()


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the autocast context of `dtype`; None switches autocast off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def training_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type that a `training.precision` param means on this device, None for float32.

    `auto` is bfloat16 where the hardware multiplies bfloat16 matrices (CUDA compute capability 8.0 and CPUs
    with AMX). On a CPU with AVX512 alone bfloat16 training measured half as fast as float32.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else None
