"""Measure one variant of a study: accuracy, latency, memory and size, as one flat record and its details.

The executables of the variant and of fp32 are timed first, taking turns. The variant's fastest runtime, by the
sum of its medians, is the one that is reported, and accuracy is measured on that same executable, in batches of
at least the larger timed size.
"""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import Batches, run_on_split
from quantstudy.data.container import Split
from quantstudy.errors import UserError, one_line
from quantstudy.files import atomic, finite
from quantstudy.machine.device import DTYPES
from quantstudy.machine.hardware import arithmetic_is_native, describe_machine, int8_sums_saturate, remarks
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.measure.latency import Timing, time_alternately
from quantstudy.measure.memory import with_peak_memory_mb
from quantstudy.measure.operations import count_macs, tera_bit_operations
from quantstudy.measure.per_layer import LAYER_IMAGES, layer_sqnr_db, weight_storage
from quantstudy.measure.statistics import mcnemar_exact_p, sqnr_db, wilson_half_width
from quantstudy.network import models
from quantstudy.quantization.variant import load_any
from quantstudy.runtimes.executables import Executable, build_executable, worth_compiling

if TYPE_CHECKING:
    import onnx

Record = dict[str, Any]
BATCH_SIZES = (1, 16)
"""The batch sizes that are timed."""
EAGER_BATCH = 64
"""The batch size of accuracy where no graph is built for a size: a large layer's weights are read less often."""


@dataclass(frozen=True)
class Reference:
    """What a study's variants are compared with: fp32's logits [images, classes] and its arithmetic per image."""

    logits: np.ndarray
    total_macs: int
    macs: dict[str, int]
    """Multiply-accumulates by the name of the layer."""

    def save(self, path: Path) -> None:
        """Write it as plain arrays, atomically."""
        layers, counts = np.array(list(self.macs)), np.array([self.total_macs, *self.macs.values()])
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, logits=self.logits, layers=layers, macs=counts)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote; raise `UserError` when it is not there."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; evaluate the variant fp32 first")
        with np.load(path) as arrays:
            total, *counts = (int(count) for count in arrays["macs"])
            return cls(arrays["logits"], total, dict(zip(map(str, arrays["layers"]), counts, strict=True)))


@dataclass(frozen=True)
class Task:
    """What is measured, on what."""

    name: str
    study: P.Study
    variant: str
    measure: P.Measure
    device: torch.device

    @property
    def path(self) -> Path:
        """The variant's model file."""
        return layout.model(self.name, self.variant)

    def load(self, variant: str | None = None) -> nn.Module:
        """Load the variant, or another one of the study, on the CPU."""
        return load_any(layout.model(self.name, variant or self.variant))

    @functools.cached_property
    def preprocessing(self) -> P.Preprocessing:
        """What the model wants its input to be."""
        return models.load_preprocessing(self.path)

    def skeleton(self) -> nn.Module:
        """Return the fp32 network without its weights."""
        return models.skeleton_of(self.path)

    def noise(self, batch_size: int) -> Tensor:
        """Return images to time on, float32 [batch_size, 3, S, S], channels_last on the device."""
        size = self.preprocessing.image_size
        generator = torch.Generator().manual_seed(self.study.seed)
        images = torch.randn(batch_size, 3, size, size, generator=generator)
        return images.to(self.device, memory_format=torch.channels_last)

    @functools.cached_property
    def graph(self) -> "onnx.ModelProto":
        """The ONNX graph that the study's variants share."""
        from quantstudy.runtimes.onnx_graph import load_graph

        return load_graph(layout.graph(self.name))


