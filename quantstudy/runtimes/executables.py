"""The ways a model can be run here, each an executable that says which of its layers run in their stated type.

- `eager`: on an x86 CPU, layers with integer weights per channel and integer inputs run on oneDNN's int8 kernels
  (`runtimes.lowering`); on a CPU and on CUDA linear layers with integer weights alone run on kernels
  that read these (`runtimes.weight_only`); every other quantized layer is simulated in floating point.
- `inductor`: `torch.compile` with frozen weights. It fuses the quantize and dequantize operators around
  convolutions and linear layers with a calibrated input into oneDNN int8 kernels. On CUDA it records CUDA graphs.
- `onnxruntime` and `openvino`: the exported ONNX model on a CPU (`runtimes.sessions`), which say themselves what they
  compute in int8.

A layer is real when its multiplications run in the types its scheme names, of which 7-bit weights are int8 with its
range reduced. Codes of fewer bits run on int8 kernels too, with the same result as in their own type, but that is int8
arithmetic: not real. On a CPU without VNNI, sums that may saturate (`quantization.saturation`) are not real in eager
mode, which simulates them, nor on inductor and OpenVINO, which saturate; ONNX Runtime gets them in uint8 and is exact.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from quantstudy.machine.hardware import arithmetic_is_native
from quantstudy.quantization.layers import put_layers, quantized_layers
from quantstudy.quantization.observers import quantizable_layers
from quantstudy.quantization.variant import Variant
from quantstudy.runtimes.kernels import int8_kernels_available
from quantstudy.runtimes.lowering import lower_int8, make_kernel, runs_in_int8
from quantstudy.runtimes.weight_only import INPUT_BITS, has_kernel, use_weight_only_kernels

if TYPE_CHECKING:
    import onnx


_INT8_WEIGHTS = (7, 8)
"""Bits of weights whose kernel is int8: all of its range, or a reduced one."""


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weights and input in its arithmetic, and whether its kernel really computes in them."""

    weight: int
    activation: int
    real: bool

    @property
    def is_float32(self) -> bool:
        """Whether the layer is not quantized at all."""
        return self.weight == self.activation == 32


@dataclass(frozen=True)
class Executable:
    """A model ready to run: float32 images [N, 3, S, S] on `device` to float32 logits [N, classes]."""

    runtime: str
    run: Callable[[Tensor], Tensor]
    layers: dict[str, LayerBits]
    memory_format: torch.memory_format = torch.channels_last
    """How `run` wants the images to lie in memory."""

    @property
    def real_layers(self) -> int:
        """How many layers run in the types their scheme names."""
        return sum(layer.real for layer in self.layers.values())

    @property
    def real(self) -> bool:
        """Whether all layers do."""
        return self.real_layers == len(self.layers)


def build_executable(model: nn.Module, runtime: str, device: torch.device) -> Executable:
    """Turn `model`, an fp32 network or a `Variant`, into an executable; the model is used up."""
    model = model.to(device).eval()
    layers = layer_bits(model, runtime, device)
    if isinstance(model, Variant) and _reads_codes(runtime, device):
        use_weight_only_kernels(model.network, device)
    if runtime == "inductor":
        return Executable(runtime, _compiled(model, device), layers)
    if int8_kernels_available(device):
        model = use_int8_kernels(model)
    dtype = model.dtype if isinstance(model, Variant) else torch.float32
    native = arithmetic_is_native(str(dtype).removeprefix("torch."), device.type)
    return Executable(runtime, model if native else _widened(model, dtype), layers)


def open_executable(model: nn.Module, exported: "onnx.ModelProto", runtime: str) -> Executable:
    """Load `exported`, the ONNX model of `model`, into ONNX Runtime or OpenVINO, with as many threads as PyTorch."""
    from quantstudy.runtimes.sessions import open_session

    session = open_session(exported, runtime, torch.get_num_threads())
    layers = layer_bits(model, runtime, torch.device("cpu"))
    quantized = quantized_layers(model.network if isinstance(model, Variant) else model)
    for name, bits in layers.items():
        if not bits.is_float32:  # what is stored in 16 bits is computed in 32
            both_int8 = bits.weight in _INT8_WEIGHTS and bits.activation == 8
            exact = runtime == "onnxruntime" or runs_in_int8(quantized.get(name))
            real = both_int8 and name in session.integer_layers and exact
            layers[name] = replace(bits, weight=8 if real else bits.weight, real=real)
    return Executable(runtime, session.run, layers, torch.contiguous_format)


