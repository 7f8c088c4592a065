"""Quantize one model file with one method, for people who want no pipeline.

The file is this project's `fp32.pth`, which says what it holds, or a state_dict, whose architecture and preprocessing
are given. The images need no labels: some calibrate, the others say how far the result agrees with the fp32 model.
"""

import argparse
import copy
import functools
from pathlib import Path

import torch

from quantstudy.data.archive import open_files
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import Split
from quantstudy.data.images import ImageList, store
from quantstudy.errors import UserError
from quantstudy.machine.device import set_up
from quantstudy.measure.accuracy import percent_equal
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.network.checkpoint import FORMAT, load_tensors
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.runtimes import library
from quantstudy.runtimes.library import Model

OUTPUTS = (".onnx", ".pth")
_OPTIONS = ("architecture", "image_size", "mean", "std")
"""What a state_dict does not say."""
_CPU = torch.device("cpu")


def quantize(arguments: argparse.Namespace) -> None:
    """Write the quantized model to `arguments.out` and print what became of it.

    Raises:
        UserError: a path, a method, an architecture or an image cannot be used.
    """
    source, out = Path(arguments.model), Path(arguments.out)
    if out.suffix not in OUTPUTS or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in one of {', '.join(OUTPUTS)}")
    library.post_training_row(arguments.method, "--method")
    set_up(arguments.seed)
    model = _fp32(source, arguments)
    size = model.preprocessing.image_size
    print(f"{source}: {model.facts['architecture']}, {model.facts['classes']} classes, images of {size} px")
    images, test, drawn = _images(Path(arguments.images), size, arguments)
    variant = library.quantize(model, images_of(images, model.preprocessing, arguments.batch_size), arguments.method)
    counted = stored(variant.network)
    layers = "{layers_quantized} of {layers_quantizable} layers in low bits, {weight_bits:.2f} bits a weight"
    print(f"{arguments.method}: {layers.format(**counted)}")
    remarks = remark(not_quantized(variant.network), counted["layers_quantizable"]) + _write(out, variant, test)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, fp32 {source.stat().st_size / 1e6:.3f} MB")
    print(_agreement(model, variant, test), f"calibrated on {drawn}", sep=", ")
    for line in remarks:
        print(line)


def _fp32(source: Path, arguments: argparse.Namespace) -> Model:
    """Load the fp32 model: a file of this project, or a state_dict of what the options say."""
    content = load_tensors(source)
    given = {key: found for key in _OPTIONS if (found := getattr(arguments, key)) is not None}
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content["variant"] != "fp32":
            raise UserError(f"{source}: holds the variant {content['variant']}; give the fp32 model it was made from")
        if given:
            raise UserError(f"--{next(iter(given)).replace('_', '-')}: {source} says that itself; leave the option out")
    elif arguments.architecture is None:
        raise UserError(f"{source}: a state_dict does not say its architecture; add --architecture, resnet18 for one")
    try:
        return library.load_model(source, **given)
    except UserError as error:
        key, _, rest = str(error).partition(":")
        raise UserError(f"--{key.replace('_', '-')}:{rest}" if key in _OPTIONS else str(error)) from None


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
        library.save(model, out)
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


def _agreement(model: Model, variant: Model, test: Split) -> str:
    before, after = (
        run_on_split(functools.partial(library.run, each), test, each.preprocessing, 32, _CPU)
        for each in (model, variant)
    )
    share = percent_equal(before, after)
    return f"agrees with fp32 on {share:.2f} % of {len(test)} images, SQNR {sqnr_db(before, after):.1f} dB"