@torch.no_grad()
def evaluate(task: Task, test: Split, reference: Reference | None) -> tuple[Record, Record, Reference]:
    """Return the metrics and the details of a variant, and its logits as a reference for others.

    `reference` is fp32's on the same images; None when the variant is fp32 itself. Call it before the process has
    computed anything, so that the memory it measures is the variant's alone.
    """
    (eager, counted, storage, left), memory = with_peak_memory_mb(lambda: _eager_after_a_batch(task), task.device)
    if reference is None:
        total_macs, macs = count_macs(task.skeleton(), task.preprocessing.image_size)
    else:
        total_macs, macs = reference.total_macs, reference.macs
    executables, baselines, failed = _executables(task, eager)
    timings = {size: _time(task, executables, baselines, size) for size in BATCH_SIZES}
    chosen = _fastest(task, executables, timings)
    logits_of = {executable.runtime: run_on_test(executable, task, test) for executable in executables}
    logits = logits_of[chosen.runtime]
    metrics = _accuracy(logits, logits if reference is None else reference.logits, test.labels.numpy())
    metrics |= _file_size(task) | counted
    metrics |= {"gmacs": total_macs / 1e9, "tbops": _tera_bit_operations(macs, chosen)}
    metrics |= _latency(task, chosen, baselines, timings)
    if memory is None:
        failed["peak_memory_mb"] = "the system does not let a process reset its peak"
    metrics |= {"kernel_real": int(chosen.real), "peak_memory_mb": finite(memory), "seed": task.study.seed}
    sqnr = {} if reference is None else _layer_sqnr(task, test)
    details = _details(task, chosen, timings, _layer_rows(chosen, macs, storage, sqnr))
    details |= {"unavailable": failed, "not_quantized": left}
    details["remarks"] += remark(left, counted["layers_quantizable"])
    details["agreement_with_eager"] = {
        runtime: 100 * float((found.argmax(1) == logits_of["eager"].argmax(1)).mean())
        for runtime, found in logits_of.items()
    }
    return metrics, details, Reference(logits, total_macs, macs)


def run_on_test(executable: Executable, task: Task, test: Split) -> np.ndarray:
    """Return the logits on the test split, in its order; every batch has one size, the last one is filled up."""
    size = EAGER_BATCH if executable.runtime == "eager" else max(BATCH_SIZES)
    return run_on_split(executable.run, test, task.preprocessing, size, task.device, executable.memory_format)


def _eager_after_a_batch(task: Task) -> tuple[Executable, Record, dict[str, tuple[int, int]], Record]:
    model = task.load()
    counted, storage, left = stored(model), weight_storage(model), not_quantized(model)
    executable = build_executable(model, "eager", task.device)
    executable.run(task.noise(max(BATCH_SIZES)))
    return executable, counted, storage, left


def _executables(task: Task, eager: Executable) -> tuple[list[Executable], list[Executable], dict[str, str]]:
    """Build the variant on every other runtime worth it, and fp32 on all if a speed-up can be reported.

    The third result names the executables that could not be built, each with its reason.
    """
    failed: dict[str, str] = {}
    built = [eager, *_others(task, task.variant, failed)]
    if task.variant == "fp32" or not any(executable.real for executable in built):
        return built, [], failed
    fp32 = build_executable(task.load("fp32"), "eager", task.device)
    return built, [fp32, *_others(task, "fp32", failed)], failed


def _others(task: Task, variant: str, failed: dict[str, str]) -> list[Executable]:
    """Build a variant on the runtimes of the params where it can be had; say in `failed` where it cannot and why."""
    found = []
    for runtime in task.measure.runtimes:
        try:
            if executable := _build(task, variant, runtime):
                for size in BATCH_SIZES:
                    executable.run(task.noise(size).contiguous(memory_format=executable.memory_format))
                found.append(executable)
        except UserError as error:
            failed[f"{variant} {runtime}"] = str(error)
        except Exception as error:  # a missing compiler, an unknown operator: many types, one meaning
            failed[f"{variant} {runtime}"] = one_line(error)
    return found


def _build(task: Task, variant: str, runtime: str) -> Executable | None:
    model = task.load(variant)
    if runtime == "inductor":
        return build_executable(model, runtime, task.device) if worth_compiling(model, task.device) else None
    if task.device.type != "cpu":
        return None
    from quantstudy.runtimes.executables import open_executable
    from quantstudy.runtimes.onnx_model import to_onnx

    return open_executable(model, to_onnx(model, task.graph), runtime)


def _fastest(task: Task, executables: list[Executable], timings: dict[int, dict[str, Timing]]) -> Executable:
    """Return the executable with the smallest sum of medians, of those whose kernels are real where there are any."""
    real = [executable for executable in executables if executable.real] or executables
    return min(real, key=lambda e: sum(timing[f"{task.variant} {e.runtime}"].median_ms for timing in timings.values()))


