"""Rewrite an exported model in the operators that ONNX Runtime runs fastest. Weights and grids stay exactly the same.

- ONNX Runtime computes a convolution or a Gemm in int8 only if its output is quantized too. A matrix product runs in
  int8 with a float32 output (`MatMulIntegerToFloat`), and a convolution with a 1x1 kernel is a matrix product over the
  channels. So the layers before a residual sum and the last layer become matrix products. ONNX Runtime moves the
  transposes around them to where they cancel.
- An x86 CPU without VNNI adds two products of uint8 and int8 in 16 bits, and the sum can saturate. ONNX Runtime
  multiplies uint8 by uint8 exactly. So weights that may saturate (`quantization.saturation`) become uint8 with a zero
  point of 128.

Each change is slower on OpenVINO or on another CPU. So the exported file has neither; only the model that is timed on
ONNX Runtime has them (`exported_model`).
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from quantstudy.errors import UserError
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization import saturation
from quantstudy.runtimes.onnx_graph import unsealed
from quantstudy.runtimes.onnx_model import PRODUCER, checked, save_onnx, to_onnx

AS_EXPORTED, TUNED = "as exported", "tuned for onnxruntime"
"""The forms of an exported model."""
_FOLLOWED = ("Relu", "Clip", "MaxPool", "Reshape", "Flatten")
"""Operators that ONNX Runtime looks through to find the QuantizeLinear behind a layer."""
MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger")
"""The operators that hold a layer's multiplications."""
_PLACES = {"DequantizeLinear": 0, "ConvInteger": 1, "MatMulInteger": 1}
"""The place of the weight among an operator's inputs."""
_Parts = tuple[list[onnx.NodeProto], list[TensorProto]]


def exported_model(model: nn.Module, graph: onnx.ModelProto, runtime: str) -> onnx.ModelProto:
    """Return the ONNX model that is timed on `runtime`: tuned for this CPU on ONNX Runtime, else as exported.

    `model` and `graph` are the arguments of `to_onnx`.
    """
    exported = to_onnx(model, graph)
    return tuned(exported, saturates=int8_sums_saturate()) if runtime == "onnxruntime" else exported


def form_of(exported: onnx.ModelProto) -> str:
    """Return `AS_EXPORTED` or `TUNED`."""
    return exported.producer_version or AS_EXPORTED


def tuned(model: onnx.ModelProto, *, saturates: bool) -> onnx.ModelProto:
    """Return `model` rewritten for ONNX Runtime, or `model` itself if there is nothing to change.

    The nodes that do a layer's multiplications keep the layer's name.

    Args:
        model: a result of `to_onnx`; it is not changed.
        saturates: `int8_sums_saturate` on the CPU that will run the model.
    """
    nodes, tensors = list(model.graph.node), list(model.graph.initializer)
    if multiplies_integers(model):
        graph = _Graph(model)
        nodes = [part for node in nodes for part in _product(graph, node) or [node]]
        tensors += graph.added
    if saturates and quantizes_inputs(model):
        nodes, tensors = _unsigned(nodes, tensors)
    if len(tensors) == len(model.graph.initializer):
        return model
    result = copy.deepcopy(model)
    del result.graph.node[:], result.graph.initializer[:]
    nodes, tensors = _needed(nodes, tensors)
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(tensors)
    result.producer_version = TUNED
    return checked(result)


def tune(source: Path, out: Path, *, saturates: bool) -> None:
    """Tune the exported model at `source`, write the result to `out` and print its form.

    Raises:
        UserError: `source` is not a model that this project exported, or it is already tuned, or `out` is not another
            .onnx file.
    """
    if out.suffix != ".onnx" or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in .onnx")
    if not source.is_file():
        raise UserError(f"{source}: no file; the stage export and `python -m quantstudy quantize` write such files")
    try:
        model = onnx.load_model_from_string(source.read_bytes())
        if model.producer_name in (PRODUCER, ""):
            onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError):
        raise UserError(f"{source}: not an ONNX model, or only a part of one") from None
    if (found := model.producer_name) != PRODUCER:
        raise UserError(f"{source}: its producer is {found!r}; only what {PRODUCER} exported can be tuned")
    model = unsealed(source, "", "export it again")
    if model.producer_version:
        raise UserError(f"{source}: was {model.producer_version} before; tune the file that it was made from")
    result = tuned(model, saturates=saturates)
    save_onnx(out, result)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, {form_of(result)}")
    if may_saturate(result) and int8_sums_saturate():
        print("without VNNI, as here, these weights may saturate: quantize with saturation_free, or see --without-vnni")


