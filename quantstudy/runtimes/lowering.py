"""Turn a simulated quantized network into one that runs in int8 on a CPU, in eager mode, in a second.

1. Each frozen quantized layer that the kernels can run becomes an `Int8Conv2d` or `Int8Linear`.
2. A ReLU or ReLU6 that is the only reader of such a layer moves into it. The network's captured graph shows the
   readers.
3. Some modules between two layers keep the values, or at least their order: Identity, Dropout, max pooling, flattening.
   If all readers behind them are layers with the same static 8-bit grid, the first layer writes the codes of that grid
   and the readers take them. No float32 image exists in between; pooling and flattening run on uint8.

All else stays in float32, including the input of a layer with run-time ranges. A fused code can differ from the
simulated code by one, where float32 rounding falls on the other side of a half.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.network.graph import Call, Graph, capture, has_hooks, put, relative_error, run_in_eval
from quantstudy.quantization.layers import QuantConv2d, QuantLinear, quantized_layers
from quantstudy.runtimes.kernels import Activation, DynamicActivation, Int8Conv2d, Int8Linear, PostOp, StaticActivation
from quantstudy.runtimes.onednn_geometry import is_right
from quantstudy.runtimes.uint8 import CodeMaxPool2d

Kernel = Int8Conv2d | Int8Linear
_POST_OPS: dict[type[nn.Module], PostOp] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_RELU_CALLS = ("relu", "relu_")
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_KEEPS_ORDER = (nn.MaxPool2d, CodeMaxPool2d, nn.Flatten, *_NOTHING)
LARGEST_CHANGE = 0.03
"""How far fused codes may change the logits of two images, as a share of the logits' norm."""


def use_kernels(network: nn.Module) -> None:
    """Replace each layer of `network` that can run in int8 (`runs_in_int8`) by an int8 kernel."""
    layers = quantized_layers(network).items()
    put(network, {name: make_kernel(layer) for name, layer in layers if runs_in_int8(layer)})


@torch.no_grad()
def fuse(network: nn.Module, images: Tensor) -> None:
    """Move activations into the kernels of `network`, and let the kernels pass on codes, in place.

    The network stays as it is if its graph has a problem, if it fails on two images, or if it would compute something
    else.

    Args:
        network: after `use_kernels`, in eval mode.
        images: float32 [N, C, H, W], to capture the graph on.
    """
    with torch.inference_mode(False):  # tensors of inference mode do not tell who writes to them
        images = images[:2].clone()
        try:
            graph, before = capture(network, images), run_in_eval(network, images)
        except Exception:  # your network's code may raise anything on two images
            return
        if graph.problem is not None:
            return
        replaced = _fusions(graph)
        kept = {name: network.get_submodule(name) for name in replaced}
        put(network, replaced)
        try:
            change = relative_error(before, run_in_eval(network, images))
        except Exception:  # an operator that takes no codes, or your network's code again
            change = math.inf
        if change > LARGEST_CHANGE:
            put(network, kept)


def _fusions(graph: Graph) -> dict[str, nn.Module]:
    """Return the modules to put in, by the name of the module that each replaces."""
    replaced: dict[str, nn.Module] = {}
    for name, calls in graph.calls_of.items():
        module = calls[0].module
        if _is_plain(module, (nn.MaxPool2d,)):
            replaced[name] = CodeMaxPool2d(module)  # type: ignore[arg-type]
        elif isinstance(module, Kernel) and len(calls) == 1:
            post_op, activation = _post_op(graph, calls[0])
            if activation is not None:
                replaced[activation] = nn.Identity()
            match list(_readers(calls[0], post_op != "none", activation)):
                case [StaticActivation(highest=255) as shared]:
                    replaced[name] = module.fused(post_op, shared)
                case _:
                    replaced[name] = module.fused(post_op, None)
    return replaced


