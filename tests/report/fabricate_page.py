"""The rest of a made-up study: what the HTML report shows beside its metrics."""

import json

import numpy as np
import torch

from quantstudy import layout
from quantstudy.data.container import Split, save_split
from quantstudy.files import save_tensors, write_json
from quantstudy.params import Params, Preprocessing
from quantstudy.report.histograms import layer_statistics
from tests.report.fabricate import fabricate

LAYERS = ("features.0", "features.3", "classifier")
IMAGES, CLASSES, BINS = 60, 5, 128
SEEN = Preprocessing(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


def fabricate_page(params: Params, study: str) -> None:
    """Write everything that the `page` stage reads of `study`, but for its sensitivity."""
    fabricate(params, study, images=IMAGES)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    images = torch.randint(256, (IMAGES, 3, 8, 8), generator=generator, dtype=torch.uint8)
    save_split(layout.split(study, "test"), Split(labels, tuple("abcde"), SEEN, images=images))
    for number, variant in enumerate(params.variants):
        predicted = labels.numpy().astype(np.int16)
        predicted[:3] = (predicted[:3] + 1) % CLASSES  # all get three images wrong, each variant one more or less
        predicted[number % 6] = (predicted[number % 6] + 1) % CLASSES if number else predicted[0]
        layout.predictions(study, variant).parent.mkdir(parents=True, exist_ok=True)
        np.save(layout.predictions(study, variant), predicted)
        details = json.loads(layout.details(study, variant).read_text())
        write_json(layout.details(study, variant), details | {"layers": _layers(variant), "runtime": "eager"})
    calibration = {"images": 32, "layers": {name: _input(scale) for scale, name in enumerate(LAYERS, start=1)}}
    save_tensors(layout.calibration(study), calibration)
    percentiles = params.outliers.percentiles
    statistics = {name: layer_statistics(layer, percentiles) for name, layer in calibration["layers"].items()}
    write_json(layout.activation_stats(study), {"images": 32, "layers": statistics})


def sensitivity_rows() -> list[dict[str, float | str]]:
    """Return the rows of a sensitivity file: every layer at 8 and at 4 bits."""
    return [
        {"layer": layer, "bits": bits, "sqnr_db": 5.0 * bits, "top1_drop": (8 - bits) * 0.3 + place}
        for place, layer in enumerate(LAYERS)
        for bits in (8, 4)
    ]


def _layers(variant: str) -> list[dict[str, object]]:
    bits = 32 if variant == "fp32" else 4 if "int4" in variant else 8
    row = {"weight": bits, "activation": bits, "real": bits != 4}
    return [
        row
        | {"name": name, "macs": 1000 * (place + 1), "bytes": 100 * bits, "sqnr_db": None if bits == 32 else 4.0 * bits}
        for place, name in enumerate(LAYERS)
    ]


def _input(scale: float) -> dict[str, object]:
    edges = torch.linspace(-3 * scale, 3 * scale, BINS + 1)
    centers = (edges[:-1] + edges[1:]) / 2
    counts = torch.exp(-((centers / scale) ** 2) / 2).double() * 1000
    return {"min": -3.0 * scale, "max": 3.0 * scale, "mean": 0.0, "std": scale, "edges": edges, "counts": counts}
