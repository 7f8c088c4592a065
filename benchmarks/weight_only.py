"""Linear layers of bfloat16, and those that read 8- or 4-bit weights: one product, on this machine.

    python -m benchmarks.weight_only

VGG-11's two large layers and MobileNetV2's classifier, with what a layer does beside its product, for 1, 16 and 64
images; on a GPU by events, with its cache emptied before each call (`triton.testing.do_bench`).
"""

import argparse
import copy
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from quantstudy.device import pick_device
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.latency import time_alternately
from quantstudy.quantization.layers import LayerScheme, QuantLinear
from quantstudy.quantization.schemes import WeightScheme
from quantstudy.runtimes.weight_only import WeightOnlyLinear, has_kernel

SHAPES = ((25088, 4096), (4096, 4096), (1280, 1000))
SCHEMES = {"int8": WeightScheme(8), "int4 in groups of 32": WeightScheme(4, 32)}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each shape and number of rows")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    device = pick_device()
    print(describe_machine())
    print("inputs outputs rows, microseconds: " + ", ".join(["bfloat16", *SCHEMES]))
    for inputs, outputs in SHAPES:
        layers = _layers(nn.Linear(inputs, outputs), device)
        for rows in arguments.rows:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=device)
            calls = {name: functools.partial(layer, x) for name, layer in layers.items()}
            found = _milliseconds(calls, arguments.seconds, device)
            print(inputs, outputs, rows, *(f"{1000 * found[name]:.1f}" for name in layers))


def _layers(layer: nn.Linear, device: torch.device) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {"bfloat16": copy.deepcopy(layer).to(device, torch.bfloat16)}
    for name, scheme in SCHEMES.items():
        quantized = QuantLinear(copy.deepcopy(layer), LayerScheme(scheme))
        quantized.freeze()
        if not has_kernel(quantized, device):
            raise SystemExit(f"no kernel for {name} on this {device.type}")
        found[name] = WeightOnlyLinear(quantized.to(device))
    return found


def _milliseconds(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    if device.type == "cpu":
        return {name: timing.median_ms for name, timing in time_alternately(calls, seconds).items()}
    from triton.testing import do_bench

    rep = int(1000 * seconds / len(calls))
    return {name: do_bench(call, rep=rep, return_mode="median") for name, call in calls.items()}


if __name__ == "__main__":
    main()
