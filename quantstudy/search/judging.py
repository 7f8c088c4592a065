"""Judge a variant in the form that would be shipped: its ONNX file, made for a runtime and run there.

It is judged on validation images: images of the training split that neither trained nor calibrated. They are looked at
in an order drawn by seed, and no more of them than a decision takes.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.data.sampling import calibration_indices, validation_indices
from quantstudy.errors import UserError
from quantstudy.measure.agreement import check
from quantstudy.measure.latency import Timing, time_calmly
from quantstudy.measure.sequential import LOOKS, PairedTest
from quantstudy.runtimes.onnx_model import to_onnx
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import Session, open_session

_BATCH = 16
_CPU = torch.device("cpu")
FEWEST = 2 * LOOKS
"""Validation images without which nothing can be sure."""


def drawn(study: P.Study, goal: P.Goal, name: str, split: Split) -> tuple[Split, Split]:
    """Return the images of the training split that judge, in the order they are looked at, and those that calibrate.

    The former are in the validation part of the fp32 model's training, and of that of methods if they are tried; the
    latter are in none, as many as the study's calibration has.

    Raises:
        UserError: the former are fewer than `FEWEST`, or the latter than they should be.
    """
    key = f"studies.{name}"
    if len(split) < 2:
        raise UserError(f"{key}.data: has {len(split)} training images; a search judges on a part of them")
    fractions = [study.training.validation_fraction] + [study.qat.validation_fraction] * goal.may_train
    parts = [set(validation_indices(split.labels, fraction, study.seed)[1].tolist()) for fraction in fractions]
    judging = torch.tensor(sorted(set.intersection(*parts)))
    rest = torch.tensor(sorted(set(range(len(split))) - set.union(*parts)))
    if len(judging) < FEWEST:
        raise UserError(
            f"{key}.training.validation_fraction: {study.training.validation_fraction} leaves {len(judging)} images, "
            f"of {FEWEST} that a search needs; raise it"
        )
    order = torch.randperm(len(judging), generator=torch.Generator().manual_seed(study.seed))
    calibrating = rest[calibration_indices(len(rest), study.calibration, study.seed, name)]
    return split.subset(judging[order]), split.subset(calibrating)


@dataclass
class Shipped:
    """A variant as it would be shipped."""

    exported: onnx.ModelProto
    """Made for the goal's runtime."""
    session: Session


class Judge:
    """What variants of a study are judged with.

    Args:
        fp32: the study's fp32 model.
        graph: its ONNX graph without weights.
        preprocessing: what both want their input to be.
        images: the validation images, shuffled.
        goal: the limit, the runtime.
        threads: of the runtime.
    """

    def __init__(
        self,
        fp32: nn.Module,
        graph: onnx.ModelProto,
        preprocessing: P.Preprocessing,
        images: Split,
        goal: P.Goal,
        threads: int,
    ) -> None:
        self.graph, self.preprocessing, self.images, self.goal, self.threads = (
            graph,
            preprocessing,
            images,
            goal,
            threads,
        )
        self._fp32 = fp32
        self._right: dict[int, NDArray[np.bool_]] = {}

    @functools.cached_property
    def fp32(self) -> Shipped:
        """The fp32 model in the form that it would be shipped in."""
        return self.shipped(self._fp32)

    def shipped(self, model: nn.Module) -> Shipped:
        """Return a model in that form; raise `UserError` where it cannot be exported."""
        exported = exported_model(model, self.graph, self.goal.runtime)
        return Shipped(exported, open_session(exported, self.goal.runtime, self.threads))

    def check(self, model: nn.Module, shipped: Shipped, images: Split) -> dict[str, Any]:
        """Return how the shipped form agrees with eager PyTorch; raise `UserError` where it computes something else."""
        plain = to_onnx(model, self.graph)
        timed: dict[str, onnx.ModelProto] = {self.goal.runtime: shipped.exported}
        return check(copy.deepcopy(model), plain, timed, images, self.preprocessing)

    def right(self, shipped: Shipped, images: Split) -> NDArray[np.bool_]:
        """Return whether each image is given its class, bool [images]."""
        return np.asarray(self.logits(shipped, images).argmax(1) == images.labels.numpy())

    def logits(self, shipped: Shipped, images: Split) -> NDArray[np.float32]:
        """Return the logits, float32 [images, classes]."""
        return run_on_split(shipped.session.run, images, self.preprocessing, _BATCH, _CPU)

    def judge(self, shipped: Shipped, error: float) -> PairedTest:
        """Return the ended test of a variant against fp32, which accepts a drop at the limit with this probability."""
        test = PairedTest(self.goal.max_drop, len(self.images), error)
        for end in test.ends:
            start = test.seen
            part = self.images.subset(torch.arange(start, end))
            if start not in self._right:
                self._right[start] = self.right(self.fp32, part)
            test.look(self._right[start], self.right(shipped, part))
            if test.verdict:
                break
        return test

    def timed(self, shipped: Shipped, seconds: float) -> tuple[Timing, Timing]:
        """Time a batch of the goal's size of a variant and of fp32, taking turns, for about `seconds` in all."""
        images: Tensor = torch.randn(self.goal.batch_size, *self.preprocessing.shape)
        calls = {
            "variant": functools.partial(shipped.session.run, images),
            "fp32": functools.partial(self.fp32.session.run, images),
        }
        timings, _ = time_calmly(calls, seconds)
        return timings["variant"], timings["fp32"]
