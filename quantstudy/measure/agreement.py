"""Compare an ONNX model's predictions with the PyTorch model's, on every runtime that is installed."""

from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.errors import one_line
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.params import Preprocessing
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.onnx_tuning import may_saturate, quantizes_inputs
from quantstudy.runtimes.sessions import PACKAGES, open_session, why_missing

WANTED_AGREEMENT = 99.5
"""Percent of the test images; what is below is explained."""
_BATCH = 32


def check(model: nn.Module, exported: onnx.ModelProto, test: Split, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the agreement of `exported` with `model` in eager mode, percent by runtime, and remarks on what is less.

    Both see the same batches, since a range found at run time depends on them. `model` is used up.
    A runtime that is not installed, or cannot run the model, is named in `unavailable` with the reason.
    """
    agreement: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    remarks: list[str] = []
    cpu = torch.device("cpu")
    eager = build_executable(model, "eager", cpu)
    expected = run_on_split(eager.run, test, preprocessing, _BATCH, cpu, eager.memory_format).argmax(1)
    for runtime in PACKAGES:
        if reason := why_missing(runtime):
            unavailable[runtime] = reason
            continue
        try:
            run = open_session(exported, runtime, torch.get_num_threads(), tune=False).run
            logits = run_on_split(run, test, preprocessing, _BATCH, cpu)
        except Exception as error:  # whatever a runtime raises at an operator it lacks
            unavailable[runtime] = one_line(error, -1)  # OpenVINO's first line is a place in its source
            continue
        agreement[runtime] = 100 * float((logits.argmax(1) == expected).mean())
        if agreement[runtime] < WANTED_AGREEMENT:
            cause = _cause(exported)
            remarks.append(f"{runtime}: {_difference(logits, expected)}{cause and f': {cause}'}")
    remarks += [f"{runtime} {reason}" for runtime, reason in unavailable.items()]
    return {"images": len(expected), "agreement": agreement, "unavailable": unavailable, "remarks": remarks}


def _cause(exported: onnx.ModelProto) -> str:
    """Say what makes a runtime's arithmetic differ; nothing is known where no input is quantized."""
    if int8_sums_saturate() and may_saturate(exported):
        return "this CPU has no VNNI, so that sums of these weights saturate; those of saturation_free do not"
    return "codes that fall on the other side of a half in another order of sums" if quantizes_inputs(exported) else ""


def _difference(logits: np.ndarray, expected: np.ndarray) -> str:
    """Say how close the two best classes are on the images that are predicted otherwise."""
    differs = logits.argmax(1) != expected
    best = np.sort(logits, axis=1)[:, -2:]
    margins = best[:, 1] - best[:, 0]
    return (
        f"{differs.sum()} of {len(expected)} images are predicted otherwise; their two best logits lie "
        f"{np.median(margins[differs]):.3g} apart in the median, those of all images {np.median(margins):.3g}"
    )
