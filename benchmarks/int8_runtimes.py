"""What int8 buys in time on this CPU, and what it costs to prepare: every runtime of one network, side by side.

Rows: fp32 eager, fp32 compiled by inductor with frozen weights, int8 kernels one layer at a time (static and
run-time ranges), the lowered network (static and run-time ranges), and int8 static compiled by inductor. The
network has random weights with BatchNorm folded, and ranges from one random batch: timings need no training.

Method: all runtimes in one process, called in turn, after two calls of each that are not counted. The table gives
the median milliseconds, how many times faster than fp32 (median and quartiles of the rounds' ratios), and the seconds
that preparing the runtime took, its first call included. On a busy machine use --threads 1: there, two threads mostly
wait for each other.

    python benchmarks/int8_runtimes.py --architecture mobilenet_v2 --pixels 32 224 --batch 1 16
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import describe_machine
from quantstudy.network.models import build, fold_batchnorm
from quantstudy.quantization.layers import LayerScheme, quantize_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.saturation import limit_of
from quantstudy.quantization.schemes import ActivationScheme, Mode, WeightScheme
from quantstudy.runtimes.lowering import lower_int8, make_kernel

Runtime = Callable[[Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each image size and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--pixels", type=int, nargs="+", default=[32, 224])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each table's timings")
    parser.add_argument("--no-inductor", action="store_true", help="leave out what has to be compiled")
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
                compare(model, x, args.seconds, not args.no_inductor)


def random_model(architecture: str, pixels: int) -> nn.Module:
    """Return a network with random weights, BatchNorm statistics that fit random images, and BatchNorm folded."""
    torch.manual_seed(0)
    model = build(architecture, 100).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for _ in range(2):
        model(torch.randn(4, 3, pixels, pixels))
    return fold_batchnorm(model.eval()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def quantized(model: nn.Module, mode: Mode, x: Tensor) -> nn.Module:
    """Return a copy with every layer quantized to int8 weights and activations, frozen."""
    model, ranges = copy.deepcopy(model), {}
    for name, layer in quantizable_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: ranges.update({name: (inputs[0].min().item(), inputs[0].max().item())})
        )
    model(x)
    activation, layers = ActivationScheme(mode, 8), quantizable_layers(model)
    schemes = {name: LayerScheme(WeightScheme(8, limit=limit_of(layers[name])), activation) for name in ranges}
    for name, layer in quantize_layers(model, schemes).items():
        layer.activation.scale, layer.activation.zero_point = activation.choose_qparams(*ranges[name])
        layer.freeze()
    return model.eval()


def layer_by_layer(model: nn.Module) -> nn.Module:
    """Put an int8 kernel in the place of every quantized layer and change nothing else."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, make_kernel(layer))
    return model


def compiled(model: nn.Module) -> Runtime:
    """Compile with frozen weights and the int8 patterns of x86."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torch._inductor import config

    config.freezing = True
    torch._dynamo.reset()
    for layer in quantized_layers(model).values():
        layer.prepare_to_trace()
    return torch.compile(model, dynamic=False)


def compare(model: nn.Module, x: Tensor, seconds: float, inductor: bool) -> None:
    """Prepare every runtime, time them in turn, print the table."""
    static, dynamic = quantized(model, "static", x), quantized(model, "dynamic", x)
    builders: dict[str, Callable[[], Runtime]] = {
        "fp32 eager": lambda: model,
        "int8 static, layer by layer": lambda: layer_by_layer(copy.deepcopy(static)),
        "int8 dynamic, layer by layer": lambda: layer_by_layer(copy.deepcopy(dynamic)),
        "int8 static, lowered": lambda: lower_int8(static),
        "int8 dynamic, lowered": lambda: lower_int8(dynamic),
    }
    if inductor:
        builders["fp32 inductor"] = lambda: compiled(copy.deepcopy(model))
        builders["int8 static, inductor"] = lambda: compiled(copy.deepcopy(static))
    runtimes, prepared, times = {}, {}, {name: [] for name in builders}
    for name, make in builders.items():
        start = time.perf_counter()
        runtimes[name] = make()
        runtimes[name](x)
        prepared[name] = time.perf_counter() - start
        runtimes[name](x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["fp32 eager"]) < 5:
        for name, run in runtimes.items():
            start = time.perf_counter()
            run(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    table = {name: np.array(row) for name, row in times.items()}
    bases = [name for name in ("fp32 eager", "fp32 inductor") if name in table]
    heads = "".join(f"{f'over {base}':>26}" for base in bases)
    print(f"{'runtime':30}{'ms':>10}{heads}{'prepared in s':>15}")
    for name, row in table.items():
        ratios = "".join(f"{spread(table[base] / row):>26}" for base in bases)
        print(f"{name:30}{np.median(row):10.2f}{ratios}{prepared[name]:15.1f}", flush=True)


def spread(ratios: np.ndarray) -> str:
    """Return the median of the rounds' ratios and, in brackets, their quartiles."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
