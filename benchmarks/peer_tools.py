"""The tools that `benchmarks/peers.py` compares: what each tool gets, and how it makes quantized models.

A tool is a function from a `Subject` to its `Candidate`s. It uses the settings that its documentation recommends for a
CPU. On a CPU without VNNI, where int8 sums saturate, it also uses the settings that it offers against saturation. This
project's methods are made for the CPU that runs them, too.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy.data.container import Split
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.params import MethodRow, Params, Preprocessing
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.variant import load_variant, save_variant
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.onnx_graph import INPUT, load_graph
from quantstudy.runtimes.onnx_model import save_onnx, to_onnx
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import PACKAGES, OpenVino, open_session

BATCH_SIZES = (1, 16)
CPU = torch.device("cpu")
LOW_BITS = 4
ADAROUND_ITERATIONS = 500
UNIFORM = ", uniform"
"""The end of a method's name if all layers have the same bits, as the other tools' have."""


@dataclass
class Candidate:
    """A quantized model ready to run, and the seconds that it took to make."""

    tool: str
    method: str
    runtime: str
    run: Callable[[Tensor], Tensor]
    size_mb: float | None
    quantize_s: float
    memory_format: torch.memory_format = torch.contiguous_format
    is_simulated: bool = False
    """Whether it rounds in float32 arithmetic; its latency would then say nothing."""
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """Of the test images, [N, classes]."""
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """For each test image, whether its class was found."""
    latency: dict[int, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.tool} {self.method} on {self.runtime}"

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * float(self.right.mean())


@dataclass(frozen=True)
class Subject:
    """What every tool gets."""

    name: str
    params: Params
    fp32: nn.Module
    preprocessing: Preprocessing
    calibration: list[Tensor]
    test: Split
    folder: Path
    methods: list[str]

    @property
    def threads(self) -> int:
        """The threads of every runtime when it is timed."""
        return self.params.measure.threads or torch.get_num_threads()

    @functools.cached_property
    def onnx_path(self) -> Path:
        """The fp32 model as an ONNX file."""
        path = self.folder / "fp32.onnx"
        save_onnx(path, to_onnx(self.fp32, load_graph(layout.graph(self.name), self.name)))
        return path


def quantstudy(subject: Subject) -> Iterator[Candidate]:
    """This project's fp32, the yardstick."""
    size, proto = layout.model(subject.name, "fp32").stat().st_size / 1e6, onnx.load(subject.onnx_path)
    for runtime in PACKAGES:
        yield Candidate("quantstudy", "fp32", runtime, open_session(proto, runtime, subject.threads).run, size, 0.0)


def own_row(params: Params, method: str) -> MethodRow:
    """Return the row of a method of this project, perhaps with the end `UNIFORM`, made for this CPU."""
    found: MethodRow = params.method(method.removesuffix(UNIFORM))
    row = found.made_for("any_x86" if int8_sums_saturate() else "vnni")
    return row.model_copy(update={"fragile_bits": None}) if method.endswith(UNIFORM) else row


def own(subject: Subject, method: str) -> Iterator[Candidate]:
    """One method of this project on its runtimes."""
    settings, source = own_row(subject.params, method), layout.model(subject.name, "fp32")
    graph = load_graph(layout.graph(subject.name), subject.name)
    started = time.perf_counter()
    variant = quantize(subject.fp32, Calibration(subject.fp32, subject.calibration), settings)
    taken = time.perf_counter() - started
    path = subject.folder / f"{method}.pth"
    save_variant(path, variant, load_checkpoint(source), method)
    size, exported = path.stat().st_size / 1e6, path.with_suffix(".onnx")
    for runtime in PACKAGES:
        proto = exported_model(variant, graph, runtime)
        save_onnx(exported, proto)
        run = open_session(proto, runtime, subject.threads).run
        yield Candidate("quantstudy", method, runtime, run, exported.stat().st_size / 1e6, taken)
    if settings.kind in ("static", "dynamic"):
        eager = build_executable(variant, "eager", CPU)
        simulated = bool(quantized_layers(eager.run))  # some did not become kernels
        yield Candidate("quantstudy", method, "eager", eager.run, size, taken, eager.memory_format, simulated)
    if settings.kind == "static":
        run = build_executable(load_variant(path), "inductor", CPU).run
        _compile(subject, run)
        yield Candidate("quantstudy", method, "inductor", run, size, taken, torch.channels_last)


