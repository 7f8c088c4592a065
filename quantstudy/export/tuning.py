"""An exported model in the operators that one runtime is quickest with: same weights, same grids, same arithmetic.

- ONNX Runtime computes a convolution or a Gemm in int8 only where its output is quantized too. A matrix product it
  computes in int8 with float32 output (`MatMulIntegerToFloat`), and a convolution with a 1x1 kernel is one over the
  channels. So the layers before a residual sum and the last one become products, between transposes that ONNX Runtime
  moves to where they cancel. MobileNetV2 at 224 px took 31 ms instead of 60 for 16 images.
- OpenVINO computes 64 outputs of an int8 product at a time. Where there are many inputs, the weights of 64 do not stay
  in a core's cache, and are read anew for every six images. Long sums are therefore cut in parts for large batches:
  VGG-11's first linear layer took 6.5 ms instead of 14 for 16 images. For a single image the parts are 0.4 ms slower.

Each is slower for the other runtime, which is why exported files have neither.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from quantstudy.errors import UserError
from quantstudy.export.onnx_model import PRODUCER, save_onnx

LONGEST_SUM = 4096
"""Inputs of an int8 product in OpenVINO, above which it is cut in parts."""
MANY = 8
"""Images in a batch, from which on that pays."""
_ACTIVATIONS = ("Relu", "Clip")
_MOVES_VALUES = ("Reshape", "Flatten", "MaxPool")


def tuned(model: onnx.ModelProto, runtime: Literal["onnxruntime", "openvino"], images: int = 1) -> onnx.ModelProto:
    """Return `model`, which `to_onnx` made, as `runtime` likes it for batches of `images`; itself if it is so already.

    The nodes that do a layer's multiplications keep the layer's name; of a sum in parts, the last has it.
    """
    if not multiplies_integers(model) or (runtime == "openvino" and images < MANY):
        return model
    graph = _Graph.of(model)
    change = _product if runtime == "onnxruntime" else _short_sums
    changed = [change(graph, node) for node in model.graph.node]
    if not any(changed):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for node, instead in zip(model.graph.node, changed, strict=True):
        result.graph.node.extend(instead or [node])
    result.graph.initializer.extend(graph.added)
    _prune(result.graph)
    return result


def tune(source: Path, runtime: Literal["onnxruntime", "openvino"], images: int, out: Path) -> None:
    """Write to `out` what `tuned` makes of the exported model at `source`, and print how much that changed.

    Raises:
        UserError: `source` is not a model that this project exported, or `out` is no other .onnx file.
    """
    if out.suffix != ".onnx" or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in .onnx")
    if not source.is_file():
        raise UserError(
            f"{source}: no such file; the stage export and `python -m quantstudy quantize` write such files"
        )
    try:
        model = onnx.load_model_from_string(source.read_bytes())
    except DecodeError:
        raise UserError(f"{source}: not an ONNX file") from None
    if model.producer_name != PRODUCER:
        raise UserError(
            f"{source}: its producer is {model.producer_name!r}; only what {PRODUCER} exported can be tuned"
        )
    result = tuned(model, runtime, images)
    save_onnx(out, result)
    kinds = [Counter(node.op_type for node in m.graph.node) for m in (model, result)]
    more = ", ".join(f"{count} {kind}" for kind, count in sorted((kinds[1] - kinds[0]).items()))
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, for {runtime}; {f'new: {more}' if more else 'nothing to change'}")


def multiplies_integers(model: onnx.ModelProto) -> bool:
    """Whether a runtime can compute a layer of `model` in int8: some input is quantized, no weight is in 4 bits."""
    quantizes = any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node)
    return quantizes and all(tensor.data_type != TensorProto.INT4 for tensor in model.graph.initializer)


@dataclass
class _Graph:
    """What a node's neighbours are."""

    stored: dict[str, TensorProto]
    writer: dict[str, onnx.NodeProto]
    readers: dict[str, list[onnx.NodeProto]]
    added: list[TensorProto] = field(default_factory=list)

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Graph":
        nodes = model.graph.node
        readers = defaultdict(list)
        for node in nodes:
            for value in node.input:
                readers[value].append(node)
        writer = {node.output[0]: node for node in nodes}
        return cls({tensor.name: tensor for tensor in model.graph.initializer}, writer, readers)

    def weight(self, node: onnx.NodeProto) -> tuple[np.ndarray, str] | None:
        """Return a layer's int8 codes, [O, ...], and the name of their scales, [O]; None where it has no such."""
        source = self.writer.get(node.input[1])
        codes = self.stored.get(source.input[0]) if source and source.op_type == "DequantizeLinear" else None
        if source is None or codes is None or codes.data_type != TensorProto.INT8:
            return None
        scale = source.input[1]
        is_per_output = scale in self.stored and len(self.stored[scale].dims) == 1
        return (numpy_helper.to_array(codes), scale) if is_per_output else None

    def was_quantized(self, value: str) -> bool:
        """Whether a value comes from codes, by way of a reshaping or without."""
        node = self.writer.get(value)
        while node and node.op_type in _MOVES_VALUES:
            node = self.writer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def becomes_quantized(self, value: str) -> bool:
        """Whether a value is read as codes alone, by way of a ReLU or without."""
        readers = self.readers[value]
        if len(readers) == 1 and readers[0].op_type in _ACTIVATIONS:
            readers = self.readers[readers[0].output[0]]
        return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)

    def dequantize(self, name: str, codes: np.ndarray, scale: str, axis: int) -> onnx.NodeProto:
        """Return a node that dequantizes new codes, with a zero point, to the value `name`."""
        zeros = np.zeros(codes.shape[axis], np.int8)
        parts = {f"{name}.codes": np.ascontiguousarray(codes), f"{name}.zero_point": zeros}
        self.added += [numpy_helper.from_array(array, part) for part, array in parts.items()]
        return helper.make_node("DequantizeLinear", [f"{name}.codes", scale, f"{name}.zero_point"], [name], axis=axis)