def _time(task: Task, executables: list[Executable], baselines: list[Executable], batch_size: int) -> dict[str, Timing]:
    noise = task.noise(batch_size)
    named = {f"{task.variant} {executable.runtime}": executable for executable in executables}
    named |= {f"fp32 {executable.runtime}": executable for executable in baselines}
    calls = {
        name: functools.partial(executable.run, noise.contiguous(memory_format=executable.memory_format))
        for name, executable in named.items()
    }
    return time_alternately(calls, task.measure.seconds * len(calls) / 2, on_cuda=task.device.type == "cuda")


def _accuracy(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> Record:
    predicted, expected = logits.argmax(1), reference.argmax(1)
    right, right_before = predicted == labels, expected == labels
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    images = len(labels)
    return {
        "top1": 100 * float(right.mean()),
        "top5": 100 * float((five == labels[:, None]).any(1).mean()),
        "top1_ci95": wilson_half_width(int(right.sum()), images),
        "top1_drop": 100 * float(right_before.mean() - right.mean()),
        "top1_drop_p": mcnemar_exact_p(right_before, right),
        "images": images,
        "agreement": 100 * float((predicted == expected).mean()),
        "sqnr_db": sqnr_db(reference, logits),
    }


def _file_size(task: Task) -> Record:
    size, fp32 = task.path.stat().st_size, layout.model(task.name, "fp32").stat().st_size
    return {"size_mb": size / 1e6, "compression": fp32 / size}


def _tera_bit_operations(macs: dict[str, int], chosen: Executable) -> float:
    weight = {name: layer.weight for name, layer in chosen.layers.items()}
    activation = {name: layer.activation for name, layer in chosen.layers.items()}
    return tera_bit_operations(macs, weight, activation)


def _latency(
    task: Task, chosen: Executable, baselines: list[Executable], timings: dict[int, dict[str, Timing]]
) -> Record:
    """Report both batch sizes on the chosen runtime; a speed-up only for a real kernel, over fp32's best runtime."""
    found: Record = {}
    for size, timing in timings.items():
        own = timing[f"{task.variant} {chosen.runtime}"].median_ms
        found[f"latency_ms_b{size}"] = own
        fp32 = [timing[f"fp32 {executable.runtime}"].median_ms for executable in baselines]
        if task.variant == "fp32":
            found[f"speedup_b{size}"] = 1.0
        else:
            found[f"speedup_b{size}"] = min(fp32) / own if chosen.real and fp32 else None
    return found


def _layer_sqnr(task: Task, test: Split) -> dict[str, float]:
    few = test.subset(range(min(LAYER_IMAGES, len(test))))
    images, _ = next(iter(Batches(few, task.preprocessing, len(few), task.device)))
    fp32, variant = (task.load(name).to(task.device) for name in ("fp32", task.variant))
    return layer_sqnr_db(fp32, variant, images.contiguous(memory_format=torch.channels_last))


def _layer_rows(
    chosen: Executable, macs: dict[str, int], storage: dict[str, tuple[int, int]], sqnr: dict[str, float]
) -> list[Record]:
    """One row a layer; `sqnr_db` is null for fp32, which is what the others are compared with."""
    return [
        {"name": name, **asdict(bits), "macs": macs[name], "bytes": storage[name][0], "sqnr_db": sqnr.get(name)}
        for name, bits in chosen.layers.items()
    ]


def _details(task: Task, chosen: Executable, timings: dict[int, dict[str, Timing]], rows: list[Record]) -> Record:
    return {
        "variant": task.variant,
        "runtime": chosen.runtime,
        "machine": describe_machine(),
        "remarks": remarks(
            task.device.type == "cuda",
            {dtype: arithmetic_is_native(dtype, "cpu") for dtype in DTYPES},
            int8_sums_saturate(),
        ),
        "kernel": {"real": chosen.real_layers, "total": len(chosen.layers), "note": _note(chosen)},
        "timings": [
            {"executable": name, "batch_size": size, **asdict(timing)}
            for size, by_name in timings.items()
            for name, timing in by_name.items()
        ],
        "layers": rows,
    }


def _note(chosen: Executable) -> str:
    if chosen.real:
        return "every layer runs in its stated type"
    simulated = len(chosen.layers) - chosen.real_layers
    return f"{simulated} of {len(chosen.layers)} layers are simulated or run in a wider type; no speed-up is reported"