def nncf(subject: Subject) -> Iterator[Candidate]:
    """NNCF's post-training quantization of the OpenVINO model, with both of its presets.

    OpenVINO converts the PyTorch network directly, as its documentation recommends. In a model from ONNX each bias
    stands behind a Reshape, and NNCF's bias correction finds none.
    """
    import openvino
    from nncf import AdvancedQuantizationParameters, Dataset, OverflowFix, QuantizationPreset, quantize

    images = [image[None].numpy() for batch in subject.calibration for image in batch.contiguous()]
    mixed, first, shape = QuantizationPreset.MIXED, OverflowFix.FIRST_LAYER, subject.preprocessing.shape
    choices = [("int8 performance", QuantizationPreset.PERFORMANCE, first), ("int8 mixed", mixed, first)]
    if int8_sums_saturate():
        choices.append(("int8 mixed, overflow fix", mixed, OverflowFix.ENABLE))
    for name, preset, fix in choices:
        source = openvino.convert_model(subject.fp32, example_input=torch.zeros(1, *shape), input=[-1, *shape])
        advanced = AdvancedQuantizationParameters(overflow_fix=fix)
        started = time.perf_counter()
        model = quantize(source, Dataset(images), preset=preset, subset_size=len(images), advanced_parameters=advanced)
        taken = time.perf_counter() - started
        path = subject.folder / "nncf.xml"
        openvino.save_model(model, path)
        size = sum(part.stat().st_size for part in (path, path.with_suffix(".bin"))) / 1e6
        yield Candidate("nncf", name, "openvino", OpenVino(model, subject.threads), size, taken)


def onnxruntime(subject: Subject) -> Iterator[Candidate]:
    """ONNX Runtime's static quantization, after the preparation its documentation asks for."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(subject.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(self.batches, None)
            return None if images is None else {INPUT: images.contiguous().numpy()}

    prepared, path = subject.folder / "prepared.onnx", subject.folder / "ort.onnx"
    choices: dict[str, dict[str, Any]] = {"quantize_static": {"weight_type": QuantType.QInt8}}
    if int8_sums_saturate():
        choices["quantize_static, reduce_range"] = {"weight_type": QuantType.QInt8, "reduce_range": True}
        choices["quantize_static, U8U8"] = {"weight_type": QuantType.QUInt8}
    for name, types in choices.items():
        types |= {"activation_type": QuantType.QUInt8, "quant_format": QuantFormat.QDQ, "per_channel": True}
        started = time.perf_counter()
        quant_pre_process(str(subject.onnx_path), str(prepared))
        quantize(str(prepared), str(path), Reader(), **types)
        taken = time.perf_counter() - started
        run = open_session(onnx.load(path), "onnxruntime", subject.threads).run
        yield Candidate("onnxruntime", name, "onnxruntime", run, path.stat().st_size / 1e6, taken)


def pt2e(subject: Subject) -> Iterator[Candidate]:
    """Torchao's PT2E with the quantizer for x86, compiled by inductor with frozen weights."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config.freezing = True
    example = subject.calibration[0][:2].contiguous(memory_format=torch.channels_last)
    shapes: Any = ({0: torch.export.Dim("batch")},)
    for reduces in [False, True] if int8_sums_saturate() else [False]:
        started = time.perf_counter()
        exported = torch.export.export(copy.deepcopy(subject.fp32), (example,), dynamic_shapes=shapes, strict=True)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=reduces))
        prepared = prepare_pt2e(exported.module(), quantizer)
        for images in subject.calibration:
            prepared(images)
        converted = convert_pt2e(prepared)
        if not any("quantize_per" in str(node.target) for node in converted.graph.nodes):
            raise RuntimeError("PT2E inserted no quantize or dequantize operators")
        taken = time.perf_counter() - started
        size = _size_mb(converted, subject.folder / "pt2e.pth")
        run = torch.compile(converted, dynamic=False)
        _compile(subject, run)
        name = "pt2e x86, reduce_range" if reduces else "pt2e x86"
        yield Candidate("torchao", name, "inductor", run, size, taken, torch.channels_last)


