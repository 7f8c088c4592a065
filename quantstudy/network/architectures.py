"""Build a classifier by its name in the params: torchvision's, one for small images, or your own by its import path.

`mypackage.module:factory` imports `mypackage.module` from the project's folder (or the PYTHONPATH) and calls its
`factory(num_classes=...)`. A model's file depends on that code, so the code's SHA-256 is stored with the weights, and
compared before they are loaded into a network again.
"""

import functools
import hashlib
import importlib.util
import inspect
import sysconfig
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from quantstudy.errors import UserError, one_line, unknown
from quantstudy.files import sha256
from quantstudy.network.attention import open_attention
from quantstudy.network.folding import channels_last, copy_of
from quantstudy.network.graph import LAYERS
from quantstudy.network.padding import open_padding
from quantstudy.network.source_code import transitive_imports

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""
IMAGE_SIZE = 224
"""Pixels a side that torchvision's networks are made for, unless something else is said."""
_SIZED = {"vit_": "image_size", "maxvit_": "input_size"}
"""The argument for the image size, by the family's prefix, where parameters depend on that size."""


def image_shape(image_size: int | Shape) -> Shape:
    """Return the shape of an image: the given shape, or a square RGB image with so many pixels a side."""
    return (3, image_size, image_size) if isinstance(image_size, int) else image_size


def is_own(architecture: str) -> bool:
    """Whether a name is the import path of a factory, `package.module:factory`."""
    return ":" in architecture


def build(
    architecture: str, classes: int, image_size: int | Shape = IMAGE_SIZE, key: str = "model.architecture"
) -> nn.Module:
    """Return a classifier with a head of `classes` outputs and random weights.

    Attention, and convolutions that pad their own input, are opened (`network.attention`, `network.padding`).
    `image_size`, pixels a side or a shape, only matters to networks whose parameters depend on it. Such networks take
    pixels a side, or (height, width) if the two differ. `key` is the param that an error names.

    Raises:
        UserError: there is no classifier of that name, or it cannot be built.
    """
    make = _own(architecture, key) if is_own(architecture) else _torchvision(architecture, key)
    torch.backends.mha.set_fastpath_enabled(False)  # it would read the weights of an encoder's linear layers itself
    arguments: dict[str, Any] = {"num_classes": classes}
    sized = next((name for prefix, name in _SIZED.items() if architecture.startswith(prefix)), None)
    _, height, width = image_shape(image_size)
    expected = (Exception, SystemExit) if is_own(architecture) else (AssertionError, ValueError, TypeError)
    try:
        if is_own(architecture) and "image_size" in inspect.signature(make).parameters:
            sized = "image_size"
        if sized is not None:
            arguments[sized] = height if sized != "input_size" and height == width else (height, width)
        model = make(**arguments)
    except expected as error:
        size = height if height == width else f"{height} by {width}"
        raise UserError(f"{key}: {architecture!r} for {size} px cannot be built: {one_line(error)}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{key}: {architecture!r} returned {type(model).__name__}, not a torch.nn.Module")
    open_attention(model)
    open_padding(model)
    model.example_shape = image_shape(image_size)  # type: ignore[assignment]
    return model


def check_logits(model: nn.Module, classes: int, image_size: int | Shape, key: str, *, trains: bool = False) -> None:
    """Run `model` on images; raise `UserError`, naming `key`, if this project cannot use it.

    The model must take one image and several, channels_last. It must return logits [N, classes], in training mode too
    if `trains`, and have a layer that can be quantized.
    """
    check_layers(model, key)
    channels, height, width = image_shape(image_size)
    seen = f"{height} px" if (channels, height) == (3, width) else f"{channels} channels, {height} by {width} px"
    images = torch.zeros(2, channels, height, width).contiguous(memory_format=torch.channels_last)
    network = channels_last(copy_of(model))
    for is_training, batch in ((False, images), (False, images[:1]), *([(True, images)] if trains else [])):
        mode = " in training mode" if is_training else ""
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # training must start from the seed
                logits = network.train(is_training)(batch)
        except (Exception, SystemExit) as error:  # your own code may raise anything, torchvision's too for tiny images
            reason = one_line(error)
            if "view size is not compatible" in str(error):
                reason = "it calls view() on maps that lie channels_last; write flatten(1) or reshape() instead"
            raise UserError(f"{key}: the network fails{mode} on images of {seen}: {reason}") from None
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if shape != (len(batch), classes):
            what = f"logits of shape {(len(batch), classes)}"
            raise UserError(f"{key}: the network returns {shape}{mode} for {len(batch)} images, not {what}")


