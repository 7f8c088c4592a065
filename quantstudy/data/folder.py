"""An image-folder tree, `train/<class>/<file>` and `test/<class>/<file>`, or an archive of one.

train/ may be missing, and test/ may have classes that train/ lacks; stages that train refuse that. With `test_fraction`
the tree is `<class>/<file>`, and the test split is drawn. Folders may wrap the whole tree, one inside the other. Hidden
files and folders are left out, and so are files outside the class folders. Folders beside train/ and test/ are left out
too, and a line says so.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from quantstudy.data.archive import Files, open_files
from quantstudy.data.images import ImageList
from quantstudy.data.preprocessing import image_suffixes
from quantstudy.data.sampling import validation_indices
from quantstudy.errors import UserError
from quantstudy.files import check_sha256, expect_sha256
from quantstudy.params import Calibration, Data

_SPLITS = ("train", "test")
_OTHER_SPLITS = {"training", "testing", "val", "valid", "validation", "dev", "eval"}


def folder(data: Data, key: str) -> tuple[ImageList, ImageList]:
    """List the images of both splits, by class and then by path; `key` is where `data` lies in the params.

    Raise `UserError` for an archive or a tree whose SHA-256 is not `data.sha256`, a missing test/, a class without
    images, and classes that only train/ has.
    """
    assert data.path is not None
    path = Path(data.path)
    files = _checked_files(path, data.sha256, f"{key}.sha256")
    root, tops = _root(path, files)
    if data.test_fraction is not None:
        if split := next((name for name in tops if name in _SPLITS), None):
            raise UserError(f"{key}.test_fraction: {path} has a folder {split}/; remove the key")
        if tops and _OTHER_SPLITS.issuperset(tops):
            what = f"{path} has folders of splits, {_few(tops)}, not of classes"
            raise UserError(f"{key}.test_fraction: {what}; name them train and test, and remove the key")
        images = _image_list(path, files, _classes(path, files, root))
        kept, drawn = validation_indices(images.labels, data.test_fraction, seed=0)  # the same for every study
        return images.subset(kept), images.subset(drawn)
    if "test" not in tops:
        inside = "" if root == PurePosixPath() else f" in {root}/"
        hint = f"to draw the test split from folders of classes set {key}.test_fraction"
        if "train" in tops:
            hint = "give the folder of the test images this name"
        raise UserError(f"{path}: no folder test/{inside}; found {_few(tops)}; {hint}")
    if unused := [name for name in tops if name not in _SPLITS]:
        print(f"{path}: left out beside train/ and test/: {_few(unused)}")
    test = _classes(path, files, root / "test")
    train = _classes(path, files, root / "train") if "train" in tops else {}
    if odd := sorted(set(train) - set(test)):
        raise UserError(f"{path}: train/ and test/ have different classes; only train/ has {_few(odd)}")
    return _image_list(path, files, {name: train.get(name, []) for name in test}), _image_list(path, files, test)


def images_below(path: Path, files: Files, key: str) -> list[str]:
    """Return every visible image file of a folder or an archive, by path; raise `UserError`, naming `key`, for none."""
    suffixes = image_suffixes()
    names = [name for name in files.names if name.lower().endswith(suffixes) and _is_visible(name)]
    if not names:
        raise UserError(f"{key}: no images in {path}; their names end in one of {', '.join(suffixes)}")
    return names


def calibration_images(calibration: Calibration, classes: Sequence[str], key: str) -> ImageList | None:
    """List the images of `calibration.path`, None without one; `key` is where `calibration` lies in the params.

    The label of an image is the class that its folder is named after, or -1 if there is no such class.
    Raise `UserError` for a path whose SHA-256 is not `calibration.sha256`, or that has no images.
    """
    if calibration.path is None:
        return None
    path = Path(calibration.path)
    files = _checked_files(path, calibration.sha256, f"{key}.sha256")
    names = images_below(path, files, f"{key}.path")
    index = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([index.get(PurePosixPath(name).parent.name, -1) for name in names])
    return ImageList(labels, tuple(classes), [f"{path}: {name}" for name in names], lambda i: files.read(names[i]))


def _checked_files(path: Path, expected: str | None, key: str) -> Files:
    """Open a folder or an archive; raise `UserError`, naming `key`, when its SHA-256 is not the `expected` one."""
    if not path.is_dir():
        check_sha256(path, expected, key)
    files = open_files(path)
    if path.is_dir():
        expect_sha256(path, tree_sha256(files), expected, key)
    return files


def tree_sha256(files: Files) -> str:
    """Return the SHA-256 of a tree: of the lines `<SHA-256>  <path>`, one per visible file, sorted by path."""
    names = [name for name in sorted(files.names) if _is_visible(name)]
    lines = [f"{hashlib.sha256(files.read(name)).hexdigest()}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _root(path: Path, files: Files) -> tuple[PurePosixPath, list[str]]:
    """Return the folder that holds the splits or classes, and the names of the folders in it.

    It is the top, or where the top has one folder, which has folders in it, that folder or one further in.
    """
    folders = {parent for name in files.names if _is_visible(name) for parent in PurePosixPath(name).parents}
    folders |= {PurePosixPath(name) for name in files.folders if _is_visible(name)}
    root, inside = PurePosixPath(), _inside(folders, PurePosixPath())
    while len(inside) == 1 and inside[0] not in _SPLITS and (further := _inside(folders, root / inside[0])):
        root, inside = root / inside[0], further
    return root, inside


def _inside(folders: set[PurePosixPath], root: PurePosixPath) -> list[str]:
    return sorted(folder.name for folder in folders if folder != root and folder.parent == root)


def _classes(path: Path, files: Files, root: PurePosixPath) -> dict[str, list[str]]:
    """Return the files of each class folder below `root`, sorted."""
    classes: dict[str, list[str]] = {}
    depth = len(root.parts)
    for is_file, names in ((False, files.folders), (True, files.names)):
        for name in names:
            parts = PurePosixPath(name).parts
            if parts[:depth] == root.parts and len(parts) > depth + is_file and _is_visible(name):
                members = classes.setdefault(parts[depth], [])
                members.extend([name] if is_file else [])
    if not classes:
        raise UserError(f"{path}: {root}/ has no class folders with images")
    empty = [name for name, members in classes.items() if not members]
    if empty:
        raise UserError(f"{path}: no images in {root}/{min(empty)}/; add some or remove the class")
    return dict(sorted(classes.items()))


def _image_list(path: Path, files: Files, classes: dict[str, list[str]]) -> ImageList:
    if len(classes) < 2:
        raise UserError(f"{path}: {next(iter(classes))}/ is the only class folder; two are needed at least")
    names = [name for members in classes.values() for name in members]
    counts = torch.tensor([len(members) for members in classes.values()])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return ImageList(labels, tuple(classes), [f"{path}: {name}" for name in names], lambda i: files.read(names[i]))


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _few(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