def brevitas(subject: Subject) -> Iterator[Candidate]:
    """Brevitas's post-training flow: GPTQ, then bias correction, as in its ImageNet example."""
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as flow

    batches = [(images, torch.empty(0)) for images in subject.calibration]
    size = subject.calibration[0].shape[-1]
    source = copy.deepcopy(subject.fp32).to(memory_format=torch.contiguous_format)
    started = time.perf_counter()
    prepared = preprocess_for_quantize(source, equalize_iters=20, equalize_merge_bias=True, merge_bn=False)
    widths = {"weight_bit_width": LOW_BITS, "act_bit_width": 8, "bias_bit_width": 32, "quant_format": "int"}
    weight = {"weight_quant_granularity": "per_channel", "weight_param_method": "mse"}
    activation = {"act_quant_percentile": 99.999, "act_quant_type": "asym", "scale_factor_type": "float_scale"}
    model = flow.quantize_model(prepared, backend="fx", **widths, **weight, **activation)
    model.eval()(torch.zeros(1, 3, size, size))
    flow.calibrate(batches, model)
    flow.apply_gptq(batches, model, act_order=True, create_weight_orig=True)
    flow.apply_bias_correction(batches, model)
    taken = time.perf_counter() - started
    yield Candidate("brevitas", "GPTQ W4A8", "eager", model, None, taken, is_simulated=True)


def aimet(subject: Subject) -> Iterator[Candidate]:
    """AIMET's AdaRound, with fewer iterations per layer than its documentation uses (15,000 take hours on a CPU)."""
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config import utils
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    images, example = subject.calibration, subject.calibration[0][:1].contiguous()
    source = prepare_model(copy.deepcopy(subject.fp32).to(memory_format=torch.contiguous_format))
    forward = {"forward_fn": lambda model, batch: model(batch)}
    parameters = AdaroundParameters(images, len(images), ADAROUND_ITERATIONS, **forward)
    scheme, config = QuantScheme.post_training_tf_enhanced, utils.get_path_for_per_channel_config()
    files = {"path": str(subject.folder), "filename_prefix": "aimet", "default_config_file": config}
    started = time.perf_counter()
    with torch.enable_grad():
        grid = {"default_param_bw": LOW_BITS, "default_quant_scheme": scheme}
        rounded = Adaround.apply_adaround(source, example, parameters, **files, **grid)
    simulated = QuantizationSimModel(
        rounded, example, quant_scheme=scheme, default_output_bw=8, default_param_bw=LOW_BITS, config_file=config
    )
    simulated.set_and_freeze_param_encodings(str(subject.folder / "aimet.encodings"))
    simulated.compute_encodings(lambda model: [model(batch) for batch in images])
    taken = time.perf_counter() - started
    method = f"AdaRound W4A8, {ADAROUND_ITERATIONS} iterations"
    yield Candidate("aimet", method, "eager", simulated.model, None, taken, is_simulated=True)


TOOLS: dict[str, Callable[[Subject], Iterator[Candidate]]] = {
    tool.__name__: tool for tool in (quantstudy, nncf, onnxruntime, pt2e, brevitas, aimet)
}


def _size_mb(model: nn.Module, path: Path) -> float:
    torch.save(model.state_dict(), path)
    return path.stat().st_size / 1e6


def _compile(subject: Subject, run: Callable[[Tensor], Tensor]) -> None:
    """Call a compiled model once for each batch size: it is compiled for both, and for the threads it is timed with."""
    cores = torch.get_num_threads()
    torch.set_num_threads(subject.threads)
    try:
        for batch in BATCH_SIZES:
            run(noise(subject, batch).contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(cores)


def noise(subject: Subject, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *subject.calibration[0].shape[1:], generator=generator)