def multiplies_integers(model: onnx.ModelProto) -> bool:
    """Whether `model` is worth computing in int8: some input is quantized, and no weight is in 4 bits."""
    return quantizes_inputs(model) and all(tensor.data_type != TensorProto.INT4 for tensor in model.graph.initializer)


def quantizes_inputs(model: onnx.ModelProto) -> bool:
    """Whether the input of at least one layer of `model` is quantized."""
    return any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node)


def may_saturate(model: onnx.ModelProto) -> bool:
    """Whether sums of products may saturate on a CPU without VNNI."""
    in_blocks = {node.input[0] for node in model.graph.node if form_of(model) == TUNED and _block_length(node)}
    found = _saturating(model.graph.node, model.graph.initializer)  # ONNX Runtime multiplies no blocks in int8
    return quantizes_inputs(model) and bool(found.keys() - in_blocks)


def _saturating(nodes: Sequence[onnx.NodeProto], tensors: Iterable[TensorProto]) -> dict[str, np.ndarray]:
    """Return the int8 weights whose sums may saturate, as codes by name, judged by the layers that read them.

    No runtime multiplies weights of several blocks a row in int8. OpenVINO does if a block is the whole row.
    """
    length = {node.input[0]: found for node in nodes if (found := _block_length(node))}
    int8 = {t.name: t for t in tensors if t.data_type == TensorProto.INT8 and len(t.dims) > 1}
    codes = {name: numpy_helper.to_array(t) for name, t in int8.items() if length.get(name, t.dims[1]) == t.dims[1]}
    writer = {node.output[0]: node for node in nodes}
    safe: dict[str, bool] = {}
    for node in nodes:
        if node.op_type in MULTIPLIES:
            name, turned = _weight_of(node, writer)
            if name in codes:
                rows = torch.from_numpy(np.array(codes[name].T if turned else codes[name]))
                groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
                safe[name] = safe.get(name, True) and not saturation.may_saturate(rows, groups)
    for name in codes.keys() - safe.keys():  # no layer tells the layout: take the largest pair
        safe[name] = 2 * int(np.abs(codes[name].astype(np.int16)).max()) <= saturation.LARGEST_PAIR
    return {name: found for name, found in codes.items() if not safe[name]}


def _block_length(node: onnx.NodeProto) -> int:
    """Return how many codes share a scale if a node dequantizes in blocks; 0 for any other node."""
    is_dequantize = node.op_type == "DequantizeLinear"
    return next((a.i for a in node.attribute if is_dequantize and a.name == "block_size"), 0)


def _weight_of(node: onnx.NodeProto, writer: dict[str, onnx.NodeProto]) -> tuple[str, bool]:
    """Return the name of a layer's stored weight, and whether its layout is [I, O] instead of [O, I, ...]."""
    is_gemm = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    name, turned = node.input[1], is_gemm or node.op_type.startswith("MatMul")
    while (source := writer.get(name)) is not None and source.op_type in ("DequantizeLinear", "Transpose"):
        name, turned = source.input[0], turned != (source.op_type == "Transpose")
    return name, turned


class _Graph:
    """The neighbours of each node, and the tensors to add to the model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.writer = {node.output[0]: node for node in model.graph.node}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for value in node.input:
                self.readers[value].append(node)
        self.added: list[TensorProto] = []

    def is_dequantized(self, value: str) -> bool:
        return value in self.writer and self.writer[value].op_type == "DequantizeLinear"

    def weight(self, node: onnx.NodeProto) -> tuple[np.ndarray, str] | None:
        """Return a layer's int8 codes, [O, ...], and the name of their scales, [O]; None if it has no such codes."""
        if not self.is_dequantized(node.input[1]):
            return None
        codes, scale = (self.stored.get(name) for name in self.writer[node.input[1]].input[:2])
        if codes is None or codes.data_type != TensorProto.INT8 or scale is None or len(scale.dims) != 1:
            return None
        return numpy_helper.to_array(codes), scale.name

    def becomes_quantized(self, value: str) -> bool:
        """Whether all readers of a value quantize it, directly or behind operators of `_FOLLOWED`."""
        readers = self.readers[value]
        while len(readers) == 1 and readers[0].op_type in _FOLLOWED:
            readers = self.readers[readers[0].output[0]]
        return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)

    def dequantize(self, name: str, codes: np.ndarray, scale: str) -> onnx.NodeProto:
        """Return a node that dequantizes new codes [I, O], with a zero point, to the value `name`."""
        zeros = np.zeros(codes.shape[1], np.int8)
        parts = {f"{name}.codes": np.ascontiguousarray(codes), f"{name}.zero_point": zeros}
        self.added += [numpy_helper.from_array(array, part) for part, array in parts.items()]
        return helper.make_node("DequantizeLinear", [f"{name}.codes", scale, f"{name}.zero_point"], [name], axis=1)


