"""The ONNX graph of an architecture, without weights. All variants of a study share it.

`torch.onnx.export` writes the graph once, from a network with random weights. Random weights differ from each other:
the exporter's optimizer merges equal tensors, and would lose names that are needed to fill in the weights later.
Nothing that depends on weights is computed in advance, since it would be computed from the random weights. BatchNorm is
folded. A weight that the exporter stored transposed gets its own layout back, with a Transpose behind it. Pooling over
single pixels is left out; adaptive pooling becomes this when the image already has the requested size.
"""

import ast
import functools
import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantstudy.errors import UserError, one_line
from quantstudy.files import seal
from quantstudy.network.architectures import Shape, image_shape
from quantstudy.network.folding import copy_of
from quantstudy.network.fp32 import skeleton

OPSET = 21
"""The first opset with 4-bit integers and block-wise DequantizeLinear."""
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def network_graph(architecture: str, classes: int, image_size: int | Shape) -> onnx.ModelProto:
    """Return the graph of an architecture's network, as `graph_of` does."""
    return graph_of(skeleton(architecture, classes, image_size), image_shape(image_size))


def graph_of(network: nn.Module, shape: Sequence[int]) -> onnx.ModelProto:
    """Return a network's graph, float32 [batch, C, H, W] to float32 [batch, classes]; batch is free.

    Each parameter of the network becomes an initializer with the same name and shape, without data. Other constants
    keep their data. If a module has exactly one Clip or MatMul, this node has the module's name.

    Args:
        network: fp32 with BatchNorm folded; it is not changed.
        shape: of an image, [C, H, W].

    Raises:
        UserError: the network cannot be exported.
    """
    network = copy_of(network).eval()
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        network.to_empty(device="cpu")
    _untie(network)
    state = network.state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
    try:
        model = _exported(network, shape, frozenset(state))
    except Exception as error:  # the exporter raises many types, and so may your network's code
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first says that it failed, the last says why
            cause = cause.__cause__
        reason = re.sub(r"\x1b\[[0-9;]*m", "", one_line(cause))
        raise UserError(f"export: the network cannot be exported to ONNX: {reason}") from None
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        what = "its code fixes the number of images, with len(x) for one; write x.shape[0] or x.new_zeros"
        raise UserError(f"export: the network cannot be exported for any number of images: {what}")
    _strip(model)
    _drop_poolings_of_one_pixel(model.graph)
    _restore_layouts(model, {name: tensor.numpy() for name, tensor in state.items()})
    for initializer in model.graph.initializer:
        if initializer.name in state:
            initializer.ClearField("raw_data")
    return model


