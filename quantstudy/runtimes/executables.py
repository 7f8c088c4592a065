"""The ways to run a model here. Each is an executable that says which of its layers run in their stated type.

- `eager`: on an x86 CPU, layers with integer weights per channel and integer inputs run on oneDNN's int8 kernels
  (`runtimes.lowering`). On CUDA, linear layers with 4-bit weights and float inputs run on kernels that read these
  weights (`runtimes.weight_only`). Every other quantized layer is simulated in floating point.
- `inductor`: `torch.compile` with frozen weights. It fuses the quantize and dequantize operators around
  convolutions and linear layers with a calibrated input into oneDNN int8 kernels. On CUDA it records CUDA graphs.
- `onnxruntime` and `openvino`: the exported ONNX model on a CPU (`runtimes.sessions`). Each runtime reports which
  layers it computes in int8.

A layer is real when its multiplications run in the types that its scheme names. 7-bit weights count as int8 with a
reduced range. Codes of fewer bits run on int8 kernels too, with the same result as in their own type. But this is int8
arithmetic, so it is not real. On a CPU without VNNI, layers whose sums may saturate (`quantization.saturation`) are not
real in eager mode, which simulates them, nor on inductor and OpenVINO, which saturate. ONNX Runtime gets their weights
in uint8 and is exact.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from quantstudy.machine.hardware import arithmetic_is_native
from quantstudy.quantization.layers import ActivationQuantizer, quantized_layers
from quantstudy.quantization.observers import quantizable_layers, run_watched
from quantstudy.quantization.schemes import ActivationScheme
from quantstudy.quantization.variant import Variant, cast, network_of
from quantstudy.runtimes.kernels import int8_kernels_available
from quantstudy.runtimes.lowering import fuse, runs_in_int8, saturates, use_kernels
from quantstudy.runtimes.weight_only import has_kernel, use_weight_only_kernels

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Executable:
    """A model ready to run: float32 images [N, 3, S, S] on `device` to float32 logits [N, classes]."""

    runtime: str
    run: Callable[[Tensor], Tensor]
    layers: dict[str, bool]
    """Whether each Conv2d and Linear runs in the types that its scheme names, by its name in the fp32 network."""
    memory_format: torch.memory_format = torch.channels_last
    """The memory format that `run` expects of the images."""
    exported: str | None = None
    """The form of the exported model that it runs (`onnx_tuning.form_of`); None for eager mode and inductor."""

    @property
    def real(self) -> bool:
        """Whether all layers run in their stated types."""
        return all(self.layers.values())


def build_executable(model: nn.Module, runtime: str, device: torch.device) -> Executable:
    """Turn `model`, an fp32 network or a `Variant`, into an executable. This changes `model`: do not use it again."""
    model = model.to(device).eval()
    dtype = network_of(model)[1]
    layers = real_layers(model, runtime, device)
    if isinstance(model, Variant):
        use_weight_only_kernels(model.network, device)
    if runtime == "inductor":
        return Executable(runtime, _compiled(model, device), layers)
    if int8_kernels_available(device) and isinstance(model, Variant) and quantized_layers(model):
        model = Int8Network(model).eval()
    if _is_native(dtype, device):
        return Executable(runtime, model, layers)

    def run(images: Tensor) -> Tensor:
        with _WideConvolutions():
            return model(images)

    return Executable(runtime, run, layers)


def open_executable(model: nn.Module, exported: "onnx.ModelProto", runtime: str) -> Executable:
    """Load `exported`, the ONNX model of `model`, into ONNX Runtime or OpenVINO, with as many threads as PyTorch."""
    from quantstudy.runtimes.onnx_tuning import form_of
    from quantstudy.runtimes.sessions import open_session

    session = open_session(exported, runtime, torch.get_num_threads())
    network, dtype = network_of(model)
    layers = dict.fromkeys(quantizable_layers(network), dtype == torch.float32)  # 16-bit weights run in 32 bits
    for name, layer in quantized_layers(network).items():
        exact = runtime == "onnxruntime" or not saturates(layer)
        layers[name] = _is_int8(layer) and exact and name in session.integer_layers
    return Executable(runtime, session.run, layers, torch.contiguous_format, form_of(exported))


class _WideConvolutions(TorchFunctionMode):
    """Compute 16-bit convolutions in float32, then round to 16 bits: the same sums, faster than PyTorch's emulation."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.conv2d:
            return function(*args, **kwargs)
        dtype = (args[0] if args else kwargs["input"]).dtype
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs).to(dtype)


