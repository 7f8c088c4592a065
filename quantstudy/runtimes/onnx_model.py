"""Write a model or variant as ONNX: put its weights and its quantization into the graph of its architecture.

- An integer weight becomes an initializer of codes, int4 up to 4 bits and else int8, and a DequantizeLinear. The
  DequantizeLinear works per channel, or block-wise for scales per group. Scales per group stay bfloat16 in the file,
  followed by a Cast.
- A calibrated input becomes a QuantizeLinear and a DequantizeLinear, to and from uint8; fewer than 8 bits add a Clip.
- An input with the batch's own range becomes a DynamicQuantizeLinear, and its layer a ConvInteger or MatMulInteger.
  That operator knows 8 bits alone: with fewer bits the rounding is written out in float operators.
- A 16-bit weight is stored in 16 bits, followed by a Cast: the arithmetic is float32.

The grids are those of the quantized layers, so a runtime computes the same as the variant, up to rounding. The
operators are described at https://onnx.ai/onnx/operators/.
"""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.files import atomic, write_json
from quantstudy.network.graph import is_transposed
from quantstudy.quantization.layers import ActivationQuantizer, ChannelReLU, quantized_layers, quantized_operands
from quantstudy.quantization.packing import pack
from quantstudy.quantization.schemes import SMALLEST_SCALE
from quantstudy.quantization.variant import Variant
from quantstudy.runtimes.onnx_graph import sealed

