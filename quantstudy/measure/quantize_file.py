"""Quantize one model file with one method, for people who want no pipeline.

The file is this project's `fp32.pth`, which names its architecture and preprocessing, or a state_dict, for which you
give both. The images need no labels: some calibrate, the others measure how far the result agrees with the fp32 model.
"""

import argparse
import copy
import functools
from pathlib import Path

import torch

from quantstudy.data.archive import open_files
from quantstudy.data.batches import images_of, run_on_split
from quantstudy.data.container import Split
from quantstudy.data.folder import images_below
from quantstudy.data.images import ImageList, store
from quantstudy.errors import UserError
from quantstudy.machine.device import set_up
from quantstudy.measure.accuracy import percent_equal
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.params import Preprocessing
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.quantization.variant import Variant, left_out
from quantstudy.runtimes import library
from quantstudy.runtimes.library import Model

OUTPUTS = (".onnx", ".pth")
_OPTIONS = ("architecture", "preprocessing", "image_size", "mean", "std", "weights_key")
"""The options for facts that a state_dict does not hold."""
_CPU = torch.device("cpu")


def quantize(arguments: argparse.Namespace) -> None:
    """Write the quantized model to `arguments.out` and print its layers, size and agreement.

    Raises:
        UserError: a path, a method, an architecture or an image cannot be used.
    """
    source, out = Path(arguments.model), Path(arguments.out)
    if out.suffix not in OUTPUTS or out.resolve() == source.resolve():
        raise UserError(f"--out: {str(out)!r}: name another file that ends in one of {', '.join(OUTPUTS)}")
    library.post_training_row(arguments.method, "--method")
    set_up(arguments.seed)
    model = _fp32(source, arguments)
    height, width = model.preprocessing.size
    size = f"{height}" if height == width else f"{height} by {width}"
    print(f"{source}: {model.facts['architecture']}, {model.facts['classes']} classes, images of {size} px")
    images, test, drawn = _images(Path(arguments.images), model.preprocessing, arguments)
    variant = library.quantize(model, images_of(images, model.preprocessing, arguments.batch_size), arguments.method)
    counted = stored(variant.network)
    layers = "{layers_quantized} of {layers_quantizable} layers in low bits, {weight_bits:.2f} bits a weight"
    print(f"{arguments.method}: {layers.format(**counted)}")
    skipped = variant.network.skipped if isinstance(variant.network, Variant) else {}
    agreement = _agreement(model, variant, test)
    remarks = left_out(skipped) + remark(not_quantized(variant.network)) + _write(out, variant, test)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, fp32 {_fp32_bytes(model) / 1e6:.3f} MB")
    print(agreement, f"calibrated on {drawn}", sep=", ")
    for line in remarks:
        print(line)


def _fp32(source: Path, arguments: argparse.Namespace) -> Model:
    """Load the fp32 model: a file of this project, or a state_dict that the options describe."""
    try:
        model = library.load_model(source, **{key: getattr(arguments, key) for key in _OPTIONS})
    except UserError as error:
        key, _, rest = str(error).partition(":")
        raise UserError(f"--{key.replace('_', '-')}:{rest}" if key in _OPTIONS else str(error)) from None
    if model.variant != "fp32":
        raise UserError(f"{source}: holds the variant {model.variant}; give the fp32 model it was made from")
    return model


def _fp32_bytes(model: Model) -> int:
    """Return how many bytes the numbers of an fp32 model take; its file may hold more, an optimizer's state too."""
    return sum(4 * tensor.numel() for tensor in model.network.state_dict().values() if tensor.is_floating_point())


def _images(path: Path, preprocessing: Preprocessing, arguments: argparse.Namespace) -> tuple[Split, Split, str]:
    """Return the images to calibrate on, the images to compare on, and words that say what the former are.

    The images are drawn by seed. If all of them calibrate, the same images compare.
    """
    files = open_files(path)
    names = images_below(path, files, "--images")
    labels = torch.zeros(len(names), dtype=torch.int64)
    found = ImageList(labels, ("",), [f"{path}: {name}" for name in names], lambda i: files.read(names[i]))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(arguments.seed))
    calibration, rest = order[: arguments.calibration_images], order[arguments.calibration_images :]
    lists = [found.subset(calibration), found.subset(rest if len(rest) else calibration)]
    images, test = store(lists, preprocessing)
    return images, test, f"{len(calibration)} others" if len(rest) else "the same"


def _write(out: Path, model: Model, test: Split) -> list[str]:
    """Write a variant as .pth or .onnx, by the suffix of `out`; return lines to print about an ONNX file."""
    if out.suffix == ".pth":
        library.save(model, out)
        return []
    from quantstudy.measure.agreement import check
    from quantstudy.runtimes.onnx_model import described, save_onnx, to_onnx
    from quantstudy.runtimes.onnx_tuning import exported_model
    from quantstudy.runtimes.sessions import PACKAGES

    plain = to_onnx(model.network, model.graph)
    timed = {runtime: exported_model(model.network, model.graph, runtime) for runtime in PACKAGES}
    found = check(copy.deepcopy(model.network), plain, timed, test, model.preprocessing)
    save_onnx(out, described(plain, model.facts))
    shares = found["agreement"].items()
    lines = [
        f"{name} agrees with PyTorch on {share:.2f} %, SQNR {found['sqnr_db'][name]:.1f} dB" for name, share in shares
    ]
    return [*lines, *found["remarks"]]


def _agreement(model: Model, variant: Model, test: Split) -> str:
    before, after = (
        run_on_split(functools.partial(library.run, each), test, each.preprocessing, 32, _CPU)
        for each in (model, variant)
    )
    share = percent_equal(before, after)
    return f"agrees with fp32 on {share:.2f} % of {len(test)} images, SQNR {sqnr_db(before, after):.1f} dB"
