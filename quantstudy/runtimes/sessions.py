"""ONNX models on the runtimes that people deploy to: ONNX Runtime and OpenVINO, on a CPU.

Both decide themselves which layers they compute in int8. They are asked afterwards: ONNX Runtime for the graph it
made of the model, OpenVINO for the one it executes. Both compute the rest in float32; OpenVINO would take bfloat16
where the CPU has it, which is then no longer the model that was asked for.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

from quantstudy.errors import UserError
from quantstudy.export.graph import INPUT

PACKAGES = ("onnxruntime", "openvino")
"""The runtimes, named like the packages that bring them and the project's optional dependencies."""
_INTEGER_OPERATORS = (
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
_LONGEST_SUM, _MANY_IMAGES = 4096, 8
"""Products a sum, and images a batch, beyond which OpenVINO reads an int8 weight anew for every 6 images of the batch.

64 outputs are computed at a time, and with more inputs their weights do not stay in a core's cache. VGG-11's first
linear layer took 14 ms for 16 images, in 7 parts 6.5 ms; for one image the parts are 0.4 ms slower.
"""


@dataclass(frozen=True)
class Session:
    """A loaded ONNX model: float32 images [N, 3, S, S], contiguous, to logits [N, classes]."""

    run: Callable[[Tensor], Tensor]
    integer_layers: frozenset[str]
    """The names of the nodes whose multiplications run in int8."""


def why_missing(runtime: str) -> str | None:
    """Return why a runtime cannot be used, None when it can."""
    if importlib.util.find_spec(runtime) is None:
        return f"not installed: pip install '.[{runtime}]'"
    return None


def open_session(model: onnx.ModelProto, runtime: str, threads: int) -> Session:
    """Load `model` into a runtime of `PACKAGES`; raise `UserError` when it is not installed."""
    if reason := why_missing(runtime):
        raise UserError(f"measure.runtimes: {runtime} is {reason}")
    return (_onnxruntime if runtime == "onnxruntime" else _openvino)(model, threads)


def _onnxruntime(model: onnx.ModelProto, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leave the cores to whoever is timed next
    integers = _multiplies_integers(model)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        if integers:
            options.optimized_model_filepath = str(optimized)
        else:  # dequantize weights once, when they are loaded, instead of in each run
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized).graph.node if integers else []
    integer = frozenset(node.name.partition("_token_")[0] for node in nodes if node.op_type in _INTEGER_OPERATORS)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return Session(run, integer)


def _multiplies_integers(model: onnx.ModelProto) -> bool:
    """Whether a runtime can compute a layer of `model` in int8: some input is quantized, no weight is in 4 bits."""
    quantizes = any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node)
    return quantizes and all(tensor.data_type != onnx.TensorProto.INT4 for tensor in model.graph.initializer)


def _openvino(model: onnx.ModelProto, threads: int) -> Session:
    import openvino

    read = openvino.Core().read_model
    shorter = with_short_sums(model, _LONGEST_SUM) if _multiplies_integers(model) else model
    many = None if shorter is model else read(shorter.SerializeToString())
    compiled = OpenVino(read(model.SerializeToString()), threads, many)
    executed = compiled.request(1).get_compiled_model().get_runtime_model().get_ordered_ops()
    facts = [{key: value.value for key, value in node.get_rt_info().items()} for node in executed]
    integer = [
        fact["originalLayersNames"].split(",")
        for fact in facts
        if fact["layerType"] in ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
        and fact["runtimePrecision"] in ("u8", "i8")
    ]
    layer_of = {output: node.name for node in model.graph.node for output in node.output}  # some go by their output
    found = {name.partition("/")[0] for names in integer for name in names}
    return Session(compiled, frozenset(found | {layer_of[name] for name in found if name in layer_of}))


def with_short_sums(model: onnx.ModelProto, longest: int) -> onnx.ModelProto:
    """Return `model` with each Gemm of more than `longest` inputs as the sum of several; itself where there is none.

    That is done where the weight is stored in integers, with a scale per output.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and len(stored[node.input[1]].dims) == 1
    }
    nodes: list[onnx.NodeProto] = []
    found: list[onnx.TensorProto] = []
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "Gemm" else None
        inputs = stored[weight.input[0]].dims[1] if weight else 0
        if weight is None or inputs <= longest:
            nodes.append(node)
            continue
        codes, name = onnx.numpy_helper.to_array(stored[weight.input[0]]), node.name
        parts = -(-inputs // longest)
        width = -(-inputs // parts)
        slices = [f"{name}.input{part}" for part in range(parts)]
        nodes.append(helper.make_node("Split", [node.input[0]], slices, axis=1, num_outputs=parts))
        for part, read in enumerate(slices):
            own = f"{name}.weight{part}"
            found.append(
                onnx.numpy_helper.from_array(codes[:, part * width : (part + 1) * width].copy(), f"{own}.codes")
            )
            nodes.append(helper.make_node("DequantizeLinear", [f"{own}.codes", *weight.input[1:]], [own], axis=0))
            bias = list(node.input[2:]) if part == 0 else []
            nodes.append(helper.make_node("Gemm", [read, own, *bias], [f"{own}.sums"], transB=1))
        nodes.append(helper.make_node("Sum", [f"{name}.weight{part}.sums" for part in range(parts)], node.output))
    if not found:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.initializer.extend(found)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


class OpenVino:
    """An OpenVINO model (`openvino.Model`) as a function of images, compiled for each batch size: that is faster.

    `many` computes the same and is used for large batches.
    """

    def __init__(self, model: Any, threads: int, many: Any = None) -> None:
        self._model, self._many, self._requests = model, many, dict[int, Any]()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }

    def request(self, batch: int) -> Any:
        """Return the inference request of a batch size."""
        import openvino

        if batch not in self._requests:
            model = self._many if self._many is not None and batch >= _MANY_IMAGES else self._model
            model.reshape([batch, *list(model.input(0).partial_shape)[1:]])
            compiled = openvino.Core().compile_model(model, "CPU", self._settings)
            self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of contiguous float32 images."""
        import openvino

        request = self.request(len(images))
        request.infer([openvino.Tensor(images.numpy(), shared_memory=True)], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())
