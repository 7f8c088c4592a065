"""This project's quantized models against those of the tools a user would pick instead, on one fp32 checkpoint.

    make peers STUDY=mobilenetv2_food10_224px

Tools: NNCF (post-training, on OpenVINO), ONNX Runtime's `quantize_static` (QDQ, per channel, min-max), torchao's PT2E
with `X86InductorQuantizer` (compiled by inductor), torchao's `quantize_` (linear layers, eager), and this project's
methods on its runtimes. All start from models/<study>/fp32.pth, see the same calibration images and are measured on
the same test images; each with the settings its documentation recommends for a CPU, OpenVINO always in float32 where
it does not compute in int8.

All candidates are loaded in one process and take turns; that is done three times for each batch size, and a latency is
the median of the three medians. The ratio of this project's fastest int8_static to the fastest int8 model of another
tool is given with its extremes over the three.
"""

import argparse
import copy
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from quantstudy import layout, models
from quantstudy.checkpoint import load_checkpoint
from quantstudy.data.batches import Batches
from quantstudy.data.container import Split, load_split
from quantstudy.device import set_up
from quantstudy.errors import one_line
from quantstudy.export.graph import INPUT, load_graph
from quantstudy.export.onnx_model import save_onnx, to_onnx
from quantstudy.files import write_json, write_text
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.latency import time_alternately
from quantstudy.methods.registry import quantize
from quantstudy.params import Params, load_params
from quantstudy.quantization.observers import collect
from quantstudy.quantization.variant import load_variant, save_variant
from quantstudy.report.peers import RECORD_KEYS, plot_peers, table
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.sessions import OpenVino, open_session

RUNS = 3
BATCH_SIZES = (1, 16)
METHODS = ["int8_static", "int8_dynamic", "int8_weight_only", "int4_weight_only", "int4_gptq", "int4_finetuned"]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/peers/<study>.{json,md,png}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="a row of studies whose fp32 model, data and graph are there")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each run and batch size")
    parser.add_argument("--without", nargs="*", default=[], choices=list(TOOLS), help="tools to leave out")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of this project")
    arguments = parser.parse_args(argv)
    params = load_params()
    set_up(params.study(arguments.study).seed, params.measure.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        subject = _subject(arguments.study, params, Path(folder), arguments.methods)
        candidates, failed = _candidates(subject, [tool for tool in TOOLS if tool not in arguments.without])
        _measure_accuracy(candidates, subject)
        _measure_latency(candidates, subject, arguments.seconds)
        _write(subject, candidates, {**failed, **dict.fromkeys(arguments.without, "left out of this run")})


def _subject(name: str, params: Params, folder: Path, methods: list[str]) -> Subject:
    path = layout.model(name, "fp32")
    seen = models.load_preprocessing(path)
    split = load_split(layout.split(name, "calibration"))
    images = [images for images, _ in Batches(split, seen, 16, CPU)]
    return Subject(
        name, params, models.load_fp32(path), images, load_split(layout.split(name, "test")), folder, methods
    )


def _candidates(subject: Subject, tools: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    found: list[Candidate] = []
    failed: dict[str, str] = {}
    for tool in tools:
        try:
            for candidate in TOOLS[tool](subject):
                print(f"{candidate.tool} {candidate.method} on {candidate.runtime}: {candidate.quantize_s:.1f} s")
                found.append(candidate)
        except Exception as error:  # another tool's failure is a result, not the end
            failed[tool] = one_line(error)
            print(f"{tool} failed: {failed[tool]}")
    return found, failed


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
        run(_noise(subject, batch).contiguous(memory_format=torch.channels_last))


def _noise(subject: Subject, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *subject.calibration[0].shape[1:], generator=generator)


def _measure_accuracy(candidates: list[Candidate], subject: Subject) -> None:
    seen = models.load_preprocessing(layout.model(subject.name, "fp32"))
    size = max(BATCH_SIZES)
    right = [0] * len(candidates)
    for images, labels in Batches(subject.test, seen, size, CPU):
        missing = size - len(images)
        full = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        for number, candidate in enumerate(candidates):
            logits = candidate.run(full.contiguous(memory_format=candidate.memory_format))[: len(images)]
            right[number] += int((logits.argmax(1) == labels).sum())
    for candidate, count in zip(candidates, right, strict=True):
        candidate.top1 = 100 * count / len(subject.test)


def _measure_latency(candidates: list[Candidate], subject: Subject, seconds: float) -> None:
    for batch in BATCH_SIZES:
        noise = _noise(subject, batch)
        calls = {
            str(number): functools.partial(candidate.run, noise.contiguous(memory_format=candidate.memory_format))
            for number, candidate in enumerate(candidates)
        }
        for _ in range(RUNS):
            timings = time_alternately(calls, seconds, minimum_rounds=1)
            for number, timing in timings.items():
                candidates[int(number)].latency.setdefault(batch, []).append(timing.median_ms)


def _write(subject: Subject, candidates: list[Candidate], failed: dict[str, str]) -> None:
    rows = [_record(candidate, len(subject.test)) for candidate in candidates]
    write_json(layout.peers(subject.name, "json"), rows)
    lines = [_ratio(candidates, batch) for batch in BATCH_SIZES]
    lines += [f"{tool}: {reason}." for tool, reason in failed.items()]
    lines.append(
        f"{len(subject.test)} test images, {sum(map(len, subject.calibration))} for calibration. {_versions()}."
    )
    text = table(rows) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    write_text(layout.peers(subject.name, "md"), text)
    plot_peers(layout.peers(subject.name, "png"), subject.name, rows)
    print(text)


def _record(candidate: Candidate, images: int) -> dict[str, Any]:
    latency = [statistics.median(candidate.latency[batch]) for batch in BATCH_SIZES]
    values = (candidate.tool, candidate.method, candidate.runtime, candidate.top1, images, candidate.size_mb)
    return dict(zip(RECORD_KEYS, (*values, candidate.quantize_s, *latency), strict=True))


def _ratio(candidates: list[Candidate], batch: int) -> str:
    """Compare int8_static on its best runtime with the fastest int8 model of another tool."""
    own = min(
        (c for c in candidates if (c.tool, c.method) == ("quantstudy", "int8_static")),
        key=lambda c: statistics.median(c.latency[batch]),
    )
    peers = [c for c in candidates if c.tool != "quantstudy"]
    if not peers:
        return f"batch {batch}: no other tool ran."
    peer = min(peers, key=lambda c: statistics.median(c.latency[batch]))
    ratios = sorted(a / b for a, b in zip(own.latency[batch], peer.latency[batch], strict=True))
    return (
        f"Batch {batch}: int8_static on {own.runtime} takes {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}) times as long as {peer.tool} {peer.method}, at {own.top1 - peer.top1:+.1f} points of top-1."
    )


def _versions() -> str:
    from importlib import metadata

    names = ("nncf", "onnxruntime", "openvino")
    return f"{describe_machine()}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


if __name__ == "__main__":
    main()