def _product(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return a matrix product in the place of a Gemm, or of a convolution that is one, if its output stays float32."""
    found = graph.weight(node) if node.op_type in ("Conv", "Gemm") else None
    if found is None or not graph.was_quantized(node.input[0]) or graph.becomes_quantized(node.output[0]):
        return []
    (codes, scale), is_conv = found, node.op_type == "Conv"
    if is_conv and not _is_pointwise(node, codes):
        return []
    own = f"{node.name}.product"
    weight = graph.dequantize(f"{own}.weight", codes.reshape(codes.shape[:2]).T, scale, axis=1)
    value, output = (f"{own}.input", f"{own}.output") if is_conv else (node.input[0], node.output[0])
    product = f"{own}.sums" if len(node.input) > 2 else output
    nodes = [weight, helper.make_node("MatMul", [value, weight.output[0]], [product], name=node.name)]
    if len(node.input) > 2:  # of a product and an Add, ONNX Runtime would make a Gemm in float32
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


def _short_sums(graph: _Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return the sum of several Gemm in the place of one with many inputs."""
    found = graph.weight(node) if node.op_type == "Gemm" else None
    if found is None or found[0].shape[1] <= LONGEST_SUM:
        return []
    codes, scale = found
    parts = -(-codes.shape[1] // LONGEST_SUM)
    width = -(-codes.shape[1] // parts)
    names = [f"{node.name}.part{part}" for part in range(parts)]
    inputs = [f"{name}.input" for name in names]
    nodes = [helper.make_node("Split", [node.input[0]], inputs, name=f"{node.name}.split", axis=1, num_outputs=parts)]
    for part, name in enumerate(names):
        weight = graph.dequantize(f"{name}.weight", codes[:, part * width : (part + 1) * width], scale, axis=0)
        bias = list(node.input[2:]) if part == 0 else []
        layer = node.name if part == parts - 1 else name
        gemm = helper.make_node("Gemm", [inputs[part], weight.output[0], *bias], [f"{name}.sums"], layer, transB=1)
        nodes += [weight, gemm]
    nodes.append(helper.make_node("Sum", [f"{name}.sums" for name in names], node.output, name=f"{node.name}.sum"))
    return nodes


def _prune(graph: onnx.GraphProto) -> None:
    """Remove dequantized weights and constants that nothing reads any more."""
    read = {value for node in graph.node for value in node.input}
    nodes = [node for node in graph.node if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {value for node in nodes for value in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    for kept, field_ in ((nodes, graph.node), (tensors, graph.initializer)):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field_[:]
        field_.extend(copies)
