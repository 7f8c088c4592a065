"""Quantize one model file with one method, for people who want no pipeline.

The file is this project's `fp32.pth`, which says what it holds, or a state_dict, whose architecture and preprocessing
are given. The images need no labels: some calibrate, the others say how far the result agrees with the fp32 model.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from quantstudy import params as P
from quantstudy.data.archive import open_files
from quantstudy.data.batches import Batches, images_of, run_on_split
from quantstudy.data.container import Split
from quantstudy.data.images import ImageList, store
from quantstudy.errors import UserError, unknown
from quantstudy.machine.device import set_up
from quantstudy.measure.coverage import not_quantized, remark, stored
from quantstudy.measure.statistics import sqnr_db
from quantstudy.methods import registry
from quantstudy.network import models
from quantstudy.network.architectures import build, check_logits
from quantstudy.network.attention import opened_names
from quantstudy.network.checkpoint import FORMAT, load_checkpoint, load_tensors
from quantstudy.quantization.observers import collect
from quantstudy.quantization.variant import Variant, save_variant
from quantstudy.runtimes.executables import build_executable

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
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
    settings = _settings(arguments.method)
    set_up(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = _fp32_file(source, arguments, Path(folder) / "fp32.pth")
        facts, model, size = load_checkpoint(fp32), models.load_fp32(fp32), fp32.stat().st_size
        seen = models.load_preprocessing(fp32)
        print(f"{source}: {facts['architecture']}, {facts['classes']} classes, images of {seen.image_size} px")
        images, test, calibration = _images(Path(arguments.images), seen.image_size, arguments)
        variant = _quantized(model, images, seen, settings, arguments.batch_size)
        counted = stored(variant)
        layers = "{layers_quantized} of {layers_quantizable} layers in low bits, {weight_bits:.2f} bits a weight"
        print(f"{arguments.method}: {layers.format(**counted)}")
        remarks = remark(not_quantized(variant), counted["layers_quantizable"])
        remarks += _write(out, variant, facts, arguments.method, test, seen)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB, fp32 {size / 1e6:.3f} MB")
    print(_agreement(model, variant, test, seen), f"calibrated on {calibration}", sep=", ")
    for line in remarks:
        print(line)


def _settings(method: str) -> Any:
    methods = P.load_methods()
    names = [name for name, row in methods.items() if row.kind in registry.POST_TRAINING]
    if method not in names:
        raise unknown("--method", method, names)
    return methods[method]


def _fp32_file(source: Path, arguments: argparse.Namespace, place: Path) -> Path:
    """Return a file as `models.save_fp32` writes it: `source` itself, or one made of its state_dict at `place`."""
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
    values = {"image_size": 224, **IMAGENET} | {key: getattr(arguments, key) for key in given if key != "architecture"}
    seen = _preprocessing(values)
    model = _with_state(models.read_state_dict(source), source, arguments.architecture, seen.image_size)
    classes = model.get_parameter(f"{models.head_name(model)}.weight").shape[0]
    models.save_fp32(place, model, arguments.architecture, classes, seen)
    return place


def _preprocessing(values: dict[str, Any]) -> P.Preprocessing:
    try:
        return P.Preprocessing.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {first['input']}: {first['msg']}") from None


def _with_state(state: dict[str, torch.Tensor], source: Path, architecture: str, image_size: int) -> nn.Module:
    """Build the network that a state_dict is of, as many classes as its head has, and load it."""
    head = f"{models.head_name(build(architecture, 1, image_size, '--architecture'))}.weight"
    weight = opened_names(state).get(head)
    if weight is None:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {head}")
    model = build(architecture, weight.shape[0], image_size, "--architecture")
    check_logits(model, weight.shape[0], image_size, "--image-size")
    missing = models.load_state(model, state, str(source), "model", architecture).missing
    if missing:
        raise UserError(f"{source}: not of architecture {architecture}: it lacks {len(missing)} tensors, {missing[0]}")
    return model


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


def _quantized(model: nn.Module, images: Split, seen: P.Preprocessing, settings: Any, batch_size: int) -> Variant:
    batches = Batches(images, seen, batch_size, _CPU)
    calibration = collect(model, batches, P.Calibration().bins) | {"image_size": seen.image_size}
    if getattr(settings, "needs_images", False):
        calibration["images"] = images_of(images, seen, batch_size)
    return registry.quantize(model, calibration, settings)


def _write(
    out: Path, variant: Variant, facts: dict[str, Any], method: str, test: Split, seen: P.Preprocessing
) -> list[str]:
    """Write the variant in the form that the suffix of `out` says; return what to tell about an ONNX file."""
    if out.suffix == ".pth":
        save_variant(out, variant, facts, method)
        return []
    from quantstudy.measure.agreement import check
    from quantstudy.runtimes.onnx_graph import network_graph
    from quantstudy.runtimes.onnx_model import save_onnx, to_onnx

    exported = to_onnx(variant, network_graph(facts["architecture"], facts["classes"], seen.image_size))
    save_onnx(out, exported)
    found = check(copy.deepcopy(variant), exported, test, seen)
    lines = [f"{runtime} agrees with PyTorch on {share:.2f} %" for runtime, share in found["agreement"].items()]
    return [*lines, *found["remarks"]]


def _agreement(model: nn.Module, variant: Variant, test: Split, seen: P.Preprocessing) -> str:
    before, after = (
        run_on_split(executable.run, test, seen, 32, _CPU, executable.memory_format)
        for executable in (build_executable(network, "eager", _CPU) for network in (model, variant))
    )
    share = 100 * float((before.argmax(1) == after.argmax(1)).mean())
    return f"agrees with fp32 on {share:.2f} % of {len(test)} images, SQNR {sqnr_db(before, after):.1f} dB"