def _product(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the matrix product that replaces a Gemm or a 1x1 convolution with a float32 output; else no nodes."""
    found = graph.weight(node) if node.op_type in ("Conv", "Gemm") else None
    if found is None or not graph.is_dequantized(node.input[0]) or graph.becomes_quantized(node.output[0]):
        return []
    (codes, scale), is_conv = found, node.op_type == "Conv"
    if (is_conv and not _is_pointwise(node, codes)) or not graph.stored.keys() >= set(node.input[2:]):
        return []
    own = f"{node.name}.product"
    weight = graph.dequantize(f"{own}.weight", codes.reshape(codes.shape[:2]).T, scale)
    value, output = (f"{own}.input", f"{own}.output") if is_conv else (node.input[0], node.output[0])
    product = f"{own}.sums" if len(node.input) > 2 else output
    nodes = [weight, helper.make_node("MatMul", [value, weight.output[0]], [product], name=node.name)]
    if len(node.input) > 2:  # ONNX Runtime would fuse a product and an Add into a Gemm in float32
        graph.added.append(numpy_helper.from_array(-numpy_helper.to_array(graph.stored[node.input[2]]), f"{own}.less"))
        nodes.append(helper.make_node("Sub", [product, f"{own}.less"], [output], name=f"{own}.bias"))
    if is_conv:
        before = helper.make_node("Transpose", [node.input[0]], [value], name=value, perm=[0, 2, 3, 1])
        after = helper.make_node("Transpose", [output], node.output, name=output, perm=[0, 3, 1, 2])
        nodes = [before, *nodes, after]
    return nodes


def _is_pointwise(node: onnx.NodeProto, codes: np.ndarray) -> bool:
    wanted = {"group": 1, "strides": [1, 1], "pads": [0, 0, 0, 0]}
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return codes.shape[2:] == (1, 1) and all(given.get(name, value) == value for name, value in wanted.items())


def _unsigned(nodes: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto]) -> _Parts:
    """Store weights that may saturate as uint8 with a zero point of 128: the same values.

    ONNX Runtime multiplies no weights in blocks in int8, so they stay.
    """
    saturating = _saturating(nodes, tensors)
    stored = {tensor.name: tensor for tensor in tensors}
    changed = []
    for node in nodes:
        place = None if _block_length(node) else _PLACES.get(node.op_type)
        codes = saturating.get(node.input[place]) if place is not None else None
        if place is None or codes is None:
            changed.append(node)
            continue
        name = f"{node.input[place]}.unsigned"
        stored[name] = numpy_helper.from_array((codes.astype(np.int16) + 128).astype(np.uint8), name)
        copied = copy.deepcopy(node)
        copied.input[place] = name
        # Inputs: [weight, scale, zero point], or [codes, weight, zero point of the codes, zero point of the weight]
        del copied.input[2 + place :]
        shape = () if place else tuple(stored[node.input[1]].dims)
        zero_point = numpy_helper.from_array(np.full(shape, 128, np.uint8), f"{name}.zero_point")
        stored[zero_point.name] = zero_point
        copied.input.append(zero_point.name)
        changed.append(copied)
    return changed, list(stored.values())


def _needed(nodes: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto]) -> _Parts:
    """Leave out dequantized weights and constants that nothing reads."""
    read = {value for node in nodes for value in node.input}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {value for node in nodes for value in node.input}
    return nodes, [tensor for tensor in tensors if tensor.name in read]
