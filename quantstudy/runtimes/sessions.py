"""ONNX models on the runtimes that people deploy to: ONNX Runtime and OpenVINO, on a CPU.

Both decide themselves which layers they compute in int8. They are asked afterwards: ONNX Runtime for the graph it
made of the model, OpenVINO for the one it executes. Both compute the rest in float32; OpenVINO would take bfloat16
where the CPU has it, which is then no longer the model that was asked for.
"""

import functools
import importlib.util
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from quantstudy.errors import UserError
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.runtimes.onnx_graph import INPUT
from quantstudy.runtimes.onnx_model import CALL
from quantstudy.runtimes.onnx_tuning import MANY, MULTIPLIES, multiplies_integers, tuned

PACKAGES = ("onnxruntime", "openvino")
"""The runtimes, named like the packages that bring them and the project's optional dependencies."""
_EXECUTED = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
"""What OpenVINO calls the operators that multiply."""
_AT_ONCE = 8
"""Images that OpenVINO computes at once, if weights are small."""
_SMALL = 2**24
"""Bytes of weights that are read again from a cache."""
_INTEGER_OPERATORS = (
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)


@dataclass(frozen=True)
class Session:
    """A loaded ONNX model: float32 images [N, 3, S, S], contiguous, to logits [N, classes]."""

    run: Callable[[Tensor], Tensor]
    _find_integer_layers: Callable[[], frozenset[str]]

    @functools.cached_property
    def integer_layers(self) -> frozenset[str]:
        """The names of the layers whose multiplications run in int8, each time that they are called."""
        return self._find_integer_layers()


def why_missing(runtime: str) -> str | None:
    """Return why a runtime cannot be used, None when it can."""
    if importlib.util.find_spec(runtime) is None:
        return f"not installed: pip install '.[{runtime}]'"
    return None


def open_session(model: onnx.ModelProto, runtime: str, threads: int, *, tune: bool = True) -> Session:
    """Load `model` into a runtime of `PACKAGES`, first tuned for it (`export.tuning`) or as it is.

    Raises:
        UserError: the runtime is not installed.
    """
    if reason := why_missing(runtime):
        raise UserError(f"measure.runtimes: {runtime} is {reason}")
    if runtime == "onnxruntime":
        saturates = int8_sums_saturate()
        return _onnxruntime(tuned(model, "onnxruntime", saturates=saturates) if tune else model, threads)
    return _openvino(model, tuned(model, "openvino", MANY) if tune else model, threads)


def _onnxruntime(model: onnx.ModelProto, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leave the cores to whoever is timed next
    integers = multiplies_integers(model)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        if integers:
            options.optimized_model_filepath = str(optimized)
        else:  # dequantize weights once, when they are loaded, instead of in each run
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized).graph.node if integers else []
    integer = {node.name.partition("_token_")[0] for node in nodes if node.op_type in _INTEGER_OPERATORS}

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return Session(run, lambda: _layers(model, integer))


def _layers(model: onnx.ModelProto, integer: set[str]) -> frozenset[str]:
    """Return the layers of `model` of whose nodes that multiply all are in `integer`."""
    nodes = defaultdict(set)
    for node in model.graph.node:
        if node.op_type in MULTIPLIES:
            nodes[node.name.partition(CALL)[0]].add(node.name)
    return frozenset(layer for layer, names in nodes.items() if names <= integer)


def _openvino(model: onnx.ModelProto, for_many: onnx.ModelProto, threads: int) -> Session:
    import openvino

    read = openvino.Core().read_model
    many = None if for_many is model else read(for_many.SerializeToString())
    own_ranges = any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)  # are the whole batch's
    compiled = OpenVino(read(model.SerializeToString()), threads, many, in_parts=not own_ranges)

    def integer_layers() -> frozenset[str]:
        integer = _integer_layers(compiled, model, 1)
        return integer if many is None else integer & _integer_layers(compiled, for_many, MANY)

    return Session(compiled, integer_layers)


def _integer_layers(compiled: "OpenVino", model: onnx.ModelProto, images: int) -> frozenset[str]:
    executed = compiled.request(images).get_compiled_model().get_runtime_model().get_ordered_ops()
    facts = [{key: value.value for key, value in node.get_rt_info().items()} for node in executed]
    multiplying = [fact for fact in facts if fact["layerType"] in _EXECUTED]
    integer = [fact for fact in multiplying if fact["runtimePrecision"] in ("u8", "i8")]
    nodes = [node for node in model.graph.node if node.op_type in MULTIPLIES]
    if len(integer) == len(multiplying) == len(nodes):  # what is fused may have lost its name
        return _layers(model, {node.name for node in nodes})
    layer_of = {output: node.name for node in model.graph.node for output in node.output}  # some go by their output
    found = {name.partition("/")[0] for fact in integer for name in fact["originalLayersNames"].split(",")}
    return _layers(model, found | {layer_of[name] for name in found if name in layer_of})


class OpenVino:
    """An OpenVINO model (`openvino.Model`) as a function of images, compiled for each batch size: that is faster.

    `many` computes the same and is used for large batches. Where weights are small, large batches go in parts, unless
    `in_parts` is False, as ranges of the whole batch want it. Their values stay in the cache: 16 images through
    MobileNetV2 at 224 px took 2 to 4 % less time so, and in some processes, where the whole batch was slow, 40 %.
    """

    def __init__(self, model: Any, threads: int, many: Any = None, *, in_parts: bool = True) -> None:
        constants = [op.output(0) for op in model.get_ops() if op.get_type_name() == "Constant"]
        stored = sum(out.get_element_type().bitwidth * math.prod(out.get_shape()) // 8 for out in constants)
        self._in_parts = in_parts and stored <= _SMALL
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
            model = self._many if self._many is not None and batch >= MANY else self._model
            model.reshape([batch, *list(model.input(0).partial_shape)[1:]])
            compiled = openvino.Core().compile_model(model, "CPU", self._settings)
            self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of contiguous float32 images."""
        if self._in_parts and len(images) > _AT_ONCE:
            return torch.cat([self(part) for part in images.split(_AT_ONCE)])
        import openvino

        request = self.request(len(images))
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))  # not to infer: 0.25 ms more
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())
