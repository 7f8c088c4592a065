"""Measure one variant of a study: accuracy, latency, memory and size, as one flat record and its details.

The executables of the variant and of fp32 are timed first, in turns. The variant's fastest runtime, by the sum of its
medians, is reported. Accuracy is measured on this executable too, in batches of at least the larger timed size.
"""

import copy
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import Batches, run_on_split
from quantstudy.data.container import Split
from quantstudy.errors import UserError, one_line
from quantstudy.machine.device import DTYPES
from quantstudy.machine.hardware import arithmetic_is_native, describe_machine, int8_sums_saturate, remarks
from quantstudy.measure.accuracy import accuracy, percent_equal, validation_figures
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.measure.latency import Load, Timing, Timings, busy_sizes, fastest, latencies, time_calmly
from quantstudy.measure.memory import with_peak_memory_mb
from quantstudy.measure.operations import count_macs, layer_bits, tera_bit_operations
from quantstudy.measure.per_layer import LAYER_IMAGES, layer_sqnr_db, weight_storage
from quantstudy.network.fp32 import load_preprocessing
from quantstudy.quantization.layers import activation_modes
from quantstudy.quantization.sqnr import least_sqnr_db, sqnr_db
from quantstudy.quantization.variant import load_any
from quantstudy.runtimes.executables import Executable, build_executable, open_executable, unrounded, worth_compiling

if TYPE_CHECKING:
    import onnx

Record = dict[str, Any]
BATCH_SIZES = (1, 16)
"""The batch sizes that are timed."""
EAGER_BATCH = 64
"""The batch size for accuracy in eager mode, which builds no graph per size. Large batches read weights less often.

A variant that finds ranges at run time has the larger timed size on all runtimes: its results depend on the batch.
"""


@dataclass(frozen=True)
class Task:
    """The variant to measure, with its study, settings and device."""

    name: str
    study: P.Study
    variant: str
    measure: P.Measure
    device: torch.device

    @property
    def path(self) -> Path:
        """The variant's model file."""
        return layout.model(self.name, self.variant)

    def load(self, variant: str) -> nn.Module:
        """Return a copy of a variant of the study, on the CPU, that the caller may change."""
        return copy.deepcopy(self.fp32) if variant == "fp32" else load_any(layout.model(self.name, variant))

    @functools.cached_property
    def fp32(self) -> nn.Module:
        """The study's fp32 model, on the CPU: read and folded once."""
        return load_any(layout.model(self.name, "fp32"))

    @functools.cached_property
    def preprocessing(self) -> P.Preprocessing:
        """The preprocessing that the model expects."""
        return load_preprocessing(self.path)

    def noise(self, batch_size: int) -> Tensor:
        """Return random images for timing, float32 [batch_size, C, H, W], channels_last on the device."""
        generator = torch.Generator().manual_seed(self.study.seed)
        images = torch.randn(batch_size, *self.preprocessing.shape, generator=generator)
        return images.to(self.device, memory_format=torch.channels_last)

    @functools.cached_property
    def graph(self) -> "onnx.ModelProto":
        """The ONNX graph that the study's variants share."""
        from quantstudy.runtimes.onnx_graph import load_graph

        return load_graph(layout.graph(self.name), self.name)


class _Model(NamedTuple):
    """Facts of a model, read before its executable is built: that changes the model."""

    stored: Record
    bits: dict[str, tuple[int, int]]
    storage: dict[str, tuple[int, int]]
    left: Record
    method: Record
    """The settings of its method, as the params had them."""
    skipped: Record
    """Where its method could not apply a technique: technique -> layer -> reason."""
    is_dynamic: bool
    """Whether ranges are found at run time, so that results depend on the batch."""


class Logits(NamedTuple):
    """Of the images of both splits, float32 [images, classes] each."""

    test: np.ndarray
    validation: np.ndarray