def worth_compiling(model: nn.Module, device: torch.device) -> bool:
    """Whether to try inductor for `model`: it runs in its stated types there, or some layers read codes on a GPU.

    Inductor's int8 patterns leave out convolutions whose input range is found at run time.
    """
    reads = any(has_kernel(layer, device) for layer in quantized_layers(model).values())
    return reads or all(real_layers(model, "inductor", device).values())


def real_layers(model: nn.Module, runtime: str, device: torch.device) -> dict[str, bool]:
    """Return whether each Conv2d and Linear runs in its stated types in eager mode or on inductor, by name.

    Inductor runs a layer in float that the network calls more than once: its patterns match one use of a weight.
    """
    network, dtype = network_of(model)
    layers = dict.fromkeys(quantizable_layers(network), _is_native(dtype, device))
    modes = ("static",) if runtime == "inductor" else ("static", "dynamic")
    calls = _calls(network, dtype) if runtime == "inductor" and quantized_layers(network) else Counter()
    for name, layer in quantized_layers(network).items():
        in_int8 = _is_int8(layer) and layer.scheme.activation.mode in modes and runs_in_int8(layer) and calls[name] < 2
        layers[name] = has_kernel(layer, device) or (in_int8 and int8_kernels_available(device))
    return layers


@torch.no_grad()
def _calls(network: nn.Module, dtype: torch.dtype) -> Counter[str]:
    """Count the calls of each quantized layer for an image, if the network knows the shape of its images."""
    found: Counter[str] = Counter()
    if (shape := getattr(network, "example_shape", None)) is not None:
        layers = quantized_layers(network)
        device = next(iter(network.state_dict().values())).device
        image = torch.zeros(1, *shape, dtype=dtype, device=device)
        run_watched(network, layers, [image], lambda name, _: found.update([name]))
    return found


def unrounded(model: nn.Module) -> Variant:
    """Return a copy with the same weights in float64, whose activations are not rounded."""
    exact = cast(network_of(model)[0], torch.float64)
    for module in exact.network.modules():
        if isinstance(module, ActivationQuantizer):
            module.scheme = ActivationScheme()
    return exact


def _is_native(dtype: torch.dtype, device: torch.device) -> bool:
    return arithmetic_is_native(str(dtype).removeprefix("torch."), device.type)


def _is_int8(layer: Any) -> bool:
    """Whether the scheme names int8 weights, of the full range or of 7 bits, and 8-bit inputs."""
    return layer.scheme.weight.bits in (7, 8) and layer.scheme.activation.bits == 8


class Int8Network(nn.Module):
    """A variant on int8 kernels. The first call fuses the kernels, so that they pass on codes where possible."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant, self._is_fused = variant, False
        use_kernels(variant.network)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, as the variant does."""
        if not self._is_fused:
            fuse(self.variant.network, images.to(self.variant.dtype))
            self._is_fused = True
        logits: Tensor = self.variant(images)
        return logits


def _compiled(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch._inductor import config

    layers = quantized_layers(model)
    for layer in layers.values():
        layer.prepare_to_trace()
    if device.type == "cpu":
        config.freezing = True
        if layers:
            with warnings.catch_warnings():  # importing it registers the int8 patterns
                warnings.simplefilter("ignore")
                import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    return torch.compile(model, dynamic=False, mode=None if device.type == "cpu" else "reduce-overhead")
