"""This project's quantized models against those of the tools a user would pick instead, on one fp32 checkpoint.

    make peers STUDY=mobilenetv2_food10_224px

Tools: NNCF (post-training, on OpenVINO), ONNX Runtime's `quantize_static` (QDQ, per channel, min-max), torchao's PT2E
with `X86InductorQuantizer` (compiled by inductor), Brevitas's GPTQ and AIMET's AdaRound with 4-bit weights and 8-bit
activations (simulated, so not timed), and this project's methods on its runtimes. All start from
models/<study>/fp32.pth, see the same calibration images and are measured on the same test images. Each tool has the
settings that its documentation recommends for a CPU. OpenVINO computes in float32 wherever it does not compute in int8.

All candidates are loaded in one process and take turns. This is repeated three times for each batch size, and a latency
is the median of the three medians. The report gives the latency of an int8 method of this project, on its fastest
runtime, as a ratio to the fastest int8 model of another tool, with the smallest and largest of the three ratios. Models
are quantized with all cores and timed with `measure.threads` of them. A model that fails is named, with the reason.
"""

import argparse
import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer_tools import BATCH_SIZES, CPU, TOOLS, UNIFORM, Candidate, Subject, noise, own, own_row
from quantstudy import layout
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import load_split
from quantstudy.errors import one_line, run_stage
from quantstudy.files import write_json, write_text
from quantstudy.machine.device import set_up
from quantstudy.machine.hardware import describe_machine, int8_sums_saturate
from quantstudy.measure.accuracy import percent_equal
from quantstudy.measure.latency import time_alternately
from quantstudy.measure.statistics import mcnemar_exact_p
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.report.markdown import p_value
from quantstudy.report.peers import RECORD_KEYS, plot_peers, table

RUNS = 3
COMPARED = ("int8_static", "int8_gptq", "w4a8_finetuned", f"w4a8_finetuned{UNIFORM}")
"""This project's best int8 and 4-bit methods, which are compared with each other tool."""
INT8 = COMPARED[:2]
METHODS = [*COMPARED, "int8_dynamic", "int8_weight_only", "int4_weight_only", "int4_gptq", "int4_finetuned"]


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/peers/<study>.{json,md,png}; on a CPU without VNNI, <study>_without_vnni."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="a row of studies whose fp32 model, data and graph are there")
    seconds = "of timing, for each run and batch size; 0 measures accuracy alone"
    parser.add_argument("--seconds", type=float, default=10.0, help=seconds)
    parser.add_argument("--without", nargs="*", default=[], choices=list(TOOLS), help="tools to leave out")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        help=f"of this project; `<method>{UNIFORM}` has the same bits in all layers",
    )
    arguments = parser.parse_args(argv)
    params = load_params()
    for method in arguments.methods:
        own_row(params, method)
    set_up(params.study(arguments.study).seed)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        name, path = arguments.study, layout.model(arguments.study, "fp32")
        preprocessing = load_preprocessing(path)
        images = images_of(load_split(layout.split(name, "calibration")), preprocessing, 16)
        test = load_split(layout.split(name, "test"))
        subject = Subject(name, params, load_fp32(path), preprocessing, images, test, Path(folder), arguments.methods)
        candidates, failed = _candidates(subject, [tool for tool in TOOLS if tool not in arguments.without])
        candidates = _working(candidates, failed, functools.partial(_measure_accuracy, subject))
        torch.set_num_threads(subject.threads)
        if arguments.seconds:
            candidates = _working(candidates, failed, functools.partial(_warm_up, subject))
            if timed := [candidate for candidate in candidates if not candidate.is_simulated]:
                _measure_latency(timed, subject, arguments.seconds)
        _write(subject, candidates, {**failed, **dict.fromkeys(arguments.without, "left out of this run")})


