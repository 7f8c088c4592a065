"""Compare an ONNX model's predictions with the PyTorch model's, on every runtime that is installed.

On each it is the form that is timed there; where that is tuned, the file as it is exported is compared too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.errors import one_line
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.measure.accuracy import percent_equal
from quantstudy.params import Preprocessing
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.onnx_tuning import AS_EXPORTED, form_of, may_saturate, quantizes_inputs
from quantstudy.runtimes.sessions import open_session, why_missing

WANTED_AGREEMENT = 99.5
"""Percent of the test images; what is below is explained."""
_BATCH = 32
_CPU = torch.device("cpu")


def check(
    model: nn.Module,
    plain: onnx.ModelProto,
    timed: Mapping[str, onnx.ModelProto],
    test: Split,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """Return the agreement of exported models with `model` in eager mode, percent by runtime, and what is less, why.

    All see the same batches, since a range found at run time depends on them. `agreement` is of the form that
    `exported` names, and `agreement_as_exported` of `plain` on the runtimes that another form is timed on. A runtime
    that is not installed, or cannot run the model, is named in `unavailable` with the reason.

    Args:
        model: it is used up.
        plain: the exported model as its file holds it.
        timed: by runtime, what is timed there (`onnx_tuning.exported_model`).
        test: the images.
        preprocessing: what the model wants them to be.
    """
    facts: dict[str, Any] = {"agreement": {}, "agreement_as_exported": {}, "exported": {}, "unavailable": {}}
    remarks: list[str] = []
    eager = build_executable(model, "eager", _CPU)
    expected = run_on_split(eager.run, test, preprocessing, _BATCH, _CPU, eager.memory_format)
    for runtime, tuned in timed.items():
        if reason := why_missing(runtime):
            facts["unavailable"][runtime] = reason
            continue
        forms = {"agreement": tuned} | ({} if form_of(tuned) == AS_EXPORTED else {"agreement_as_exported": plain})
        try:
            found = {key: _logits(exported, runtime, test, preprocessing) for key, exported in forms.items()}
        except Exception as error:  # whatever a runtime raises at an operator it lacks
            facts["unavailable"][runtime] = one_line(error, -1)  # OpenVINO's first line is a place in its source
            continue
        facts["exported"][runtime] = form_of(tuned)
        for key, logits in found.items():
            facts[key][runtime] = percent_equal(logits, expected)
            if facts[key][runtime] < WANTED_AGREEMENT:
                what = f"{runtime}, {form_of(forms[key])}: {_difference(logits, expected.argmax(1))}"
                remarks.append(what + _cause(forms[key]))
    remarks += [f"{runtime} {reason}" for runtime, reason in facts["unavailable"].items()]
    return {"images": len(expected), **facts, "remarks": remarks}


def _logits(exported: onnx.ModelProto, runtime: str, test: Split, preprocessing: Preprocessing) -> np.ndarray:
    run = open_session(exported, runtime, torch.get_num_threads()).run
    return run_on_split(run, test, preprocessing, _BATCH, _CPU)


def _cause(exported: onnx.ModelProto) -> str:
    """Say what makes a runtime's arithmetic differ; nothing is known where no input is quantized."""
    if int8_sums_saturate() and may_saturate(exported):
        return ": this CPU has no VNNI, so that sums of these weights saturate; those of saturation_free do not"
    halves = ": codes that fall on the other side of a half in another order of sums"
    return halves if quantizes_inputs(exported) else ""


def _difference(logits: np.ndarray, expected: np.ndarray) -> str:
    """Say how close the two best classes are on the images that are predicted otherwise."""
    differs = logits.argmax(1) != expected
    margins = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0]
    return (
        f"{differs.sum()} of {len(expected)} images are predicted otherwise; their two best logits lie "
        f"{np.median(margins[differs]):.3g} apart in the median, those of all images {np.median(margins):.3g}"
    )
