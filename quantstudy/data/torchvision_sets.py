"""Classification sets that torchvision downloads, checks and reads itself.

They are kept under `data/external/<dataset>`. A download goes to a temporary folder next to it, and moves there once it
is whole. If you put an archive there by hand, it is used instead of a download.
"""

import errno
import shutil
import tarfile
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantstudy.data.images import ImageList
from quantstudy.errors import UserError, unknown
from quantstudy.params import Data

if TYPE_CHECKING:
    from PIL.Image import Image

EXTERNAL = Path("data") / "external"

_FLAG, _NAMED = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "test"})
_SPLIT_ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), _FLAG),
    **dict.fromkeys(("Food101", "Flowers102", "DTD", "SVHN", "STL10", "GTSRB", "Country211", "RenderedSST2"), _NAMED),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    "Imagenette": ({"split": "train"}, {"split": "val"}),
}
"""torchvision's arguments for the training and the test split of each set."""


def torchvision_set(data: Data, key: str) -> tuple[ImageList, ImageList]:
    """List both splits of `data.dataset`, downloaded if need be; `key` is where `data` lies in the params.

    Raise `UserError` for a name that is not known, a failed download and files that are missing or corrupt.
    """
    name = str(data.dataset)
    check_dataset(name, f"{key}.dataset")
    root = EXTERNAL / name
    with _one_line_errors(name, root, f"{key}.dataset"):
        if not root.exists():
            _download(name, root)
        train, test = (_open(name, root, arguments) for arguments in _SPLIT_ARGUMENTS[name])
    return _image_list(train, root), _image_list(test, root)


def check_dataset(name: str, key: str) -> None:
    """Raise `UserError`, naming `key`, for a set that is not known."""
    if name not in _SPLIT_ARGUMENTS:
        raise unknown(key, name, _SPLIT_ARGUMENTS)


def _download(name: str, root: Path) -> None:
    partial = root.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for arguments in _SPLIT_ARGUMENTS[name]:
            _open(name, partial, arguments)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(name: str, root: Path, arguments: dict[str, Any]) -> Any:
    """Construct the torchvision set; a set that reads files returns their paths, not images."""
    import inspect

    from torchvision import datasets

    dataset = getattr(datasets, name)
    if "loader" in inspect.signature(dataset).parameters:
        arguments = {**arguments, "loader": Path}
    return dataset(root, download=True, **arguments)


def _image_list(dataset: Any, root: Path) -> ImageList:
    targets, names = [], []
    for index in range(len(dataset)):
        image, target = dataset[index]
        targets.append(int(target))
        names.append(str(image) if isinstance(image, Path) else f"{root}: image {index}")
    labels = torch.tensor(targets, dtype=torch.int64)
    classes = getattr(dataset, "classes", range(max(targets) + 1))

    def read(index: int) -> "bytes | Image":
        image: Path | Image = dataset[index][0]
        if not isinstance(image, Path):
            return image
        try:
            return image.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{image}: no such file; delete {root} and run the stage again") from None

    return ImageList(labels, tuple(", ".join(c) if isinstance(c, tuple) else str(c) for c in classes), names, read)


@contextmanager
def _one_line_errors(name: str, root: Path, key: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, tarfile.TarError, urllib.error.URLError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{key}: {name} could not be downloaded or read ({error}); check the network and what is in {root}, or "
            f"put its archive there, and run the stage again"
        ) from None