def _candidates(subject: Subject, tools: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    found: list[Candidate] = []
    failed: dict[str, str] = {}
    makers: dict[str, Any] = {}
    for tool in tools:
        makers[tool] = functools.partial(TOOLS[tool], subject)
        if tool == "quantstudy":
            makers |= {f"{tool} {method}": functools.partial(own, subject, method) for method in subject.methods}
    for name, make in makers.items():
        try:
            for candidate in make():
                print(f"{candidate.name}: {candidate.quantize_s:.1f} s")
                found.append(candidate)
        except Exception as error:  # a failure is a result, not the end
            failed[name] = one_line(error)
            print(f"{name} failed: {failed[name]}")
    return found, failed


def _working(
    candidates: list[Candidate], failed: dict[str, str], check: Callable[[Candidate], None]
) -> list[Candidate]:
    """Return the candidates that `check` runs; the reasons why it could not run the others go into `failed`."""
    found = []
    for candidate in candidates:
        try:
            check(candidate)
            found.append(candidate)
        except Exception as error:
            failed[candidate.name] = one_line(error)
            print(f"{candidate.name} failed: {failed[candidate.name]}")
    return found


def _measure_accuracy(subject: Subject, candidate: Candidate) -> None:
    given = (subject.preprocessing, max(BATCH_SIZES), CPU, candidate.memory_format)
    candidate.logits = run_on_split(candidate.run, subject.test, *given)
    candidate.right = candidate.logits.argmax(1) == subject.test.labels.numpy()


def _warm_up(subject: Subject, candidate: Candidate) -> None:
    """Run a candidate that will be timed once for each batch size."""
    for batch in () if candidate.is_simulated else BATCH_SIZES:
        candidate.run(noise(subject, batch).contiguous(memory_format=candidate.memory_format))


def _measure_latency(candidates: list[Candidate], subject: Subject, seconds: float) -> None:
    for batch in BATCH_SIZES:
        images = noise(subject, batch)
        calls = {
            str(number): functools.partial(candidate.run, images.contiguous(memory_format=candidate.memory_format))
            for number, candidate in enumerate(candidates)
        }
        for _ in range(RUNS):
            for number, timing in time_alternately(calls, seconds).items():
                candidates[int(number)].latency.setdefault(batch, []).append(timing.median_ms)


def _write(subject: Subject, candidates: list[Candidate], failed: dict[str, str]) -> None:
    name = f"{subject.name}_without_vnni" if int8_sums_saturate() else subject.name
    rows = [_record(candidate, len(subject.test)) for candidate in candidates]
    write_json(layout.peers(name, "json"), rows)
    lines = [
        _ratio(candidates, method, batch)
        for method in INT8
        for batch in BATCH_SIZES
        if any(c.method == method and c.latency for c in candidates)
    ]
    lines += _accuracy(candidates) + _faithfulness(candidates)
    lines += [f"{tool}: {reason}." for tool, reason in failed.items()]
    seen = f"{len(subject.test)} test images, {sum(map(len, subject.calibration))} for calibration"
    lines.append(f"{seen}. {_versions()}.")
    text = table(rows) + "\n" + "\n".join(f"- {line}" for line in lines) + "\n"
    write_text(layout.peers(name, "md"), text)
    if any(candidate.latency for candidate in candidates):
        plot_peers(layout.peers(name, "png"), name, rows)
    print(text)


def _record(candidate: Candidate, images: int) -> dict[str, Any]:
    latency = [statistics.median(candidate.latency[batch]) if candidate.latency else None for batch in BATCH_SIZES]
    values = (candidate.tool, candidate.method, candidate.runtime, candidate.top1, images, candidate.size_mb)
    return dict(zip(RECORD_KEYS, (*values, candidate.quantize_s, *latency), strict=True))


def _ratio(candidates: list[Candidate], method: str, batch: int) -> str:
    """Compare a method on its best runtime with the fastest int8 model of another tool."""

    def milliseconds(candidate: Candidate) -> float:
        return statistics.median(candidate.latency[batch])

    timed = [c for c in candidates if c.latency]
    own = min((c for c in timed if (c.tool, c.method) == ("quantstudy", method)), key=milliseconds)
    peer = min((c for c in timed if c.tool != "quantstudy"), key=milliseconds, default=None)
    if peer is None:
        return f"batch {batch}: no other tool ran."
    ratios = sorted(a / b for a, b in zip(own.latency[batch], peer.latency[batch], strict=True))
    return (
        f"Batch {batch}: {method} on {own.runtime} takes {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}) times as long as {peer.tool} {peer.method}, at {own.top1 - peer.top1:+.1f} points of top-1."
    )


def _accuracy(candidates: list[Candidate]) -> list[str]:
    """Compare the top-1 of `COMPARED` with each other tool's, image by image."""
    lines = []
    for method in COMPARED:
        own = [c for c in candidates if (c.tool, c.method) == ("quantstudy", method)]
        peers = [c for c in candidates if c.tool != "quantstudy" and c.is_simulated == (method not in INT8)]
        if own and peers:
            differences = ", ".join(
                f"{own[0].top1 - peer.top1:+.1f} against {peer.tool} {peer.method} "
                f"(p {p_value(mcnemar_exact_p(own[0].right, peer.right))})"
                for peer in peers
            )
            lines.append(f"Points of top-1 of {method} on {own[0].runtime}: {differences}; exact McNemar test.")
    return lines


def _faithfulness(candidates: list[Candidate]) -> list[str]:
    """Compare logits with fp32's: a few hundred images are enough for this measure, but not for top-1."""
    reference = next((c.logits for c in candidates if c.method == "fp32"), None)
    if reference is None:
        return []
    found = []
    for c in candidates:
        if c.method in COMPARED or c.tool != "quantstudy":
            same = percent_equal(c.logits, reference)
            name = c.name if c.tool == "quantstudy" else f"{c.tool} {c.method}"
            found.append(f"{name} {sqnr_db(reference, c.logits):.1f} dB, {same:.1f} %")
    return [f"SQNR of the logits against fp32's, and images given the same class: {'; '.join(found)}."]


def _versions() -> str:
    from importlib import metadata

    found = {part.metadata["Name"].lower().replace("_", "-"): part.version for part in metadata.distributions()}
    names = ("nncf", "onnxruntime", "openvino", "brevitas", "aimet-torch")
    return f"{describe_machine()}, " + ", ".join(f"{name} {found[name]}" for name in names if name in found)


if __name__ == "__main__":
    run_stage(main)