def check_layers(model: nn.Module, key: str) -> None:
    """Raise `UserError`, naming `key`, unless a network has a layer that is, or can be, quantized."""
    if not any(isinstance(module, LAYERS) or hasattr(module, "captured_whole") for module in model.modules()):
        raise UserError(f"{key}: the network has no convolution and no linear layer, so there is nothing to quantize")


def code_sha256(architecture: str, key: str = "model.architecture") -> str | None:
    """Return the SHA-256 of the code behind an import path, None for any other name.

    The code is the module's file and the local modules that it imports; of an installed package, only the module's
    file. The module is not imported, only the packages that it lies in.
    """
    if not is_own(architecture):
        return None
    name = architecture.partition(":")[0]
    file = _source_file(name, key)
    depth = name.count(".") + (file.name == "__init__.py")
    if file.suffix != ".py" or not file.is_file() or len(file.parents) <= depth:
        raise UserError(f"{key}: {name} has no source file; write a function of num_classes in a module of your own")
    root = file.parents[depth]
    script = file.relative_to(root)
    installed = root in (Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib"))
    files = [script] if installed else transitive_imports(script, root)
    lines = [f"{sha256(root / path)}  {path.as_posix()}\n" for path in files if path.parts[0] != "quantstudy"]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_architecture(architecture: str, expected: str | None, key: str) -> None:
    """Raise `UserError` unless there is a classifier of that name; `key` is where the `model` lies in the params.

    `expected` is the SHA-256 of your own code. Nothing is built.
    """
    (_own if is_own(architecture) else _torchvision)(architecture, f"{key}.architecture")
    check_code(architecture, expected, f"{key}.code_sha256")


def check_code(architecture: str, expected: str | None, key: str) -> None:
    """Raise `UserError`, naming `key`, when the code behind an import path has another SHA-256 than `expected`."""
    found = code_sha256(architecture, key)
    if found != expected:
        what = f"the SHA-256 of the code of {architecture}"
        raise UserError(f"{key}: {expected!r} is not {what}; the one found is {found}")


def _own(architecture: str, key: str) -> Callable[..., Any]:
    name, _, attribute = architecture.partition(":")
    module = _module(name, key)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        functions = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        raise unknown(f"{key}: in {name}", attribute, functions)
    return factory  # type: ignore[no-any-return]


def _source_file(name: str, key: str) -> Path:
    try:
        found = importlib.util.find_spec(name)
    except (Exception, SystemExit) as error:  # finding a.b imports a
        raise _not_imported(name, key, error) from None
    if found is None:
        raise _not_imported(name, key, ModuleNotFoundError(f"No module named {name!r}"))
    return Path(found.origin or "")


def _module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # importing runs your own code
        raise _not_imported(name, key, error) from None


def _not_imported(name: str, key: str, error: BaseException) -> UserError:
    where = f"{Path.cwd()} or PYTHONPATH"
    return UserError(f"{key}: {name} cannot be imported from {where}: {one_line(error)}")


def vgg11_small(num_classes: int) -> nn.Module:
    """VGG-11 with batch normalization for images of 32 px: its classifier is a single linear layer of 512 inputs.

    torchvision's VGG-11 has two hidden linear layers as well. They hold 119 of its 129 million parameters, and read one
    pixel 49 times.
    """
    from torchvision.models import vgg

    features = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    parts = OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(parts | {"classifier": nn.Linear(512, num_classes)})


def _torchvision(architecture: str, key: str) -> Callable[..., nn.Module]:
    if architecture == "vgg11_small":
        return vgg11_small
    if architecture not in torchvision_names():
        raise unknown(key, architecture, [*torchvision_names(), "vgg11_small"])
    has_auxiliary_heads = architecture in ("googlenet", "inception_v3")
    arguments = {"init_weights": True, "aux_logits": False} if has_auxiliary_heads else {}
    from torchvision.models import get_model

    return functools.partial(get_model, architecture, weights=None, **arguments)


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classifiers."""
    from torchvision import models

    return list(models.list_models(module=models))
