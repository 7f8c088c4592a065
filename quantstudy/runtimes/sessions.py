"""ONNX models on the runtimes that people deploy to: ONNX Runtime and OpenVINO, on a CPU.

Each runtime decides by itself which layers it computes in int8. This module asks afterwards: it reads the graph that
ONNX Runtime optimized, or the graph that OpenVINO executes. Both compute all other layers in float32. OpenVINO would
take bfloat16 on some CPUs, and is told not to.
"""

import functools
import importlib.util
import re
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
from quantstudy.runtimes.onnx_graph import INPUT
from quantstudy.runtimes.onnx_model import CALL
from quantstudy.runtimes.onnx_tuning import MULTIPLIES, multiplies_integers

PACKAGES = ("onnxruntime", "openvino")
"""The runtimes. Each has the name of its package and of the project's optional dependency."""
_EXECUTED = ("Convolution", "FullyConnected", "MatMul", "GroupConvolution")
"""OpenVINO's names for the operators that multiply."""
_INTEGER_OPERATOR = re.compile("QLinear(Conv|MatMul)|QGemm|(Conv|MatMul)Integer|DynamicQuantizeMatMul")
"""How the names of ONNX Runtime's operators that multiply integers begin."""


@dataclass(frozen=True)
class Session:
    """A loaded ONNX model. `run` maps contiguous float32 images [N, 3, S, S] to logits [N, classes]."""

    run: Callable[[Tensor], Tensor]
    _find_integer_layers: Callable[[], frozenset[str]]

    @functools.cached_property
    def integer_layers(self) -> frozenset[str]:
        """The names of the layers whose multiplications run in int8 at every call of the layer."""
        return self._find_integer_layers()


def why_missing(runtime: str) -> str | None:
    """Return why a runtime cannot be used, or None if it can."""
    return None if importlib.util.find_spec(runtime) else f"not installed: pip install '.[{runtime}]'"


def open_session(model: onnx.ModelProto, runtime: str, threads: int) -> Session:
    """Load `model`, unchanged, into a runtime of `PACKAGES`.

    Raises:
        UserError: the runtime is not installed.
    """
    if reason := why_missing(runtime):
        raise UserError(f"measure.runtimes: {runtime} is {reason}")
    return (_onnxruntime if runtime == "onnxruntime" else _openvino)(model, threads)


def _onnxruntime(model: onnx.ModelProto, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # leave the cores to the next timing
    integers = multiplies_integers(model)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        if integers:
            options.optimized_model_filepath = str(optimized)
        else:  # dequantize weights once, at loading, instead of in each run
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(optimized).graph.node if integers else []
    integer = {node.name.partition("_token_")[0] for node in nodes if _INTEGER_OPERATOR.match(node.op_type)}

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return Session(run, lambda: _layers(model, integer))


def _layers(model: onnx.ModelProto, integer: set[str]) -> frozenset[str]:
    """Return the layers of `model` whose multiplying nodes are all in `integer`."""
    nodes = defaultdict(set)
    for node in model.graph.node:
        if node.op_type in MULTIPLIES:
            nodes[node.name.partition(CALL)[0]].add(node.name)
    return frozenset(layer for layer, names in nodes.items() if names <= integer)


def _openvino(model: onnx.ModelProto, threads: int) -> Session:
    import openvino

    compiled = OpenVino(openvino.Core().read_model(model.SerializeToString()), threads)
    return Session(compiled, lambda: _integer_layers(compiled.request(1), model))


def _integer_layers(request: Any, model: onnx.ModelProto) -> frozenset[str]:
    executed = request.get_compiled_model().get_runtime_model().get_ordered_ops()
    facts = [{key: value.value for key, value in node.get_rt_info().items()} for node in executed]
    multiplying = [fact for fact in facts if fact["layerType"] in _EXECUTED]
    integer = [fact for fact in multiplying if fact["runtimePrecision"] in ("u8", "i8")]
    nodes = [node for node in model.graph.node if node.op_type in MULTIPLIES]
    if len(integer) == len(multiplying) == len(nodes):  # a fused node may have lost its name
        return _layers(model, {node.name for node in nodes})
    # OpenVINO names some nodes after their output.
    layer_of = {output: node.name for node in model.graph.node for output in node.output}
    found = {name.partition("/")[0] for fact in integer for name in fact["originalLayersNames"].split(",")}
    return _layers(model, found | {layer_of[name] for name in found if name in layer_of})


class OpenVino:
    """An OpenVINO model (`openvino.Model`) as a function of images. Compiling it for each batch size is faster."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model, self._requests = model, dict[int, Any]()
        self._settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        # By default OpenVINO rounds floats to bfloat16 where it can, and inputs of layers with integer weights to
        # int8 at run time. Then it does not compute what the file says.
        self._settings["EXECUTION_MODE_HINT"] = "ACCURACY"

    def request(self, batch: int) -> Any:
        """Return the inference request of a batch size."""
        import openvino

        if batch not in self._requests:
            self._model.reshape([batch, *list(self._model.input(0).partial_shape)[1:]])
            compiled = openvino.Core().compile_model(self._model, "CPU", self._settings)
            self._requests[batch] = compiled.create_infer_request()
        return self._requests[batch]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of contiguous float32 images."""
        import openvino

        request = self.request(len(images))
        # Handing the images to infer() instead takes 0.25 ms more.
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())
