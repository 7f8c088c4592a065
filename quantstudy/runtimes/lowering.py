"""Turn a simulated quantized network into one that runs in int8 on a CPU, in eager mode, in a second.

`torch.fx` records the network's graph, with the quantized layers as its leaves. Then
1. each frozen quantized layer that the kernels can run becomes an `Int8Conv2d` or `Int8Linear`;
2. a ReLU or ReLU6 that alone reads such a layer moves into it;
3. what is left between two layers and does not change the values, or keeps their order, is followed: Identity,
   Dropout, max pooling, flattening. Where every reader at the end is a layer with one and the same static 8-bit
   grid, the first layer writes the codes of that grid and the readers take them. No float32 image exists there;
   the pooling and flattening run on uint8.

The rest stays in float32, and so does the input of a layer with run-time ranges. Against the simulation a fused code
can differ by one where float32 rounding falls on the other side of a half.
"""

from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from quantstudy.errors import one_line
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization.layers import QuantConv2d, QuantLinear
from quantstudy.runtimes.kernels import Activation, DynamicActivation, Int8Conv2d, Int8Linear, PostOp, StaticActivation
from quantstudy.runtimes.onednn_geometry import is_right
from quantstudy.runtimes.uint8 import CodeMaxPool2d

Kernel = Int8Conv2d | Int8Linear
_POST_OPS: dict[type[nn.Module], PostOp] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_POST_FUNCTIONS: dict[Any, PostOp] = dict.fromkeys([torch.relu, nn.functional.relu, "relu", "relu_"], "relu")
_POST_FUNCTIONS[nn.functional.relu6] = "relu6"
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ORDER_KEEPING = (CodeMaxPool2d, nn.Flatten)
_ORDER_KEEPING_CALLS = (torch.flatten, "flatten")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, QuantConv2d | QuantLinear) or super().is_leaf_module(module, name)


def lower_int8(model: nn.Module) -> fx.GraphModule:
    """Return an int8 network for CPU inference that computes what `model` simulates; `model` stays as it is.

    `model` is in eval mode, on the CPU, float32, its quantized layers frozen, and `torch.fx` can trace it. Layers
    that the kernels cannot run (`runs_in_int8`) stay simulated. The result shares tensors with `model`.

    Raises:
        RuntimeError: `int8_kernels_available` is False, or the model is in training mode.
        torch.fx.proxy.TraceError: the model cannot be traced: its control flow depends on its input, for one.
    """
    if model.training:
        raise RuntimeError("an int8 network is for inference: call model.eval() first")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the code of a network of one's own may raise anything at a stand-in for an image
        raise fx.proxy.TraceError(one_line(error)) from None
    lowered = fx.GraphModule(model, graph).eval()
    _simplify(lowered)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        layer = _module(lowered, node)
        if runs_in_int8(layer):
            post_op, output = _fuse(lowered, node) if calls[node.target] == 1 else ("none", None)
            lowered.set_submodule(str(node.target), make_kernel(layer, post_op, output))
    graph.lint()
    lowered.recompile()
    return lowered


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


def _module(model: fx.GraphModule, node: fx.Node) -> Any:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _simplify(model: fx.GraphModule) -> None:
    """Remove the calls that do nothing in eval mode (folded BatchNorms, Dropouts); let max pooling take codes."""
    for node in list(model.graph.nodes):
        module = _module(model, node)
        if isinstance(module, _NOTHING):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
        elif isinstance(module, nn.MaxPool2d) and not module.return_indices:
            model.set_submodule(str(node.target), CodeMaxPool2d(module))


def _fuse(model: fx.GraphModule, node: fx.Node) -> tuple[PostOp, StaticActivation | None]:
    """Move a following ReLU into the layer of `node`; return it, and the grid that all readers share, if any."""
    post_op: PostOp = "none"
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is not None and (found := _post_op(model, reader)):
        post_op = found
        reader.replace_all_uses_with(node)
        model.graph.erase_node(reader)
    match list(_readers(model, node)):
        case [StaticActivation(highest=255) as shared]:
            return post_op, shared
    return post_op, None


def _post_op(model: fx.GraphModule, node: fx.Node) -> PostOp | None:
    if node.op == "call_module":
        return _POST_OPS.get(type(_module(model, node)))
    return _POST_FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def _readers(model: fx.GraphModule, node: fx.Node) -> set[Activation | None]:
    """Return the input grids of the layers that read `node`, through order-keeping calls; None for any other reader."""
    found: set[Activation | None] = set()
    for user in node.users:
        layer = _module(model, user)
        if isinstance(layer, Kernel) or runs_in_int8(layer):
            found.add(_grid(layer))
        elif isinstance(layer, _ORDER_KEEPING) or user.target in _ORDER_KEEPING_CALLS:
            found |= _readers(model, user)
        else:
            found.add(None)
    return found
