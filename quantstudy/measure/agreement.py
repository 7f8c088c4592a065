"""Judge an exported model: compare its logits on every installed runtime with those of eager PyTorch.

Each runtime runs the form that is timed there. If this form is tuned, the file as exported is judged too. The allowed
error is a thousandth (60 dB) plus twice the error that rounding explains: the distance between eager mode and the same
weights in float64 with activations that are not rounded. So a variant with quantized weights alone must reach 60 dB,
while in an integer network values may fall on the other side of a code's half.

The check judges the part of the logits that differs between images. If rounding moves the logits by more than this
part, the check judges the whole logits, and a remark says so. A form that may saturate on this CPU is compared and
reported, but not judged.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.errors import UserError, one_line
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.measure.accuracy import percent_equal
from quantstudy.params import Preprocessing
from quantstudy.quantization.layers import activation_modes
from quantstudy.quantization.sqnr import least_sqnr_db, sqnr_db
from quantstudy.runtimes.executables import build_executable, unrounded
from quantstudy.runtimes.onnx_tuning import AS_EXPORTED, form_of, may_saturate
from quantstudy.runtimes.sessions import open_session, why_missing

WANTED_AGREEMENT = 99.5
"""Percent of the test images. A remark explains an agreement below it."""
NOISE_DB, MANY = 3.0, 8
"""The SQNR below which logits are noise, and the number of images whose mean tells what all logits share."""
_BATCH = 32
_GROSS_DB = 10.0
"""What `MANY` images, run one by one, must reach: a runtime may pick other kernels for a batch of one."""
_CPU = torch.device("cpu")


def check(
    model: nn.Module,
    plain: onnx.ModelProto,
    timed: Mapping[str, onnx.ModelProto],
    test: Split,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """Return by runtime how exported models agree with `model` in eager mode, and remarks on every low agreement.

    All runtimes see the same batches, since a range found at run time depends on them. `agreement` (the percent of
    equal classes) and `sqnr_db` (of the logits) are of the form that `exported` names. The same keys with
    `_as_exported` are of `plain`, on runtimes where another form is timed. `least_sqnr_db` is what each form must
    reach. `unavailable` names each runtime that is not installed, cannot run the model or computes something
    else, with the reason.

    Args:
        model: this function changes it; do not use it again.
        plain: the exported model as in its file.
        timed: by runtime, the form that is timed there (`onnx_tuning.exported_model`).
        test: the images.
        preprocessing: the preprocessing that the model expects.

    Raises:
        UserError: an int8 kernel of eager mode computes something else, or runtimes are installed and none of them can
            run the model and computes the same.
    """
    facts: dict[str, Any] = {"agreement": {}, "agreement_as_exported": {}, "sqnr_db": {}, "sqnr_db_as_exported": {}}
    facts |= {"exported": {}, "unavailable": {}}
    remarks: list[str] = []
    simulated, is_rounded = copy.deepcopy(model), bool(activation_modes(model) - {"none"})
    eager = build_executable(model, "eager", _CPU)
    expected = run_on_split(eager.run, test, preprocessing, _BATCH, _CPU, eager.memory_format)
    few = test.subset(range(min(MANY, len(test))))
    alone = run_on_split(eager.run, few, preprocessing, 1, _CPU, eager.memory_format)
    measure, least = _bound(simulated, expected, test, preprocessing)
    facts["least_sqnr_db"] = least
    if measure is sqnr_db:
        remarks.append("rounding moves logits by more than they differ between images: judged with what all share")
    for runtime, tuned in timed.items():
        if reason := why_missing(runtime):
            facts["unavailable"][runtime] = reason
            continue
        forms = {"agreement": tuned} | ({} if form_of(tuned) == AS_EXPORTED else {"agreement_as_exported": plain})
        try:
            found = {key: _logits(exported, runtime, test, few, preprocessing) for key, exported in forms.items()}
        except UserError:
            raise
        except Exception as error:  # a runtime that lacks an operator may raise anything
            facts["unavailable"][runtime] = one_line(error, -1)  # OpenVINO's first line is a place in its source
            continue
        for key, (logits, single) in found.items():
            if int8_sums_saturate() and may_saturate(forms[key]):
                continue
            for batch, sqnr, limit in (
                (_BATCH, measure(expected, logits), least),
                (1, measure(alone, single), min(least, _GROSS_DB)),
            ):
                if sqnr < limit:
                    what = f"makes logits of it, {form_of(forms[key])}, at {sqnr:.1f} dB of eager PyTorch's"
                    facts["unavailable"][runtime] = f"{what} in batches of {batch}, less than {limit:.1f}"
        if runtime in facts["unavailable"]:
            continue
        facts["exported"][runtime] = form_of(tuned)
        for key, (logits, _) in found.items():
            facts[key][runtime] = percent_equal(logits, expected)
            sqnr = measure(expected, logits)
            facts[key.replace("agreement", "sqnr_db")][runtime] = round(sqnr, 2)  # more digits depend on the threads
            if facts[key][runtime] < WANTED_AGREEMENT:
                what = f"{runtime}, {form_of(forms[key])}: {_difference(logits, expected.argmax(1))}"
                remarks.append(what + _cause(forms[key], is_rounded))
    remarks += [f"{runtime} {reason}" for runtime, reason in facts["unavailable"].items()]
    failed = [runtime for runtime in facts["unavailable"] if not why_missing(runtime)]
    if failed and not facts["exported"]:
        what = f"no installed runtime can run the model: {failed[0]}: {facts['unavailable'][failed[0]]}"
        raise UserError(f"export: {what}; nothing is written")
    return {"images": len(expected), **facts, "remarks": remarks}


def centered_sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the SQNR of the part of the logits that differs between images: a shared bias would hide errors."""
    mean = reference.mean(0, dtype=np.float64) if len(reference) >= MANY else 0.0
    return sqnr_db(reference - mean, other - mean)