def _is_plain(module: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes just what one of the classes `kinds` computes, and returns it alone."""
    if module is None or type(module) not in kinds or has_hooks(module):
        return False
    return not getattr(module, "return_indices", False)


def lower_int8(model: nn.Module, images: Tensor) -> nn.Module:
    """Return an int8 network for CPU inference that computes what `model` simulates; `model` stays as it is.

    `model` is in eval mode, on the CPU, float32, its quantized layers frozen. `images` are as for `fuse`. Layers that
    the kernels cannot run (`runs_in_int8`) stay simulated.

    Raises:
        RuntimeError: `int8_kernels_available` is False, or the model is in training mode.
    """
    if model.training:
        raise RuntimeError("an int8 network is for inference: call model.eval() first")
    network = copy.deepcopy(model)
    use_kernels(network)
    fuse(network, images)
    return network


def make_kernel(layer: Any, post_op: PostOp = "none", output: StaticActivation | None = None) -> Kernel:
    """Build the kernel of one frozen `QuantConv2d` or `QuantLinear` with a quantized input and scales per channel."""
    tensors = (layer.weight_codes(), layer.weight_scale, layer.bias, _grid(layer))
    if isinstance(layer, QuantLinear):
        return Int8Linear(*tensors, post_op=post_op, output=output)
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return Int8Conv2d(*tensors, **geometry, post_op=post_op, output=output)


def runs_in_int8(layer: Any) -> bool:
    """Whether the kernels here take a layer: frozen, one scale per channel, a quantized input, sums that are right."""
    if not (isinstance(layer, QuantConv2d | QuantLinear) and layer.frozen and layer.emits_int8) or saturates(layer):
        return False
    if isinstance(layer, QuantLinear):
        return True
    return is_right(layer.shape, layer.stride, layer.padding, layer.dilation, layer.groups)


def saturates(layer: Any) -> bool:
    """Whether int8 sums of a frozen layer may saturate on this CPU."""
    return int8_sums_saturate() and layer.may_saturate


def _grid(layer: Any) -> Activation:
    """Return the input grid of a quantized layer or of a kernel."""
    if isinstance(layer, Kernel):
        return layer.activation
    scheme = layer.scheme.activation
    if scheme.mode == "dynamic":
        return DynamicActivation(scheme.highest)
    return StaticActivation(layer.activation.scale, layer.activation.zero_point, scheme.highest)


def _post_op(graph: Graph, call: Call) -> tuple[PostOp, str | None]:
    """Return the activation that is a call's only reader, and the name of its module if it runs nowhere else.

    A ReLU may also stay where it is: it computes the same once more. A ReLU6 may not: it would clamp codes.
    """
    reader = call.readers[0] if len(call.readers) == 1 else Call("nothing")
    while _is_plain(reader.module, _NOTHING) and len(reader.readers) == 1:
        reader = reader.readers[0]
    if reader.module is None:
        return ("relu" if reader.name in _RELU_CALLS else "none"), None
    if has_hooks(reader.module):
        return "none", None
    post_op, once = _POST_OPS.get(type(reader.module), "none"), graph.only_call(reader.name) is not None
    if once and post_op != "none":
        return post_op, reader.name
    return ("relu" if post_op == "relu" else "none"), None


def _readers(call: Call, is_positive: bool, removed: str | None) -> set[Activation | None]:
    """Return the input grids of the layers that read `call`, also behind order-keeping calls; None for other readers.

    `removed` is the activation that moves into the kernel. A ReLU6 that stays would clamp codes, not values.
    """
    found: set[Activation | None] = set()
    for reader in call.readers:
        module = reader.module
        relu = is_positive and (_is_plain(module, (nn.ReLU,)) or (module is None and reader.name in _RELU_CALLS))
        relu = relu or (module is not None and reader.name == removed)
        keeps_order = _is_plain(module, _KEEPS_ORDER)
        if isinstance(module, Kernel):
            found.add(module.activation)
        elif relu or keeps_order or (module is None and reader.name == "flatten"):
            found |= _readers(reader, is_positive, removed)
        else:
            found.add(None)
    return found