PRODUCER = "quantstudy"
CALL = "@"
"""Separates a layer's name from the number of the call, in the node names of its second and later calls."""
_MULTIPLIES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_HIGHEST_DYNAMIC = 255
"""The largest code that DynamicQuantizeLinear makes; it always has 8 bits."""
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def to_onnx(model: nn.Module, graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return an ONNX model that computes the same as `model`, an fp32 network or a frozen `Variant`.

    `graph` is the graph of its architecture, from `graph_of`; it is not changed. A layer's node has the layer's name.
    The model is checked before it is returned.

    Raises:
        UserError: the graph has no Clip for a ReLU6 that equalization gave a bound per channel, or no node for a
            quantized product of activations.
    """
    return _Builder(model.network if isinstance(model, Variant) else model, graph).build()


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Check that `model` is valid and return it; a model of more than 2 GB cannot be checked."""
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        onnx.checker.check_model(model)
    return model


def described(model: onnx.ModelProto, facts: dict[str, Any]) -> onnx.ModelProto:
    """Add to a model the facts that you need to feed it an image and to name its classes; return the model.

    They come from its checkpoint and become the metadata `preprocessing` and, if present, `class_names`, in JSON.
    """
    for key in ("preprocessing", "class_names"):
        if key in facts:
            helper.set_model_props(model, _metadata(model) | {key: json.dumps(facts[key])})
    return model


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def save_onnx(path: Path, model: onnx.ModelProto, study: str = "") -> None:
    """Write an ONNX file atomically, and a .json next to it with what `described` added; equal models, equal bytes.

    From the metadata `sha256` this project recognizes a damaged file and, with `study`, a file of another study.

    Raises:
        UserError: more than 2 GB, which one file cannot hold.
    """
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise UserError(f"{path}: {model.ByteSize() / 1e9:.1f} GB; an ONNX file holds at most 2 GB")
    with atomic(path) as temporary:
        temporary.write_bytes(sealed(model.SerializeToString(deterministic=True), study))
    if metadata := _metadata(model):
        write_json(path.with_suffix(".json"), {key: json.loads(value) for key, value in metadata.items()})


class _Builder:
    def __init__(self, network: nn.Module, graph: onnx.ModelProto) -> None:
        self.layers: dict[str, Any] = quantized_layers(network)
        self.state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        self.source = graph
        self.initializers: dict[str, TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        first = {id(layer): name for name, layer in self.layers.items()}
        modules = network.named_modules(remove_duplicate=False)
        self.layer_of = {f"{name}.weight": first[id(module)] for name, module in modules if id(module) in first}
        self.quantized_inputs: dict[tuple[Any, ...], str] = {}
        self.calls: Counter[str] = Counter()
        modules = network.named_modules()
        self.operands = quantized_operands(network)
        self.bounded: dict[str, ChannelReLU] = {name: m for name, m in modules if isinstance(m, ChannelReLU)}

    def build(self) -> onnx.ModelProto:
        for initializer in self.source.graph.initializer:
            self._fill(initializer)
        if missing := self.bounded.keys() - {node.name for node in self.source.graph.node if node.op_type == "Clip"}:
            what = f"the bounds per channel of {min(missing)} have no place in the ONNX graph"
            raise UserError(f"equalize: {what}; export a method without equalize")
        names = {node.name for node in self.source.graph.node}
        if missing := {operand.rpartition(".")[0] for operand in self.operands} - names:
            what = f"the product {min(missing)} has no place in the ONNX graph; it may be computed twice"
            raise UserError(f"attention_products: {what}; export a method without them")
        for node in self.source.graph.node:
            self._append(node)
        read = {value for node in self.nodes for value in node.input}
        result = copy.deepcopy(self.source)
        del result.graph.initializer[:], result.graph.node[:]
        result.graph.initializer.extend(each for name, each in self.initializers.items() if name in read)
        result.graph.node.extend(self.nodes)
        result.producer_name, result.producer_version = PRODUCER, ""
        return checked(result)

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: Any) -> str:
        if name not in self.initializers:
            is_tensor = isinstance(value, Tensor)
            self.initializers[name] = _tensor(name, value) if is_tensor else numpy_helper.from_array(value, name)
        return name

    def _fill(self, initializer: TensorProto) -> None:
        """Give a parameter of the architecture its value; keep any other constant."""
        name = initializer.name
        if name in self.layer_of:
            layer = self.layers[self.layer_of[name]]
            if not _multiplies_integers(layer):
                self._dequantize_weight(name, layer)
        elif name not in self.state:
            self.initializers[name] = initializer
        elif self.state[name].dtype in _SIXTEEN_BITS:
            self._add("Cast", [self._constant(f"{name}.stored", self.state[name])], name, to=TensorProto.FLOAT)
        else:
            self._constant(name, self.state[name])

    def _dequantize_weight(self, name: str, layer: Any) -> None:
        if not is_transposed(layer):
            self._dequantize_rows(name, layer)
            return
        # The rows are [O, I / groups, ...]; ConvTranspose wants [I, O / groups, ...].
        rows = self._dequantize_rows(f"{name}.rows", layer)
        outputs, inputs, *kernel = layer.shape
        shapes = {"grouped": [layer.groups, outputs // layer.groups, inputs, *kernel]}
        shapes["flat"] = [layer.groups * inputs, outputs // layer.groups, *kernel]
        parts = {part: self._constant(f"{name}.{part}", np.array(shape, np.int64)) for part, shape in shapes.items()}
        grouped = self._add("Reshape", [rows, parts["grouped"]], f"{name}.by_group")
        turned = self._add("Transpose", [grouped], f"{name}.turned", perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        self._add("Reshape", [turned, parts["flat"]], name)

    def _dequantize_rows(self, name: str, layer: Any) -> str:
        """Dequantize a weight to the value `name`, [O, I / groups, ...]."""
        scheme = layer.scheme.weight
        if scheme.group_size is None:
            has_odd_rows = len(layer.shape) == 2 and layer.shape[1] % 2  # OpenVINO 2026.4 misreads those in 4 bits
            bits = max(scheme.bits, 8 if has_odd_rows else 0)
            codes = self._constant_codes(f"{name}.codes", layer.weight_codes(), bits)
            scale = self._constant(f"{name}.scale", layer.weight_scale.flatten().float())
            inputs = [codes, scale]
            if scheme.bits > 4 and len(layer.shape) == 2:  # for int8 in ONNX Runtime
                inputs.append(self._constant(f"{name}.zero_point", np.zeros(layer.shape[0], np.int8)))
            return self._add("DequantizeLinear", inputs, name, axis=0)
        layout = scheme.layout(layer.shape)
        whole = layout.columns // layout.length
        parts = [self._dequantize_blocks(f"{name}.blocks", layer, slice(0, whole), layout.length)]
        if layout.rest:
            parts.append(self._dequantize_blocks(f"{name}.rest", layer, slice(whole, whole + 1), layout.rest))
        flat = parts[0] if len(parts) == 1 else self._add("Concat", parts, f"{name}.flat", axis=1)
        shape = self._constant(f"{name}.shape", np.array(layer.shape, dtype=np.int64))
        return self._add("Reshape", [flat, shape], name)

    def _dequantize_blocks(self, name: str, layer: Any, groups: slice, block: int) -> str:
        """Dequantize some groups of each row. OpenVINO needs rows of whole blocks, so a shorter group stands alone."""
        start = groups.start * layer.scheme.weight.group_size
        codes = layer.weight_codes().flatten(1)[:, start : start + (groups.stop - groups.start) * block]
        stored = self._constant_codes(f"{name}.codes", codes, layer.scheme.weight.bits)
        scale = self._constant(f"{name}.stored_scale", layer.weight_scale[:, groups])
        scale = self._add("Cast", [scale], f"{name}.scale", to=TensorProto.FLOAT)
        return self._add("DequantizeLinear", [stored, scale], name, axis=1, block_size=block)

    def _constant_codes(self, name: str, codes: Tensor, bits: int) -> str:
        """Store codes as int4, two in a byte as ONNX and this project pack them, or as int8 above 4 bits."""
        if bits > 4:
            return self._constant(name, codes)
        data = (pack(codes, 4).numpy() ^ 0x88).tobytes()  # two's complement instead of an offset of 8
        self.initializers[name] = TensorProto(name=name, dims=codes.shape, data_type=TensorProto.INT4, raw_data=data)
        return name

    def _append(self, node: onnx.NodeProto) -> None:
        """Copy a node. If it multiplies with a quantized weight, quantize its input."""
        if node.op_type == "Transpose" and node.input[0] in self.layer_of:
            self.layer_of[node.output[0]] = name = self.layer_of[node.input[0]]
            if not _multiplies_integers(self.layers[name]):
                self.nodes.append(self._copied(node, None))
            return
        if node.op_type == "Clip" and node.name in self.bounded:
            self._append_bounded(node, self.bounded[node.name])
            return
        layer = self.layer_of.get(node.input[1]) if node.op_type in _MULTIPLIES else None
        if layer is not None and _multiplies_integers(self.layers[layer]):
            self._append_dynamic(node, layer)
            return
        copied = self._copied(node, layer)
        if layer is not None:
            copied.input[0] = self._rounded(node.input[0], self.layers[layer].activation)
        for place, side in enumerate(("left", "right")):
            if node.op_type == "MatMul" and (operand := self.operands.get(f"{node.name}.{side}")):
                copied.input[place] = self._rounded(node.input[place], operand)
        self.nodes.append(copied)

    def _rounded(self, value: str, quantizer: ActivationQuantizer) -> str:
        """Quantize and dequantize a value; return the result's name."""
        if quantizer.scheme.mode == "none":
            return value
        if quantizer.scheme.mode == "static":
            return self._quantize_input(value, quantizer)
        highest = quantizer.scheme.highest
        if (value, highest) not in self.quantized_inputs:
            if highest == _HIGHEST_DYNAMIC:
                rounded = self._add("DequantizeLinear", self._dynamic_codes(value), f"{value}.rounded")
            else:
                rounded = self._round_in_own_range(value, highest)
            self.quantized_inputs[value, highest] = rounded
        return self.quantized_inputs[value, highest]

    def _round_in_own_range(self, value: str, highest: int) -> str:
        """Round a value in its own range to codes from 0 to `highest`, as `ActivationQuantizer` does, in float."""
        numbers = (0, highest, SMALLEST_SCALE)
        zero, most, smallest = (self._constant(f"range.{number}", np.array(number, np.float32)) for number in numbers)

        def add(operator: str, *inputs: str, **attributes: int) -> str:
            return self._add(operator, list(inputs), f"{value}.to{highest}.{len(self.nodes)}", **attributes)

        low = add("Min", add("ReduceMin", value, keepdims=0), zero)
        high = add("Max", add("ReduceMax", value, keepdims=0), zero)
        scale = add("Max", add("Div", add("Sub", high, low), most), smallest)
        zero_point = add("Clip", add("Round", add("Div", add("Neg", low), scale)), zero, most)
        steps = add("Round", add("Mul", value, add("Reciprocal", scale)))
        codes = add("Clip", add("Add", steps, zero_point), zero, most)
        return add("Mul", add("Sub", codes, zero_point), scale)

    def _append_bounded(self, node: onnx.NodeProto, module: ChannelReLU) -> None:
        """Clamp at zero and at each channel's own bound."""
        bound = module.bound.float().view(-1, *[1] * (-1 - module.axis))
        above = self._add("Relu", [node.input[0]], f"{node.output[0]}.above")
        self._add("Min", [above, self._constant(f"{node.name}.bound", bound)], node.output[0])

    def _copied(self, node: onnx.NodeProto, name: str | None) -> onnx.NodeProto:
        """Copy a node and give it its layer's name, and the layer's bias if only the quantized layer has one."""
        copied = copy.deepcopy(node)
        if name is not None:
            copied.name = self._call(name)
        if (
            name is not None
            and node.op_type in ("Conv", "ConvTranspose")
            and len(node.input) < 3
            and self.layers[name].bias is not None
        ):
            copied.input.append(self._constant(f"{name}.bias", self.layers[name].bias.detach().float()))
        return copied

    def _call(self, name: str) -> str:
        """Return a name for a layer's node: the layer's own for the first call, then `<layer>@2` and so on."""
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}{CALL}{self.calls[name]}"

    def _quantize_input(self, value: str, quantizer: ActivationQuantizer) -> str:
        grid = (quantizer.scale, quantizer.zero_point, quantizer.scheme.highest)
        if (value, *grid) not in self.quantized_inputs:
            prefix = f"{value}.q{len(self.quantized_inputs)}"
            scale = self._constant(f"{prefix}.scale", np.array(grid[0], np.float32))
            zero_point = self._constant(f"{prefix}.zero_point", np.array(grid[1], np.uint8))
            codes = self._add("QuantizeLinear", [value, scale, zero_point], f"{prefix}.codes")
            if grid[2] < 255:
                bounds = [self._constant(f"code.{bound}", np.array(bound, np.uint8)) for bound in (0, grid[2])]
                codes = self._add("Clip", [codes, *bounds], f"{prefix}.clipped")
            dequantized = self._add("DequantizeLinear", [codes, scale, zero_point], prefix)
            self.quantized_inputs[(value, *grid)] = dequantized
        return self.quantized_inputs[(value, *grid)]

    def _dynamic_codes(self, value: str) -> list[str]:
        """Quantize a value in its own range; return its codes, scale and zero point."""
        parts = [f"{value}.{part}" for part in ("codes", "scale", "zero_point")]
        if (value,) not in self.quantized_inputs:
            self.quantized_inputs[(value,)] = parts[0]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [value], parts))
        return parts

    def _append_dynamic(self, node: onnx.NodeProto, name: str) -> None:
        """Multiply in integers: y = (sum of codes) * (scale of the input * scale of the weight) + bias."""
        layer, is_conv, call = self.layers[name], node.op_type == "Conv", self._call(name)
        codes, scale, zero_point = self._dynamic_codes(node.input[0])
        weight = layer.weight_codes()
        weight = weight.contiguous() if is_conv else weight.T.contiguous()
        spread = (-1, *[1] * (weight.ndim - 2)) if is_conv else (-1,)
        stored = self._constant(f"{name}.weight.codes", weight)
        scales = self._constant(f"{name}.weight.scale", layer.weight_scale.float().reshape(spread))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} if is_conv else {}
        operator = "ConvInteger" if is_conv else "MatMulInteger"
        self.nodes.append(helper.make_node(operator, [codes, stored, zero_point], [f"{call}.sums"], call, **attributes))
        sums = self._add("Cast", [f"{call}.sums"], f"{call}.float_sums", to=TensorProto.FLOAT)
        both = self._add("Mul", [scale, scales], f"{call}.scale")
        if layer.bias is None or node.op_type == "MatMul":  # the bias of a MatMul is a separate Add
            self._add("Mul", [sums, both], node.output[0])
            return
        product = self._add("Mul", [sums, both], f"{call}.product")
        bias = self._constant(f"{name}.spread_bias", layer.bias.detach().float().reshape(spread))
        self._add("Add", [product, bias], node.output[0])


def _multiplies_integers(layer: Any) -> bool:
    """Whether a layer's input has the batch's own range, and ONNX has an integer operator for the layer.

    Sums of integers have one scale per output channel, so scales per group rule them out.
    """
    weight, activation = layer.scheme.weight, layer.scheme.activation
    is_dynamic = activation.mode == "dynamic" and activation.highest == _HIGHEST_DYNAMIC
    return is_dynamic and weight.group_size is None and len(layer.shape) in (2, 4) and not is_transposed(layer)


def _tensor(name: str, tensor: Tensor) -> TensorProto:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        data = tensor.view(torch.int16).numpy().tobytes()
        return TensorProto(name=name, dims=tensor.shape, data_type=TensorProto.BFLOAT16, raw_data=data)
    return numpy_helper.from_array(tensor.numpy(), name)
