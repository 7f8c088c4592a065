"""Judge a variant in the form that would be shipped: its ONNX file, made for a runtime and run there.

The judge uses validation images: images of the training split that neither trained nor calibrated. It looks at them in
an order drawn by seed, and stops as soon as it can decide.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.data.batches import run_on_split
from quantstudy.data.container import Split
from quantstudy.data.sampling import validation_indices
from quantstudy.errors import UserError
from quantstudy.measure.agreement import check
from quantstudy.measure.latency import Timing, time_calmly
from quantstudy.measure.sequential import PairedTest, images_needed
from quantstudy.quantization.layers import activation_modes
from quantstudy.runtimes.onnx_model import to_onnx
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import Session, open_session
from quantstudy.search.candidates import error_of

_LARGEST_BATCH = 64
_CPU = torch.device("cpu")


def drawn(study: P.Study, goal: P.Goal, name: str, split: Split) -> tuple[Split, Split]:
    """Return the images of the training split that judge, in the order they are looked at, and the other images.

    The judging images are the validation part of the fp32 model's training. Methods calibrate and train on the others.

    Raises:
        UserError: there are too few judging images to accept even a variant that predicts exactly as fp32 does.
    """
    key = f"studies.{name}"
    if len(split) < 2:
        raise UserError(f"{key}.data: has {len(split)} training images; a search judges on a part of them")
    rest, judging = validation_indices(split.labels, study.training.validation_fraction, study.seed)
    if (needed := images_needed(goal.max_drop, error_of("quick", goal))) > len(judging):
        raise UserError(
            f"{key}.goal.max_drop: {goal.max_drop:g} points take {needed} validation images to prove, and "
            f"{key}.training.validation_fraction: {study.training.validation_fraction} keeps {len(judging)}; raise one"
        )
    order = torch.randperm(len(judging), generator=torch.Generator().manual_seed(study.seed))
    return split.subset(judging[order]), split.subset(rest)


@dataclass
class Shipped:
    """A variant as it would be shipped."""

    exported: onnx.ModelProto
    """Made for the goal's runtime."""
    session: Session
    is_dynamic: bool
    """Whether ranges are found at run time."""


@dataclass
class Judge:
    """Everything that a study's variants are judged with."""

    model: nn.Module
    """The study's fp32 model."""
    graph: onnx.ModelProto
    """Its ONNX graph without weights."""
    preprocessing: P.Preprocessing
    images: Split
    """The validation images, shuffled."""
    goal: P.Goal
    threads: int
    """The threads of the runtime."""
    _right: dict[int, NDArray[np.bool_]] = field(default_factory=dict, init=False)
    """Whether fp32 gets the images of a look right, by the index of the first image."""

    @functools.cached_property
    def fp32(self) -> Shipped:
        """The fp32 model in the form to ship."""
        return self.shipped(self.model)

    def shipped(self, model: nn.Module) -> Shipped:
        """Return a model in the form to ship; raise `UserError` if it cannot be exported."""
        exported = exported_model(model, self.graph, self.goal.runtime)
        session = open_session(exported, self.goal.runtime, self.threads)
        return Shipped(exported, session, "dynamic" in activation_modes(model))

    def check(self, model: nn.Module, shipped: Shipped, images: Split) -> dict[str, Any]:
        """Return how the shipped form agrees with eager PyTorch; raise `UserError` if it computes something else."""
        plain = to_onnx(model, self.graph)
        timed: dict[str, onnx.ModelProto] = {self.goal.runtime: shipped.exported}
        return check(copy.deepcopy(model), plain, timed, images, self.preprocessing)

    def right(self, shipped: Shipped, images: Split) -> NDArray[np.bool_]:
        """Return whether each image is predicted correctly, bool [images]."""
        return np.asarray(self.logits(shipped, images).argmax(1) == images.labels.numpy())

    def logits(self, shipped: Shipped, images: Split) -> NDArray[np.float32]:
        """Return the logits, float32 [images, classes].

        A range that is found at run time depends on the images of its batch. Then batches are as large as the goal's,
        64 images at most. Otherwise they have 64 images, which takes a fraction of the time of single images.
        """
        size = min(self.goal.batch_size, _LARGEST_BATCH) if shipped.is_dynamic else _LARGEST_BATCH
        return run_on_split(shipped.session.run, images, self.preprocessing, size, _CPU)

    def judge(self, shipped: Shipped, error: float) -> PairedTest:
        """Test a variant against fp32; return the ended test. It accepts a drop at the limit at most `error` often."""
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

    def timed(self, variants: Mapping[str, Shipped], seconds: float) -> dict[str, Timing]:
        """Time variants and fp32 in turns, on a batch of the goal's size, for about `seconds` in all; by name."""
        images: Tensor = torch.randn(self.goal.batch_size, *self.preprocessing.shape)
        sessions = {name: each.session for name, each in ({"fp32": self.fp32} | dict(variants)).items()}
        timings, _ = time_calmly({n: functools.partial(s.run, images) for n, s in sessions.items()}, seconds)
        return timings
