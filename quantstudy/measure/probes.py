"""Which low-bit kernels run on this machine, each found out by running the layer that uses it on a small input.

That a package or an operator exists proves little: kernels are compiled for some GPUs or CPUs only and refuse,
or saturate, on others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.errors import one_line
from quantstudy.quantization.layers import LayerScheme, QuantLinear
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.runtimes.kernels import int8_kernels_available
from quantstudy.runtimes.weight_only import WeightOnlyLinear, has_kernel


def probe_kernels() -> dict[str, Any]:
    """Try every low-bit kernel that a method may use: whether it is `available`, and the `reason`. Never raises."""
    return {name: _run(probe) for name, probe in PROBES.items()}


def _run(probe: Callable[[], str]) -> dict[str, Any]:
    try:
        problem = probe()
    except Exception as error:
        problem = one_line(error)
    return {"available": not problem, "reason": problem or "ran on a small input with the right result"}


def _weight_only(scheme: WeightScheme, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU; none was found"
    layer = QuantLinear(nn.Linear(1024, 64, device=device), LayerScheme(scheme))
    layer.freeze()
    if not has_kernel(layer, torch.device(device)):
        needed = "a GPU of compute capability 8.0 or higher" if device == "cuda" else "a CPU with AVX512"
        return f"needs {needed}; linear layers are simulated"
    x = torch.ones(2, 1024, device=device)
    wanted, found = layer(x), WeightOnlyLinear(layer)(x)
    return wrong(found, wanted, 1e-2)


def wrong(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    """Say by how much a result is wrong; nothing within the tolerance, relative to the wanted one's norm."""
    error = float((found - wanted).norm() / wanted.norm())
    return "" if error <= tolerance else f"ran, but its result is wrong by {100 * error:.1f} %"


_NEEDED = "needs an x86 CPU, a torch with oneDNN, and sums that come out exact"
PROBES: dict[str, Callable[[], str]] = {
    "int8_conv_onednn": lambda: "" if int8_kernels_available() else _NEEDED,
    "int8_weight_only_cpu": lambda: _weight_only(WeightScheme(8), "cpu"),
    "int4_tinygemm_cpu": lambda: _weight_only(WeightScheme(4, 32), "cpu"),
    "int4_tile_packed_to_4d_cuda": lambda: _weight_only(WeightScheme(4, 32), "cuda"),
}
"""Each returns why the kernel cannot be used, nothing when it can."""