@torch.no_grad()
def evaluate(task: Task, test: Split, validation: Split, reference: np.ndarray | None) -> tuple[Record, Record, Logits]:
    """Return the metrics, the details and the logits of a variant.

    `validation` may be empty. `reference` holds fp32's logits on the images of `test`, then on those of `validation`;
    it is None if the variant is fp32 itself. Call this function before the process computes anything else: then the
    measured memory is the variant's alone.
    """
    (eager, model), memory = with_peak_memory_mb(lambda: _eager_after_a_batch(task), task.device)
    total_macs, macs = count_macs(task.fp32, task.preprocessing.shape)
    executables, baselines, failed = _executables(task, eager)
    timed = {size: _time(task, executables, baselines, size) for size in BATCH_SIZES}
    timings = {size: timing for size, (timing, _) in timed.items()}
    chosen = fastest(task.variant, executables, timings)
    eager_size = max(BATCH_SIZES) if model.is_dynamic else EAGER_BATCH
    logits_of = {executable.runtime: _logits(executable, task, test, eager_size) for executable in executables}
    logits = logits_of[chosen.runtime]
    if memory is None:
        failed["peak_memory_mb"] = "the system does not let a process reset its peak"
    judged = _logits(chosen, task, validation, eager_size) if len(validation) else logits[:0]
    before, judged_before = (logits, judged) if reference is None else np.split(reference, [len(test)])
    metrics: Record = accuracy(logits, before, test.labels.numpy())
    metrics |= validation_figures(judged, judged_before, validation.labels.numpy())
    size, fp32_size = task.path.stat().st_size, layout.model(task.name, "fp32").stat().st_size
    metrics |= {"size_mb": size / 1e6, "compression": fp32_size / size} | model.stored
    metrics |= {"gmacs": total_macs / 1e9, "tbops": tera_bit_operations(macs, model.bits)}
    metrics |= latencies(task.variant, chosen, timings)
    metrics |= {"kernel_real": int(chosen.real), "peak_memory_mb": memory, "seed": task.study.seed}
    sqnr = {} if reference is None else _layer_sqnr(task, test)
    eager_logits = logits_of["eager"]
    agreement = {runtime: percent_equal(found, eager_logits) for runtime, found in logits_of.items()}
    details = _details(task, chosen, timings) | {
        "method": model.method,
        "busy": busy_sizes(task.variant, chosen, timings),
        "load": [{"batch_size": size, **asdict(load)} for size, (_, load) in timed.items()],
        "layers": _layer_rows(chosen, model, macs, sqnr),
        "unavailable": failed,
        "not_quantized": model.left,
        "skipped": model.skipped,
        "exported": {executable.runtime: executable.exported for executable in executables if executable.exported},
        "agreement_with_eager": agreement,
        "sqnr_db_with_eager": {runtime: sqnr_db(eager_logits, found) for runtime, found in logits_of.items()},
    }
    details["remarks"] += remark(model.left)
    return metrics, details, Logits(logits, judged)


def _logits(executable: Executable, task: Task, images: Split, eager_size: int) -> np.ndarray:
    size = eager_size if executable.runtime == "eager" else max(BATCH_SIZES)
    return run_on_split(executable.run, images, task.preprocessing, size, task.device, executable.memory_format)


def _eager_after_a_batch(task: Task) -> tuple[Executable, _Model]:
    model = load_any(task.path)
    facts = _Model(
        *(stored(model), layer_bits(model), weight_storage(model), not_quantized(model)),
        method=getattr(model, "method", {}),  # an fp32 model has none
        skipped=getattr(model, "skipped", {}),
        is_dynamic="dynamic" in activation_modes(model),
    )
    executable = build_executable(model, "eager", task.device)
    executable.run(task.noise(max(BATCH_SIZES)))
    return executable, facts


def _executables(task: Task, eager: Executable) -> tuple[list[Executable], list[Executable], dict[str, str]]:
    """Return the variant on each useful runtime, fp32 if a speed-up can be reported, and why other runtimes failed."""
    failed: dict[str, str] = {}
    built = [eager, *_others(task, task.variant, failed)]
    if task.variant == "fp32" or not any(executable.real for executable in built):
        return built, [], failed
    fp32 = build_executable(task.load("fp32"), "eager", task.device)
    return built, [fp32, *_others(task, "fp32", failed)], failed