class _WideConvolutions(TorchFunctionMode):
    """16-bit convolutions in float32, rounded to 16 bits: the same sums, and faster than PyTorch emulates them.

    A batch of 16 took with AVX512, in float16, MobileNetV2 at 32 px 12 ms instead of 94 and VGG-11 118 instead of 210.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.conv2d or not any(map(self._is_narrow, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        wide = {key: self._wide(value) for key, value in kwargs.items()}
        return function(*map(self._wide, args), **wide).to(self.dtype)

    def _is_narrow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self.dtype

    def _wide(self, value: Any) -> Any:
        return value.float() if self._is_narrow(value) else value


def _widened(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with _WideConvolutions(dtype):
            logits: Tensor = model(images)
        return logits

    return run


def worth_compiling(model: nn.Module, device: torch.device) -> bool:
    """Whether inductor is tried for `model`: if it runs in its stated types there.

    A simulated model gains nothing that could be reported, and a range found at run time keeps convolutions out of
    inductor's int8 patterns. On a GPU a model is tried too when some of its layers read their codes: in eager mode
    launching its kernels takes longer than running them.
    """
    reads = _reads_codes("inductor", device) and any(has_kernel(x, device) for x in quantized_layers(model).values())
    return reads or all(layer.real for layer in layer_bits(model, "inductor", device).values())


def _reads_codes(runtime: str, device: torch.device) -> bool:
    """Whether the kernels of `runtimes.weight_only` are used: in eager mode, and beside compiled kernels on a GPU."""
    return runtime == "eager" or device.type == "cuda"


def layer_bits(model: nn.Module, runtime: str, device: torch.device) -> dict[str, LayerBits]:
    """Return the bits of every Conv2d and Linear, quantized or not, by its name in the fp32 network."""
    network, dtype = (model.network, model.dtype) if isinstance(model, Variant) else (model, torch.float32)
    native = dtype == torch.float32 or arithmetic_is_native(str(dtype).removeprefix("torch."), device.type)
    width = 8 * dtype.itemsize
    quantized = quantized_layers(network)
    bits: dict[str, LayerBits] = {}
    for name, module in network.named_modules():
        if name in quantized:
            bits[name] = _quantized_bits(module, runtime, device, width)
        elif name in quantizable_layers(network):
            bits[name] = LayerBits(width, width, native)
    return bits


def _quantized_bits(layer: Any, runtime: str, device: torch.device, width: int) -> LayerBits:
    scheme = layer.scheme
    if _reads_codes(runtime, device) and has_kernel(layer, device):
        return LayerBits(scheme.weight.bits, INPUT_BITS, True)
    activation = width if scheme.activation.mode == "none" else scheme.activation.bits
    both_int8 = scheme.weight.bits in _INT8_WEIGHTS and activation == 8
    modes = ("static",) if runtime == "inductor" else ("static", "dynamic")
    real = both_int8 and scheme.activation.mode in modes and int8_kernels_available(device) and runs_in_int8(layer)
    return LayerBits(8 if real else scheme.weight.bits, activation, real)


def use_int8_kernels(model: nn.Module) -> nn.Module:
    """Return `model` on int8 kernels, one after another without float32 where `torch.fx` can trace it.

    A network that cannot be traced gets them layer by layer, and so does what lies inside a module that is not
    traced. Widths below 8 bits are widened.
    """
    if not isinstance(model, Variant) or not quantized_layers(model):
        return model
    with contextlib.suppress(fx.proxy.TraceError):
        model = Variant(lower_int8(model.network), model.dtype).eval()
    layers = quantized_layers(model).items()
    put_layers(model, {name: make_kernel(layer) for name, layer in layers if runs_in_int8(layer)})
    return model


def _compiled(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch._inductor import config

    layers = quantized_layers(model)
    for layer in layers.values():
        layer.prepare_to_trace()
    if device.type == "cpu":
        config.freezing = True
        if layers:
            _register_int8_patterns()
    return torch.compile(model, dynamic=False, mode=None if device.type == "cpu" else "reduce-overhead")


def _register_int8_patterns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
