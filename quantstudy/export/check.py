"""Compare an ONNX model's predictions with the PyTorch model's, on every runtime that is installed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from quantstudy.data.batches import Batches
from quantstudy.data.container import Split
from quantstudy.params import Preprocessing
from quantstudy.runtimes.executables import build_executable
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
    eager = build_executable(model, "eager", torch.device("cpu"))
    expected = _logits(eager.run, test, preprocessing, eager.memory_format).argmax(1)
    for runtime in PACKAGES:
        if reason := why_missing(runtime):
            unavailable[runtime] = reason
            continue
        try:
            logits = _logits(open_session(exported, runtime, torch.get_num_threads()).run, test, preprocessing)
        except Exception as error:  # whatever a runtime raises at an operator it lacks
            unavailable[runtime] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[-1][:200]}"
            continue
        agreement[runtime] = 100 * float((logits.argmax(1) == expected).mean())
        if agreement[runtime] < WANTED_AGREEMENT:
            remarks.append(f"{runtime}: {_why(logits, expected)}")
    remarks += [f"{runtime} {reason}" for runtime, reason in unavailable.items()]
    return {"images": len(expected), "agreement": agreement, "unavailable": unavailable, "remarks": remarks}


@torch.no_grad()
def _logits(
    run: Callable[[Tensor], Tensor],
    test: Split,
    preprocessing: Preprocessing,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> np.ndarray:
    batches = Batches(test, preprocessing, _BATCH, "cpu")
    return np.concatenate([run(images.contiguous(memory_format=memory_format)).numpy() for images, _ in batches])


def _why(logits: np.ndarray, expected: np.ndarray) -> str:
    """Say how close the two best classes are on the images that are predicted otherwise."""
    differs = logits.argmax(1) != expected
    best = np.sort(logits, axis=1)[:, -2:]
    margins = best[:, 1] - best[:, 0]
    return (
        f"{differs.sum()} of {len(expected)} images are predicted otherwise; their two best logits lie "
        f"{np.median(margins[differs]):.3g} apart in the median, those of all images {np.median(margins):.3g}: "
        "codes that fall on the other side of a half in another order of sums"
    )
