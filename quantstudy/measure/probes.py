"""Which low-bit kernels run on this machine, each found out by running it on a tiny input.

That a package or an operator exists proves little: kernels are compiled for some GPUs or CPUs only and refuse,
or saturate, on others. A probe returns why the kernel can be used, or raises with the reason why it cannot.
"""

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization.saturation import LARGEST_PAIR


class Probe(TypedDict):
    """The result of trying a kernel."""

    available: bool
    reason: str


class Unavailable(Exception):
    """Why a kernel cannot be used here."""


def probe_kernels() -> dict[str, Probe]:
    """Try every low-bit kernel that a method may use; never raises."""
    return {name: _run(probe) for name, probe in PROBES.items()}


def _run(probe: Callable[[], str]) -> Probe:
    try:
        return {"available": True, "reason": probe()}
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        prefix = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
        return {"available": False, "reason": prefix + reason}


def _need_cuda(major: int) -> None:
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA GPU; none was found")
    found = torch.cuda.get_device_capability()
    if found[0] < major:
        raise Unavailable(f"needs compute capability {major}.0 or higher; this GPU has {found[0]}.{found[1]}")


def _equal(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    if not error <= tolerance:
        raise Unavailable(f"ran, but its result is wrong by {100 * error:.1f} %")
    return "ran on a small input with the right result"


def _int8_conv_onednn() -> str:
    # The largest codes that the kernels are given: without VNNI oneDNN saturates sums of larger pairs in int16.
    saturates = int8_sums_saturate()
    code = LARGEST_PAIR // 2 if saturates else 127
    codes = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight, scale = torch.full((16, 64, 3, 3), code, dtype=torch.int8), torch.ones(16)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *geometry, None)
    zeros = torch.zeros(16, dtype=torch.int32)
    found = torch.ops.onednn.qconv2d_pointwise(
        codes, 1.0, 0, packed, scale, zeros, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )
    limits = ", with weights that are saturation_free" if saturates else ""
    return _equal(found, torch.full((1, 16, 1, 1), 255.0 * code * 64 * 9), 1e-6) + limits


def _int8_weight_only_cpu() -> str:
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    weight, scale = torch.full((32, 64), 3, dtype=torch.int8), torch.ones(32, dtype=torch.bfloat16)
    return _equal(torch.ops.aten._weight_int8pack_mm(x, weight, scale), torch.full((2, 32), 192.0), 1e-2)


def _int4_tinygemm_cpu() -> str:
    codes = torch.full((32, 64), 11, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.stack([torch.ones(2, 32), torch.zeros(2, 32)], dim=-1).bfloat16()
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales_and_zeros)
    return _equal(found, torch.full((2, 32), 64.0 * (11 - 8)), 1e-2)


def _int4_tinygemm_cuda() -> str:
    _need_cuda(8)
    # Two codes a byte, both 11, [N, K / 2]; the CUDA kernel takes uint8 where the CPU's takes int32.
    codes = torch.full((64, 1024 // 2), 11 * 16 + 11, dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = torch.stack([torch.ones(32, 64), torch.zeros(32, 64)], dim=-1).bfloat16().cuda()
    x = torch.ones(16, 1024, dtype=torch.bfloat16, device="cuda")
    found = torch.ops.aten._weight_int4pack_mm(x, packed, 32, scales_and_zeros)
    return _equal(found, torch.full((16, 64), 1024.0 * (11 - 8), device="cuda"), 1e-2)


PROBES: dict[str, Callable[[], str]] = {
    "int8_conv_onednn": _int8_conv_onednn,
    "int8_weight_only_cpu": _int8_weight_only_cpu,
    "int4_tinygemm_cpu": _int4_tinygemm_cpu,
    "int4_tile_packed_to_4d_cuda": _int4_tinygemm_cuda,
}
