"""An exported model in the operators that one runtime is quickest with, and exact: same weights, same grids.

- ONNX Runtime computes a convolution or a Gemm in int8 only where its output is quantized too. A matrix product it
  computes in int8 with float32 output (`MatMulIntegerToFloat`), and a convolution with a 1x1 kernel is one over the
  channels. So the layers before a residual sum and the last one become products, between transposes that ONNX Runtime
  moves to where they cancel. MobileNetV2 at 224 px took 31 ms instead of 60 for 16 images.
- OpenVINO computes 64 outputs of an int8 product at a time. Where there are many inputs, the weights of 64 do not stay
  in a core's cache, and are read anew for every six images. Long sums are therefore cut in parts for large batches:
  VGG-11's first linear layer took 6.5 ms instead of 14 for 16 images. For a single image the parts are 0.4 ms slower.
- An x86 CPU without VNNI adds two products of uint8 and int8 in 16 bits, where they saturate. ONNX Runtime multiplies
  uint8 by uint8 exactly, so weights that may saturate (`quantization.saturation`) become uint8 with a zero point of
  128. OpenVINO has no such kernels; it takes weights that are `saturation_free`, or of 7 bits.

Each is slower for another runtime or CPU, which is why exported files have none of it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from quantstudy.errors import UserError
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.quantization import saturation
from quantstudy.runtimes.onnx_model import CALL, PRODUCER, checked, keeps_order, save_onnx

LONGEST_SUM = 4096
"""Inputs of an int8 product in OpenVINO, above which it is cut in parts."""
MANY = 8
"""Images in a batch, from which on that pays."""
_UNSIGNED = ".unsigned"
_ACTIVATIONS = ("Relu", "Clip")
MULTIPLIES = ("Conv", "Gemm", "MatMul", "ConvInteger", "MatMulInteger")
"""The operators that a layer's multiplications are in."""


def tuned(
    model: onnx.ModelProto, runtime: Literal["onnxruntime", "openvino"], images: int = 1, *, saturates: bool = False
) -> onnx.ModelProto:
    """Return `model`, which `to_onnx` made, as `runtime` likes it; itself if there is nothing to change.

    The nodes that do a layer's multiplications keep the layer's name; of a sum in parts, the last has it.

    Args:
        model: stays as it is.
        runtime: that is to run it.
        images: in a batch.
        saturates: `int8_sums_saturate` on the CPU that is to run it.
    """
    nodes, tensors = list(model.graph.node), list(model.graph.initializer)
    if multiplies_integers(model) and (runtime == "onnxruntime" or images >= MANY):
        graph = _Graph.of(model)
        change = _product if runtime == "onnxruntime" else _short_sums
        nodes = [part for node in nodes for part in change(graph, node) or [node]]
        tensors += graph.added
    if runtime == "onnxruntime" and saturates and quantizes_inputs(model):
        nodes, tensors = _unsigned(nodes, tensors)
    if len(tensors) == len(model.graph.initializer):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    nodes, tensors = _needed(nodes, tensors)
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(tensors)
    result.producer_version = f"tuned for {runtime}"
    return checked(result)


def tune(source: Path, runtime: Literal["onnxruntime", "openvino"], images: int, out: Path, *, saturates: bool) -> None:
    """Write to `out` what `tuned` makes of the exported model at `source`, and print how much that changed.

    Raises:
        UserError: `source` is not a model that this project exported, or it was tuned before, or `out` is no other
            .onnx file, or OpenVINO has no kernels that do not saturate.
    """
    if out.suffix != ".onnx" or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in .onnx")
    if not source.is_file():
        raise UserError(f"{source}: no file; the stage export and `python -m quantstudy quantize` write such files")
    model = _load(source)
    if saturates and runtime == "openvino" and may_saturate(model):
        raise UserError("--without-vnni: there openvino saturates with these weights; quantize with saturation_free")
    result = tuned(model, runtime, images, saturates=saturates)
    save_onnx(out, result)
    kinds = [Counter(node.op_type for node in m.graph.node) for m in (model, result)]
    new = [f"{count} {kind}" for kind, count in sorted((kinds[1] - kinds[0]).items())]
    if unsigned := sum(tensor.name.endswith(_UNSIGNED) for tensor in result.graph.initializer):
        new.append(f"{unsigned} weights in uint8")
    within = f" for batches of less than {MANY}" if runtime == "openvino" and images < MANY else ""
    found = f"new: {', '.join(new)}" if new else f"nothing to change{within}"
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, for {runtime}; {found}")
    if may_saturate(result) and int8_sums_saturate():
        print("without VNNI, as here, these weights may saturate: quantize with saturation_free, or see --without-vnni")