class _Exportable(TorchFunctionMode):
    """Replace functions that `torch.onnx.export` gets wrong by operators that it gets right."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = _PLAIN.get(function)
        found = plain(*args, **(kwargs or {})) if plain else NotImplemented
        return function(*args, **(kwargs or {})) if found is NotImplemented else found


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Write BatchNorm out: the optimizer would compute constants from the random statistics."""
    if training or running_mean is None:
        return NotImplemented
    shape = (1, -1, *[1] * (input.ndim - 2))
    y = (input - running_mean.view(shape)) / (running_var + eps).sqrt().view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _avg_pool(
    pool: Callable[..., Tensor],
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Apply `divisor_override`, which the exporter drops."""
    if divisor_override is None or ceil_mode:
        return NotImplemented
    area = math.prod(kernel_size) if isinstance(kernel_size, tuple) else kernel_size ** (input.ndim - 2)
    return pool(input, kernel_size, stride, padding, False, True) * (area / divisor_override)


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Any:
    """Turn int bounds into floats: the exporter turns an int and a float bound into a tensor and a number."""
    if not input.is_floating_point():
        return NotImplemented
    low, high = (float(bound) if isinstance(bound, int) else bound for bound in (min, max))
    return torch.clamp(input, low, high)


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Build circular padding from slices: OpenVINO cannot read Pad in this mode."""
    if mode != "circular":
        return NotImplemented
    x = input
    for i in range(0, len(pad), 2):
        axis, (before, after) = -1 - i // 2, pad[i : i + 2]
        size = x.shape[axis]
        x = torch.cat([x.narrow(axis, size - before, before), x, x.narrow(axis, 0, after)], axis)
    return x


_PLAIN: dict[Any, Callable[..., Any]] = {F.batch_norm: _batch_norm, F.pad: _pad}
_PLAIN |= {pool: functools.partial(_avg_pool, pool) for pool in (F.avg_pool2d, F.avg_pool3d)}
_PLAIN |= dict.fromkeys((torch.clamp, torch.clip, Tensor.clamp, Tensor.clip), _clamp)


def load_graph(path: Path, study: str = "") -> onnx.ModelProto:
    """Read the graph that the stage trace wrote; raise `UserError` if it is missing, damaged or another study's."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage trace")
    return unsealed(path, study, "run the stage trace again")


def sealed(content: bytes, study: str = "") -> bytes:
    """Append a metadata entry `sha256` to the bytes of an ONNX model, computed from these bytes and the study's name.

    A protocol buffer may be written in several parts, one behind another. Every reader merges them.
    """
    entry = onnx.StringStringEntryProto(key="sha256", value=seal(content, study))
    return content + onnx.ModelProto(metadata_props=[entry]).SerializeToString()


def unsealed(path: Path, study: str, remedy: str) -> onnx.ModelProto:
    """Read a model file written by `sealed`; raise `UserError`, with the remedy, if the file has changed since."""
    found = path.read_bytes()
    content = found[: len(found) - len(sealed(b""))]
    if found != sealed(content, study):
        raise UserError(f"{path}: damaged, or not the ONNX model that was written there; {remedy}")
    return onnx.load_model_from_string(content)


def _untie(network: nn.Module) -> None:
    """Give each layer that shares a weight its own copy: the inputs of these layers are quantized separately."""
    seen: set[int] = set()
    for module in network.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _exported(network: nn.Module, shape: Sequence[int], weights: frozenset[str]) -> onnx.ModelProto:
    from onnxscript.optimizer import optimize_ir

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    images = (torch.randn(2, *shape),)
    names: Any = {"input_names": [INPUT], "output_names": [OUTPUT]}
    names["dynamic_shapes"] = ({0: torch.export.Dim(BATCH)},)
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            with _Exportable():
                program = torch.onnx.export(
                    network, images, dynamo=True, opset_version=OPSET, verbose=False, optimize=False, **names
                )
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
    assert program is not None
    optimize_ir(program.model, should_fold=should_fold)
    return program.model_proto


def _strip(model: onnx.ModelProto) -> None:
    """Remove debugging data, which is larger than a small network's 4-bit weights; keep some names of modules."""
    graph = model.graph
    del graph.value_info[:]
    calls: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        if node.op_type in ("Clip", "MatMul") and scopes:
            calls[ast.literal_eval(scopes[0])[-2]].append(node)
    for name, (node, *others) in calls.items():
        node.name = node.name if others else name
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _drop_poolings_of_one_pixel(graph: onnx.GraphProto) -> None:
    for node in [node for node in graph.node if node.op_type in ("AveragePool", "MaxPool")]:
        window = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        is_padded = any(window.get("pads", []))
        if window["kernel_shape"] == window.get("strides", [1, 1]) == [1, 1] and not is_padded:
            for reader in graph.node:
                reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
            graph.node.remove(node)


def _restore_layouts(model: onnx.ModelProto, state: dict[str, np.ndarray]) -> None:
    graph = model.graph
    present = {initializer.name for initializer in graph.initializer}
    missing = {name: array for name, array in state.items() if name not in present and array.ndim == 2}
    for initializer in [i for i in graph.initializer if i.name not in state and len(i.dims) == 2]:
        stored = numpy_helper.to_array(initializer)
        for name, array in missing.items():
            if stored.shape == array.T.shape and np.array_equal(stored, array.T):
                graph.node.insert(0, helper.make_node("Transpose", [name], [initializer.name], perm=[1, 0]))
                graph.initializer.remove(initializer)
                graph.initializer.append(numpy_helper.from_array(array, name))
                break
