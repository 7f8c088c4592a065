"""The calibration images of a network, and their statistics, computed on first use.

Every recipe gets one `Calibration`. A method pays only for what it uses: images are decoded, and histograms and moments
are taken, on demand.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.batches import images_of
from quantstudy.data.container import load_split
from quantstudy.errors import UserError
from quantstudy.files import read_json
from quantstudy.methods.moments import Moments, input_moments
from quantstudy.network.checkpoint import load_tensors
from quantstudy.network.graph import Graph, capture
from quantstudy.quantization.observers import check_calibration, collect

Statistics = dict[str, dict[str, Any]]
"""What `observers.collect` records of each layer's input, by the layer's name."""


class Calibration:
    """Images that a network is calibrated on, and their statistics.

    Args:
        model: the fp32 network, eval mode, on the CPU.
        images: batches of float32 [N, 3, H, W], or a function that returns them.
        statistics: a function that returns the statistics of the layers' inputs; None: they are computed from `images`.
        bins: the number of bins of the histograms.
        sensitivity: a function that returns the rows of the stage `sensitivity`; methods with a budget need them.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[Tensor] | Callable[[], Sequence[Tensor]],
        statistics: Callable[[], Statistics] | None = None,
        bins: int = P.Calibration().bins,
        sensitivity: Callable[[], list[dict[str, Any]]] | None = None,
    ) -> None:
        self.model, self.bins = model, bins
        self._images, self._statistics, self._sensitivity = images, statistics, sensitivity
        self._moments: dict[str, Moments] = {}

    @functools.cached_property
    def images(self) -> list[Tensor]:
        """Batches of float32 [N, 3, H, W]."""
        return list(self._images() if callable(self._images) else self._images)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Range and histogram of each layer's input, for the layers that ran."""
        if self._statistics is None:
            batches = [(images, torch.empty(0)) for images in self.images]
            return collect(self.model, batches, self.bins)["layers"]  # type: ignore[no-any-return]
        found = self._statistics()
        if missing := set(self.replaceable) - set(found):
            raise UserError(f"calibration: no statistics of {min(missing)}; run calibrate again")
        return found

    @functools.cached_property
    def sensitivity(self) -> list[dict[str, Any]]:
        """The rows of the stage `sensitivity`."""
        assert self._sensitivity is not None, "this calibration has no sensitivity"
        return self._sensitivity()

    def moments(self, names: Collection[str]) -> dict[str, Moments]:
        """Return the moments of the named layers' inputs, each computed once; transposed convolutions have none."""
        if missing := set(names) - set(self._moments):
            self._moments |= input_moments(self.model, self.images, names=missing)
        return {name: self._moments[name] for name in names if name in self._moments}

    @functools.cached_property
    def graph(self) -> Graph:
        """The captured graph of the network on the first images."""
        return capture(self.model, self.images[0])

    @property
    def replaceable(self) -> dict[str, Any]:
        """The layers that a quantized layer can replace, by name, in the order in which they run."""
        return self.graph.plain

    def first(self, count: int) -> "Calibration":
        """Return a calibration on only the first `count` images."""
        pixels = torch.cat(self.images)[:count]
        return Calibration(self.model, list(pixels.split(len(self.images[0]))), bins=self.bins)

    def of(self, model: nn.Module) -> "Calibration":
        """Return a calibration of another network with the same layers, on the same images, with new statistics."""
        return Calibration(model, lambda: self.images, bins=self.bins, sensitivity=self._sensitivity)


def read_sensitivity(study: str) -> list[dict[str, Any]]:
    """Return the rows that the stage `sensitivity` wrote; raise `UserError` where there are none."""
    path = layout.sensitivity(study, "json")
    rows, wanted = read_json(path), {"layer", "bits", "sqnr_db", "top1_drop"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise UserError(f"{path}: no rows of layers and bits; run sensitivity again")
    return rows


def load_calibration(
    study: str, row: P.Study, model: nn.Module, preprocessing: P.Preprocessing, *, observed: bool = True
) -> Calibration:
    """Return the calibration of a study's fp32 model, from the files of its stages, each read on demand.

    Args:
        study: the study's name, which gives the paths of the files.
        row: the study's row in the params.
        model: the fp32 model.
        preprocessing: how images are prepared for the model.
        observed: whether the calling stage depends on the stage `calibrate`; if not, statistics are computed anew.
    """

    def images() -> list[Tensor]:
        split = load_split(layout.split(study, "calibration"))
        return images_of(split, preprocessing, row.calibration.batch_size)

    path = layout.calibration(study)
    statistics = (lambda: check_calibration(load_tensors(path), path, study)) if observed else None
    sensitivity = functools.partial(read_sensitivity, study)
    return Calibration(model, images, statistics, row.calibration.bins, sensitivity)
