"""The tools that `benchmarks/peers.py` compares: what each is given, and how it makes a quantized model of it.

A tool is a function from a `Subject` to its `Candidate`s, in the settings its documentation recommends for a CPU.
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
from quantstudy.checkpoint import load_checkpoint
from quantstudy.data.container import Split
from quantstudy.export.graph import INPUT, load_graph
from quantstudy.export.onnx_model import save_onnx, to_onnx
from quantstudy.methods.registry import quantize
from quantstudy.params import Params
from quantstudy.quantization.observers import collect
from quantstudy.quantization.variant import load_variant, save_variant
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.sessions import OpenVino, open_session

BATCH_SIZES = (1, 16)
CPU = torch.device("cpu")


@dataclass
class Candidate:
    """A quantized model ready to run, and what it took to make."""

    tool: str
    method: str
    runtime: str
    run: Callable[[Tensor], Tensor]
    size_mb: float
    quantize_s: float
    memory_format: torch.memory_format = torch.contiguous_format
    top1: float = 0.0
    latency: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What every tool is given."""

    name: str
    params: Params
    fp32: nn.Module
    calibration: list[Tensor]
    test: Split
    folder: Path
    methods: list[str]

    @property
    def threads(self) -> int:
        """The threads of every runtime."""
        return torch.get_num_threads()

    @functools.cached_property
    def onnx_path(self) -> Path:
        """The fp32 model as an ONNX file."""
        path = self.folder / "fp32.onnx"
        save_onnx(path, to_onnx(self.fp32, load_graph(layout.graph(self.name))))
        return path


def quantstudy(subject: Subject) -> Iterator[Candidate]:
    """This project: fp32 as the yardstick, then its methods."""
    size = layout.model(subject.name, "fp32").stat().st_size / 1e6
    proto = onnx.load(subject.onnx_path)
    for runtime in ("onnxruntime", "openvino"):
        yield Candidate("quantstudy", "fp32", runtime, open_session(proto, runtime, subject.threads).run, size, 0.0)
    for method in subject.methods:
        settings = subject.params.method(method)
        started = time.perf_counter()
        needs_ranges = settings.kind == "static"
        batches = [(images, torch.empty(0)) for images in subject.calibration] if needs_ranges else []
        calibration = collect(subject.fp32, batches, 2048) if needs_ranges else {}
        calibration["images"] = subject.calibration
        variant = quantize(subject.fp32, calibration, settings)
        taken = time.perf_counter() - started
        path = subject.folder / f"{method}.pth"
        facts = load_checkpoint(layout.model(subject.name, "fp32"))
        save_variant(path, variant, facts, method)
        size = path.stat().st_size / 1e6
        proto = to_onnx(variant, load_graph(layout.graph(subject.name)))
        for runtime in ("openvino", "onnxruntime"):
            run = open_session(proto, runtime, subject.threads).run
            yield Candidate("quantstudy", method, runtime, run, size, taken)
        if settings.kind in ("static", "dynamic"):
            run = build_executable(variant, "eager", CPU).run
            yield Candidate("quantstudy", method, "eager", run, size, taken, torch.channels_last)
        if settings.kind == "static":
            run = build_executable(load_variant(path), "inductor", CPU).run
            _compile(subject, run)
            yield Candidate("quantstudy", method, "inductor", run, size, taken, torch.channels_last)


def nncf(subject: Subject) -> Iterator[Candidate]:
    """NNCF's post-training quantization of the OpenVINO model, with both of its presets."""
    import openvino
    from nncf import Dataset, QuantizationPreset, quantize

    images = [image[None].numpy() for batch in subject.calibration for image in batch.contiguous()]
    for preset in (QuantizationPreset.PERFORMANCE, QuantizationPreset.MIXED):
        source = openvino.Core().read_model(subject.onnx_path)
        started = time.perf_counter()
        model = quantize(source, Dataset(images), preset=preset, subset_size=len(images))
        taken = time.perf_counter() - started
        path = subject.folder / "nncf.xml"
        openvino.save_model(model, path)
        size = sum(part.stat().st_size for part in (path, path.with_suffix(".bin"))) / 1e6
        name = f"int8 {preset.value}"
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
    started = time.perf_counter()
    quant_pre_process(str(subject.onnx_path), str(prepared))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    taken = time.perf_counter() - started
    run = open_session(onnx.load(path), "onnxruntime", subject.threads).run
    yield Candidate("onnxruntime", "quantize_static", "onnxruntime", run, path.stat().st_size / 1e6, taken)


def pt2e(subject: Subject) -> Iterator[Candidate]:
    """Torchao's PT2E with the quantizer for x86, compiled by inductor with frozen weights."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config.freezing = True
    started = time.perf_counter()
    example = subject.calibration[0][:2].contiguous(memory_format=torch.channels_last)
    shapes: Any = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(copy.deepcopy(subject.fp32), (example,), dynamic_shapes=shapes, strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for images in subject.calibration:
        prepared(images)
    converted = convert_pt2e(prepared)
    nodes = sum("quantize_per" in str(node.target) for node in converted.graph.nodes)
    if not nodes:
        raise RuntimeError("PT2E inserted no quantize or dequantize operators")
    taken = time.perf_counter() - started
    size = _size_mb(converted, subject.folder / "pt2e.pth")
    run = torch.compile(converted, dynamic=False)
    _compile(subject, run)
    yield Candidate("torchao", "pt2e x86", "inductor", run, size, taken, torch.channels_last)


def torchao(subject: Subject) -> Iterator[Candidate]:
    """Torchao's one-line API: it takes linear layers only."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()):
        model = copy.deepcopy(subject.fp32)
        started = time.perf_counter()
        quantize_(model, config)
        taken = time.perf_counter() - started
        name = f"quantize_ {type(config).__name__.removesuffix('Config')}"
        size = _size_mb(model, subject.folder / "torchao.pth")
        yield Candidate("torchao", name, "eager", model, size, taken, torch.channels_last)


TOOLS: dict[str, Callable[[Subject], Iterator[Candidate]]] = {
    "quantstudy": quantstudy,
    "nncf": nncf,
    "onnxruntime": onnxruntime,
    "pt2e": pt2e,
    "torchao": torchao,
}


def _size_mb(model: nn.Module, path: Path) -> float:
    torch.save(model.state_dict(), path)
    return path.stat().st_size / 1e6


def _compile(subject: Subject, run: Callable[[Tensor], Tensor]) -> None:
    """Call a compiled model once for each batch size, so that it is compiled for both."""
    for batch in BATCH_SIZES:
        run(noise(subject, batch).contiguous(memory_format=torch.channels_last))


def noise(subject: Subject, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *subject.calibration[0].shape[1:], generator=generator)
