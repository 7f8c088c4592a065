"""Quantize one model file with one method, for people who want no pipeline.

The file is this project's `fp32.pth`, which says what it holds, or a state_dict, whose architecture and preprocessing
are given. The images need no labels: some calibrate, the others say how far the result agrees with the fp32 model.
"""

import argparse
import copy
import functools
import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from quantstudy import params as P
from quantstudy.data.archive import open_files
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import Split
from quantstudy.data.images import ImageList, store
from quantstudy.errors import UserError
from quantstudy.machine.device import set_up
from quantstudy.measure.accuracy import percent_equal
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.methods import recipes
from quantstudy.methods.calibration import Calibration
from quantstudy.network.checkpoint import FORMAT, load_checkpoint, load_tensors
from quantstudy.network.fp32 import load_fp32, load_preprocessing, save_fp32
from quantstudy.network.weights import network_of_state, read_state_dict
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import Variant
from quantstudy.runtimes.executables import build_executable
from quantstudy.runtimes.library import IMAGENET_MEAN, IMAGENET_STD, Model, post_training_row, save

OUTPUTS = (".onnx", ".pth")
_CPU = torch.device("cpu")


def quantize(arguments: argparse.Namespace) -> None:
    """Write the quantized model to `arguments.out` and print what became of it.

    Raises:
        UserError: a path, a method, an architecture or an image cannot be used.
    """
    source, out = Path(arguments.model), Path(arguments.out)
    if out.suffix not in OUTPUTS or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in one of {', '.join(OUTPUTS)}")
    settings = post_training_row(arguments.method, "--method")
    set_up(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = _fp32_file(source, arguments, Path(folder) / "fp32.pth")
        facts, model, size = load_checkpoint(fp32), load_fp32(fp32), fp32.stat().st_size
        preprocessing = load_preprocessing(fp32)
        print(f"{source}: {facts['architecture']}, {facts['classes']} classes, images of {preprocessing.image_size} px")
        images, test, drawn = _images(Path(arguments.images), preprocessing.image_size, arguments)
        calibration = Calibration(model, functools.partial(images_of, images, preprocessing, arguments.batch_size))
        variant = recipes.quantize(model, calibration, settings)
        counted = stored(variant)
        layers = "{layers_quantized} of {layers_quantizable} layers in low bits, {weight_bits:.2f} bits a weight"
        print(f"{arguments.method}: {layers.format(**counted)}")
        remarks = remark(not_quantized(variant), counted["layers_quantizable"])
        remarks += _write(out, Model(variant, facts, arguments.method), test)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, fp32 {size / 1e6:.3f} MB")
    print(_agreement(model, variant, test, preprocessing), f"calibrated on {drawn}", sep=", ")
    for line in remarks:
        print(line)


def _fp32_file(source: Path, arguments: argparse.Namespace, place: Path) -> Path:
    """Return a file as `save_fp32` writes it: `source` itself, or one made of its state_dict at `place`."""
    content = load_tensors(source)
    given = [key for key in ("architecture", "image_size", "mean", "std") if getattr(arguments, key) is not None]
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content["variant"] != "fp32":
            raise UserError(f"{source}: holds the variant {content['variant']}; give the fp32 model it was made from")
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: {source} says that itself; leave the option out")
        return source
    if arguments.architecture is None:
        raise UserError(f"{source}: a state_dict does not say its architecture; add --architecture, resnet18 for one")
    values = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    values |= {key: getattr(arguments, key) for key in given if key != "architecture"}
    try:
        preprocessing = P.Preprocessing.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['input']}: {first['msg']}") from None
    state, options = read_state_dict(source), ("--architecture", "--image-size")
    model, classes = network_of_state(state, str(source), arguments.architecture, preprocessing.image_size, options)
    save_fp32(place, model, arguments.architecture, classes, preprocessing)
    return place


def _images(path: Path, image_size: int, arguments: argparse.Namespace) -> tuple[Split, Split, str]:
    """Return the images to calibrate on and those to compare on, drawn by seed, and how many the former are in words.

    They are the same where there are no others.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = open_files(path)
    names = [name for name in files.names if name.lower().endswith(IMG_EXTENSIONS) and "/." not in f"/{name}"]
    if not names:
        raise UserError(f"--images: no images in {path}; their names end in one of {', '.join(IMG_EXTENSIONS)}")
    labels = torch.zeros(len(names), dtype=torch.int64)
    found = ImageList(labels, ("",), [f"{path}: {name}" for name in names], lambda i: files.read(names[i]))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(arguments.seed))
    calibration, rest = order[: arguments.calibration_images], order[arguments.calibration_images :]
    splits = store(found.subset(calibration), found.subset(rest if len(rest) else calibration), image_size)
    return *splits, f"{len(calibration)} others" if len(rest) else "the same"


def _write(out: Path, model: Model, test: Split) -> list[str]:
    """Write a variant in the form that the suffix of `out` says; return what to tell about an ONNX file."""
    if out.suffix == ".pth":
        save(model, out)
        return []
    from quantstudy.measure.agreement import check
    from quantstudy.runtimes.onnx_model import save_onnx, to_onnx
    from quantstudy.runtimes.onnx_tuning import exported_model
    from quantstudy.runtimes.sessions import PACKAGES

    plain = to_onnx(model.network, model.graph)
    save_onnx(out, plain)
    timed = {runtime: exported_model(model.network, model.graph, runtime) for runtime in PACKAGES}
    found = check(copy.deepcopy(model.network), plain, timed, test, model.preprocessing)
    lines = [f"{runtime} agrees with PyTorch on {share:.2f} %" for runtime, share in found["agreement"].items()]
    return [*lines, *found["remarks"]]


def _agreement(model: nn.Module, variant: Variant, test: Split, preprocessing: P.Preprocessing) -> str:
    before, after = (
        run_on_split(executable.run, test, preprocessing, 32, _CPU, executable.memory_format)
        for executable in (build_executable(network, "eager", _CPU) for network in (model, variant))
    )
    share = percent_equal(before, after)
    return f"agrees with fp32 on {share:.2f} % of {len(test)} images, SQNR {sqnr_db(before, after):.1f} dB"