def _load(source: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(source.read_bytes())
        if model.producer_name in (PRODUCER, ""):
            onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError):
        raise UserError(f"{source}: not an ONNX model, or only a part of one") from None
    if model.producer_name != PRODUCER:
        raise UserError(
            f"{source}: its producer is {model.producer_name!r}; only what {PRODUCER} exported can be tuned"
        )
    if model.producer_version:
        raise UserError(f"{source}: was {model.producer_version} before; tune the file that it was made from")
    return model


def multiplies_integers(model: onnx.ModelProto) -> bool:
    """Whether `model` is worth computing in int8: some input is quantized, no weight is in 4 bits."""
    return quantizes_inputs(model) and all(tensor.data_type != TensorProto.INT4 for tensor in model.graph.initializer)


def quantizes_inputs(model: onnx.ModelProto) -> bool:
    """Whether the input of a layer of `model` is quantized."""
    return any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node)


def may_saturate(model: onnx.ModelProto) -> bool:
    """Whether sums of products may saturate where a CPU has no VNNI."""
    return quantizes_inputs(model) and bool(_saturating(model.graph.node, model.graph.initializer))


def _saturating(nodes: Sequence[onnx.NodeProto], tensors: Iterable[TensorProto]) -> dict[str, np.ndarray]:
    """Return the int8 codes that may saturate, by name: of all that are large, those that no layer shows to be safe."""
    codes = {t.name: numpy_helper.to_array(t) for t in tensors if t.data_type == TensorProto.INT8 and len(t.dims) > 1}
    writer = {node.output[0]: node for node in nodes}
    safe: dict[str, bool] = {}
    for node in nodes:
        if node.op_type in MULTIPLIES:
            name, turned = _weight_of(node, writer)
            if name in codes:
                rows = torch.from_numpy(np.array(codes[name].T if turned else codes[name]))
                groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
                safe[name] = safe.get(name, True) and not saturation.may_saturate(rows, groups)
    return {name: found for name, found in codes.items() if not (safe[name] if name in safe else _is_small(found))}


def _is_small(codes: np.ndarray) -> bool:
    """Whether int8 codes never saturate, however they are laid out."""
    return bool(2 * np.abs(codes.astype(np.int16)).max() <= saturation.LARGEST_PAIR)


def _weight_of(node: onnx.NodeProto, writer: dict[str, onnx.NodeProto]) -> tuple[str, bool]:
    """Return the name of a layer's stored weight, and whether it is stored [I, O] and not [O, I, ...]."""
    is_gemm = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    name, turned = node.input[1], is_gemm or node.op_type.startswith("MatMul")
    while (source := writer.get(name)) is not None and source.op_type in ("DequantizeLinear", "Transpose"):
        name, turned = source.input[0], turned != (source.op_type == "Transpose")
    return name, turned


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
        while node and keeps_order(node):
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
    if (is_conv and not _is_pointwise(node, codes)) or not graph.stored.keys() >= set(node.input[2:]):
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
    while (width := -(-codes.shape[1] // parts)) % 2:  # neighbours stay together (`quantization.saturation`)
        parts += 1
    names = [f"{node.name}{CALL}part{part}" for part in range(parts)]
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


def _unsigned(
    nodes: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Store weights that may saturate as uint8 with a zero point of 128: the same values."""
    saturating = _saturating(nodes, tensors)
    stored = {tensor.name: tensor for tensor in tensors}
    changed = []
    for node in nodes:
        place = {"DequantizeLinear": 0, "ConvInteger": 1, "MatMulInteger": 1}.get(node.op_type)
        codes = saturating.get(node.input[place]) if place is not None else None
        if place is None or codes is None:
            changed.append(node)
            continue
        name = f"{node.input[place]}{_UNSIGNED}"
        stored[name] = numpy_helper.from_array((codes.astype(np.int16) + 128).astype(np.uint8), name)
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[place] = name
        # [weight, scale, zero point], or [codes, weight, zero point of the codes, zero point of the weight]
        del copied.input[2 + place :]
        shape = () if place else tuple(stored[node.input[1]].dims)
        zero_point = f"{name}.zero_point"
        stored[zero_point] = numpy_helper.from_array(np.full(shape, 128, np.uint8), zero_point)
        copied.input.append(zero_point)
        changed.append(copied)
    return changed, list(stored.values())


def _needed(
    nodes: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto]
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Leave out dequantized weights and constants that nothing reads any more."""
    read = {value for node in nodes for value in node.input}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {value for node in nodes for value in node.input}
    return nodes, [tensor for tensor in tensors if tensor.name in read]
