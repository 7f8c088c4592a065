"""The Python interface of `import quantstudy`: load a model, quantize it, run it, save it and export it."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.errors import UserError, one_line, unknown
from quantstudy.machine.hardware import int8_sums_saturate
from quantstudy.methods import recipes
from quantstudy.methods.calibration import Calibration
from quantstudy.network.architectures import check_logits, is_own
from quantstudy.network.checkpoint import FORMAT, load_checkpoint, load_tensors
from quantstudy.network.folding import channels_last, fold_batchnorm
from quantstudy.network.fp32 import network_facts, new_facts, skeleton
from quantstudy.network.weights import network_of_state, read_state_dict
from quantstudy.quantization.sqnr import least_sqnr_db, sqnr_db
from quantstudy.quantization.variant import Variant, load_any, save_variant
from quantstudy.runtimes.executables import Executable, build_executable, open_executable, unrounded

if TYPE_CHECKING:
    import onnx

RUNTIMES = ("eager", "inductor", "onnxruntime", "openvino")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue, for pixels from 0 to 1."""


class Model:
    """A network, fp32 with BatchNorm folded or a `Variant`, and the facts in its file.

    Attributes:
        network: maps float32 images [N, C, H, W], normalized with the `preprocessing`, to float32 logits [N, classes].
        facts: `architecture`, `classes`, `preprocessing` and perhaps `class_names`, as in the file.
        variant: the method that quantized the network, or fp32.
    """

    def __init__(self, network: nn.Module, facts: dict[str, Any], variant: str = "fp32") -> None:
        self.network, self.facts, self.variant = network.eval(), facts, variant
        self._executables: dict[tuple[str, torch.device], Executable] = {}

    @property
    def preprocessing(self) -> P.Preprocessing:
        """The preprocessing that the model expects."""
        return P.Preprocessing.model_validate(self.facts["preprocessing"])

    @functools.cached_property
    def graph(self) -> "onnx.ModelProto":
        """The ONNX graph of the architecture, without weights."""
        from quantstudy.runtimes.onnx_graph import graph_of

        shape, network = self.preprocessing.shape, self.network
        if isinstance(network, Variant):
            names = network.network.state_dict().keys()
            network = skeleton(self.facts["architecture"], self.facts["classes"], shape, names)
        return graph_of(network, shape)

    def executable(self, runtime: str, device: torch.device) -> Executable:
        """Return the model ready to run on a runtime of `RUNTIMES`; it is built once per runtime and device."""
        if runtime not in RUNTIMES:
            raise unknown("runtime", runtime, RUNTIMES)
        if (runtime, device) in self._executables:
            return self._executables[runtime, device]
        if runtime in ("eager", "inductor"):
            made = build_executable(copy.deepcopy(self.network), runtime, device)
        else:
            from quantstudy.runtimes.onnx_tuning import exported_model, may_saturate
            from quantstudy.runtimes.sessions import why_missing

            if reason := why_missing(runtime):
                raise UserError(f"runtime: {runtime!r} cannot be used: {reason}")
            exported = exported_model(self.network, self.graph, runtime)
            try:
                made = open_executable(self.network, exported, runtime)
                if not (int8_sums_saturate() and may_saturate(exported)):
                    self._judge(made, runtime)
            except RuntimeError as error:  # the runtime lacks an operator
                raise UserError(f"{runtime} cannot run the model: {one_line(error, -1)}") from None
        return self._executables.setdefault((runtime, device), made)

    @functools.cached_property
    def _wanted(self) -> tuple[Tensor, np.ndarray, float]:
        """Random images, PyTorch's logits for them, and the least SQNR that a runtime's logits must reach."""
        images = torch.randn(4, *self.preprocessing.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact, wanted = (model(images.clone()).numpy() for model in (unrounded(self.network), self.network))
        return images, wanted, least_sqnr_db(sqnr_db(exact, wanted))

    def _judge(self, made: Executable, runtime: str) -> None:
        """Compare a runtime's logits on random images with PyTorch's; raise `UserError` if they differ too much."""
        images, wanted, least = self._wanted
        if (sqnr := sqnr_db(wanted, made.run(images).numpy())) < least:
            raise UserError(f"{runtime}: the exported model is at {sqnr:.1f} dB of PyTorch, less than {least:.1f}")


def load_model(
    path: str | Path,
    architecture: str | None = None,
    *,
    preprocessing: str | P.Preprocessing | None = None,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights_key: str | None = None,
) -> Model:
    """Read a model file: a state_dict, or a file of this project, fp32 or a variant.

    All arguments but `path` are for a state_dict only: a file of this project says the rest itself.

    Args:
        path: the file.
        architecture: a torchvision name, `vgg11_small`, or `package.module:factory`.
        preprocessing: `torchvision` for the preprocessing of torchvision's default weights, the name of other
            torchvision weights, or your own row; None to use the next three arguments.
        image_size: pixels a side, or height and width; None for 224.
        mean: of red, green and blue, for pixels from 0 to 1; None for ImageNet's.
        std: likewise.
        weights_key: the name of one state_dict, for a file that holds several: `state_dict_ema` for example.

    Raises:
        UserError: the file cannot be read, or does not fit the architecture, or two arguments say the same.
    """
    path = Path(path)
    pixels = {"image_size": image_size, "mean": mean, "std": std}
    if _is_of_this_project(path):
        others = {"architecture": architecture, "preprocessing": preprocessing, **pixels, "weights_key": weights_key}
        _refuse(others, f"{path} says that itself")
        checkpoint = load_checkpoint(path)
        model = Model(load_any(path), network_facts(checkpoint), checkpoint["variant"])
        if is_own(model.facts["architecture"]):
            check_logits(model.network, model.facts["classes"], model.preprocessing.shape, f"{path}: architecture")
        return model
    if architecture is None:
        what = f"{path} is a state_dict, which does not say its architecture"
        raise UserError(f"architecture: {what}; give it, resnet18 for one")
    shown: Any = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    shown |= {key: value for key, value in pixels.items() if value is not None}
    if preprocessing is not None:
        _refuse(pixels, "preprocessing says that")
        shown = P.torchvision_preset(architecture, preprocessing) if isinstance(preprocessing, str) else preprocessing
    try:
        preprocessing = P.Preprocessing.model_validate(shown)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['input']}: {first['msg'].removeprefix('Value error, ')}") from None
    state = read_state_dict(path, weights_key)
    network, classes = network_of_state(state, str(path), architecture, preprocessing.shape)
    return Model(channels_last(fold_batchnorm(network)), new_facts(architecture, classes, preprocessing))