def _bound(
    model: nn.Module, expected: np.ndarray, test: Split, preprocessing: Preprocessing
) -> tuple[Callable[[np.ndarray, np.ndarray], float], float]:
    """Return a measure, and the least value that an exported model's logits must reach against eager mode's `expected`.

    To find it, the first images of `test` run through the simulated `model`, and through the same weights in float64
    with activations that are not rounded.

    Raises:
        UserError: eager mode's kernels compute something else than the simulation.
    """
    few = test.subset(range(min(2 * _BATCH, len(test))))
    wanted, found = (
        run_on_split(each.eval(), few, preprocessing, _BATCH, _CPU, torch.channels_last)
        for each in (unrounded(model), model)
    )
    varying = found - found.mean(0) if len(found) >= MANY else found
    share = float(np.linalg.norm(found)) / max(float(np.linalg.norm(varying)), 1e-30)
    for measure, scale in ((centered_sqnr_db, share), (sqnr_db, 1.0)):
        if (least := least_sqnr_db(measure(found, wanted), scale)) >= NOISE_DB:
            break
    if (sqnr := measure(found, expected[: len(few)])) < least:
        raise UserError(f"eager: int8 kernels are at {sqnr:.1f} dB of their simulation, less than {least:.1f}")
    return measure, least


def _logits(
    exported: onnx.ModelProto, runtime: str, test: Split, few: Split, preprocessing: Preprocessing
) -> tuple[np.ndarray, np.ndarray]:
    """Return a runtime's logits of all images, and of a few that it runs one by one."""
    run = open_session(exported, runtime, torch.get_num_threads()).run
    return run_on_split(run, test, preprocessing, _BATCH, _CPU), run_on_split(run, few, preprocessing, 1, _CPU)


def _cause(exported: onnx.ModelProto, is_rounded: bool) -> str:
    """Say why a runtime's arithmetic differs; if no activation is rounded, the cause is not known."""
    if int8_sums_saturate() and may_saturate(exported):
        return ": this CPU has no VNNI, so that sums of these weights saturate; those of saturation_free do not"
    return ": codes that fall on the other side of a half in another order of sums" if is_rounded else ""


def _difference(logits: np.ndarray, expected: np.ndarray) -> str:
    """Say how close the two best classes are on the images whose predictions differ."""
    differs = logits.argmax(1) != expected
    margins = np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0]
    return (
        f"{differs.sum()} of {len(expected)} images are predicted otherwise; their two best logits lie "
        f"{np.median(margins[differs]):.3g} apart in the median, those of all images {np.median(margins):.3g}"
    )
