"""How much faster int8 is on this CPU, and how long it takes to prepare: every runtime of one network, side by side.

Rows: fp32 eager, the int8 network of eager mode (static and run-time ranges), fp32 and int8 static on ONNX Runtime
(tuned for it) and on OpenVINO, and both compiled by inductor with frozen weights. The network has random weights with
BatchNorm folded, and ranges from one random batch: timings need no training. Its int8 sums saturate on no CPU.

Method: all runtimes run in one process, in turns of three timed calls after one untimed call (`measure.latency`). The
table gives the median milliseconds with their quartiles, the speed-up over each fp32 runtime, and the seconds that the
runtime took to prepare, with its export and its first call.

    python -m benchmarks.int8_runtimes --architecture mobilenet_v2 --pixels 32 224 --batch 1 16
"""

import argparse
import copy
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.errors import run_stage
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.latency import time_alternately
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.network.architectures import build
from quantstudy.network.folding import fold_batchnorm
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.lowering import lower_int8
from quantstudy.runtimes.onnx_graph import network_graph
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import open_session, why_missing

Runtime = Callable[[Tensor], Tensor]
CLASSES = 100
INT8: Any = {"weight_bits": 8, "activation_bits": 8, "saturation_free": True}
STATIC, DYNAMIC = P.Static(kind="static", **INT8), P.Dynamic(kind="dynamic", **INT8)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each image size and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--pixels", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each table's timings")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(describe_machine())
    with torch.no_grad():
        for pixels in args.pixels:
            model = random_model(args.architecture, pixels)
            for batch in args.batch:
                x = torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last)
                print(f"\n{args.architecture}, {pixels} px, batch {batch}, {args.threads} threads")
                graph = network_graph(args.architecture, CLASSES, pixels)
                compare(model, graph, x, args.seconds)


def random_model(architecture: str, pixels: int) -> nn.Module:
    """Return a network with random weights, BatchNorm statistics that fit random images, and BatchNorm folded."""
    torch.manual_seed(0)
    model = build(architecture, CLASSES).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for _ in range(2):
        model(torch.randn(4, 3, pixels, pixels))
    return fold_batchnorm(model.eval()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(model: nn.Module) -> Runtime:
    """Compile a copy with frozen weights and the int8 patterns of x86."""
    torch._dynamo.reset()
    return build_executable(copy.deepcopy(model), "inductor", torch.device("cpu")).run


def exported(model: nn.Module, graph: onnx.ModelProto, runtime: str) -> Runtime:
    """Load the ONNX model that this project times on a runtime."""
    return open_session(exported_model(model, graph, runtime), runtime, torch.get_num_threads()).run


def compare(model: nn.Module, graph: onnx.ModelProto, x: Tensor, seconds: float) -> None:
    """Prepare every runtime, time them in turn, print the table."""
    static, dynamic = (quantize(model, Calibration(model, [x]), row).network for row in (STATIC, DYNAMIC))
    builders: dict[str, Callable[[], Runtime]] = {
        "fp32 eager": lambda: model,
        "int8 static, lowered": lambda: lower_int8(static, x),
        "int8 dynamic, lowered": lambda: lower_int8(dynamic, x),
    }
    for runtime, name in (("onnxruntime", "onnxruntime, tuned"), ("openvino", "openvino")):
        if why_missing(runtime) is None:
            builders[f"fp32 {runtime}"] = functools.partial(exported, model, graph, runtime)
            builders[f"int8 static, {name}"] = functools.partial(exported, static, graph, runtime)
    builders["fp32 inductor"] = lambda: compiled(model)
    builders["int8 static, inductor"] = lambda: compiled(static)
    runtimes, prepared = {}, {}
    for name, make in builders.items():
        start = time.perf_counter()
        is_onnx = isinstance(make, functools.partial)
        runtimes[name] = functools.partial(make(), x.contiguous() if is_onnx else x)
        runtimes[name]()
        prepared[name] = time.perf_counter() - start
    timings = time_alternately(runtimes, seconds)
    bases = {name: timing.median_ms for name, timing in timings.items() if name.startswith("fp32 ")}
    over = (f"{f'over {base}':>22}" for base in bases)
    print(f"{'runtime':30}{'ms (quartiles)':>28}", *over, f"{'prepared in s':>15}")
    for name, timing in timings.items():
        spread = f"{timing.median_ms:.2f} ({timing.lower_quartile_ms:.2f} to {timing.upper_quartile_ms:.2f})"
        ratios = (f"{base / timing.median_ms:22.2f}" for base in bases.values())
        print(f"{name:30}{spread:>28}", *ratios, f"{prepared[name]:15.1f}", flush=True)


if __name__ == "__main__":
    run_stage(main)