def _is_of_this_project(path: Path) -> bool:
    content = load_tensors(path)
    return isinstance(content, dict) and content.get("format") == FORMAT


def _refuse(arguments: dict[str, Any], why: str) -> None:
    """Raise `UserError` for the first argument that is given."""
    if given := next((key for key, value in arguments.items() if value is not None), None):
        raise UserError(f"{given}: {why}; leave it out")


def quantize(model: Model, images: Tensor | Sequence[Tensor], method: str | P.MethodRow = "int8_static") -> Model:
    """Quantize an fp32 model after training; `model` stays as it is.

    Args:
        model: fp32.
        images: calibration images, float32 [N, C, H, W], normalized; or a sequence of such batches.
        method: the name of a method that does not train, from `methods` in params.yaml of the working directory or else
            from the package; or a row, for example `quantstudy.params.WeightOnly(kind="weight_only", weight_bits=3)`.

    Raises:
        UserError: there is no such method, it cannot be applied to this network, or the images do not fit the model.
    """
    if isinstance(model.network, Variant):
        raise UserError(f"model: is quantized, with {model.variant}; give the fp32 model it was made from")
    name, row = (method, post_training_row(method)) if isinstance(method, str) else (method.kind, method)
    if row.trains or row.needs_sensitivity:
        needs = "training" if row.trains else "sensitivities"
        raise UserError(f"method: {row.kind} needs {needs}, which only the pipeline has; choose another kind")
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not batches:
        _check_images(model, None)
    for batch in batches:
        _check_images(model, batch)
    return Model(recipes.quantize(model.network, Calibration(model.network, batches), row), model.facts, name)


def post_training_row(method: str, key: str = "method") -> P.MethodRow:
    """Return the row of a method that needs neither training nor sensitivities; else raise `UserError`, naming `key`.

    The rows come from params.yaml in the working directory, or else from the package.
    """
    rows: dict[str, P.MethodRow] = P.load_methods()
    names = [name for name, row in rows.items() if not row.trains and not row.needs_sensitivity]
    if method not in names:
        raise unknown(key, method, names)
    return rows[method]


def _check_images(model: Model, images: Any) -> None:
    """Raise `UserError` unless images are a batch that the model takes."""
    if isinstance(images, Tensor):
        if images.dtype == torch.float32 and len(images) and tuple(images.shape[1:]) == model.preprocessing.shape:
            return
        found = f"{images.dtype} {[*images.shape]}".removeprefix("torch.")
    else:
        found = "nothing" if images is None else type(images).__name__
    channels, height, width = model.preprocessing.shape
    raise UserError(f"images: {found}; give normalized float32 [N, {channels}, {height}, {width}], N at least 1")


@torch.inference_mode()
def run(model: Model, images: Tensor, runtime: str = "eager") -> Tensor:
    """Return the logits of a model on a runtime, float32 [N, classes].

    Args:
        model: fp32 or a variant. The first call on a runtime builds the executable.
        images: float32 [N, C, H, W], normalized. Eager mode and inductor run on their device, the others on the CPU.
        runtime: one of `RUNTIMES`.

    Raises:
        UserError: there is no such runtime, or it is not installed, or the images do not fit the model.
    """
    _check_images(model, images)
    executable = model.executable(runtime, images.device)
    return executable.run(images.contiguous(memory_format=executable.memory_format))


def save(model: Model, path: str | Path) -> None:
    """Write a variant with packed codes; `load_model` reads the file.

    Raises:
        UserError: the model is fp32.
    """
    if not isinstance(model.network, Variant):
        raise UserError("model: is fp32, whose file is there already; quantize it first")
    save_variant(Path(path), model.network, model.facts, model.variant)


def export_onnx(model: Model, path: str | Path) -> None:
    """Write a model as ONNX, for any batch size, and its preprocessing and class names as a .json next to it.

    Integer weights are stored in four or eight bits.

    Raises:
        UserError: the network cannot be exported, or ONNX Runtime computes something else on random images.
    """
    from quantstudy.runtimes.onnx_model import described, save_onnx, to_onnx
    from quantstudy.runtimes.sessions import why_missing

    if why_missing("onnxruntime") is None:
        model.executable("onnxruntime", torch.device("cpu"))
    save_onnx(Path(path), described(to_onnx(model.network, model.graph), model.facts))