def _others(task: Task, variant: str, failed: dict[str, str]) -> list[Executable]:
    """Build a variant on the runtimes of the params; note in `failed` which runtimes fail and why."""
    found = []
    for runtime in task.measure.runtimes:
        try:
            if executable := _build(task, variant, runtime):
                check_runtime(task, variant, executable)
                found.append(executable)
        except Exception as error:  # a missing compiler, an unknown operator: many types, one meaning
            failed[f"{variant} {runtime}"] = str(error) if isinstance(error, UserError) else one_line(error)
    return found


def check_runtime(task: Task, variant: str, executable: Executable) -> None:
    """Run an executable on random images of each batch size that is timed, and compare its logits with PyTorch's.

    Where int8 sums saturate nothing is judged: there runtimes compute something else, and the tables say so.

    Raises:
        UserError: the logits are further from PyTorch's than twice the error that rounding explains.
    """
    model = task.load(variant)
    exact = unrounded(model)
    for size in BATCH_SIZES:
        images = task.noise(size)
        found = executable.run(images.contiguous(memory_format=executable.memory_format)).float().cpu().numpy()
        if int8_sums_saturate() or task.device.type != "cpu":  # a GPU may round float32 to fewer bits
            continue
        best, wanted = (each(images.clone()).float().numpy() for each in (exact, model))
        least = least_sqnr_db(sqnr_db(best, wanted))
        if (sqnr := sqnr_db(wanted, found)) < least:
            what = f"computes something else: its logits of {size} images are at {sqnr:.1f} dB of PyTorch's"
            raise UserError(f"{what}, less than {least:.1f}")


def _build(task: Task, variant: str, runtime: str) -> Executable | None:
    model = task.load(variant)
    if runtime == "inductor":
        return build_executable(model, runtime, task.device) if worth_compiling(model, task.device) else None
    if task.device.type != "cpu":
        return None
    from quantstudy.runtimes.onnx_tuning import exported_model

    return open_executable(model, exported_model(model, task.graph, runtime), runtime)


def _time(
    task: Task, executables: list[Executable], baselines: list[Executable], batch_size: int
) -> tuple[dict[str, Timing], Load]:
    noise = task.noise(batch_size)
    named = [(task.variant, executable) for executable in executables] + [("fp32", given) for given in baselines]
    calls = {
        f"{name} {given.runtime}": functools.partial(given.run, noise.contiguous(memory_format=given.memory_format))
        for name, given in named
    }
    return time_calmly(calls, task.measure.seconds * len(calls) / 2, on_cuda=task.device.type == "cuda")


def _layer_sqnr(task: Task, test: Split) -> dict[str, float]:
    few = test.subset(range(min(LAYER_IMAGES, len(test))))
    images, _ = next(iter(Batches(few, task.preprocessing, len(few), task.device)))
    fp32, variant = task.fp32.to(task.device), task.load(task.variant).to(task.device)
    return layer_sqnr_db(fp32, variant, images.contiguous(memory_format=torch.channels_last))


def _layer_rows(chosen: Executable, model: _Model, macs: dict[str, int], sqnr: dict[str, float]) -> list[Record]:
    """Return one row per layer; `sqnr_db` is null for fp32, the reference."""
    return [
        {
            **{"name": name, "weight": weight, "activation": activation, "real": chosen.layers[name]},
            **{"macs": macs[name], "bytes": model.storage[name][0], "sqnr_db": sqnr.get(name)},
        }
        for name, (weight, activation) in model.bits.items()
    ]


def _details(task: Task, chosen: Executable, timings: Timings) -> Record:
    native = {dtype: arithmetic_is_native(dtype, "cpu") for dtype in DTYPES}
    real, total = sum(chosen.layers.values()), len(chosen.layers)
    wider = f"{total - real} of {total} layers are simulated or run in a wider type; no speed-up is reported"
    note = "every layer runs in its stated type" if chosen.real else wider
    return {
        "variant": task.variant,
        "runtime": chosen.runtime,
        "machine": describe_machine(),
        "remarks": remarks(task.device.type == "cuda", native, int8_sums_saturate()),
        "kernel": {"real": real, "total": total, "note": note},
        "timings": [
            {"executable": name, "batch_size": size, **asdict(timing)}
            for size, by_name in timings.items()
            for name, timing in by_name.items()
        ],
    }
