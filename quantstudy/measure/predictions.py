"""Files of the predictions on the test images: fp32's logits, and the class that each variant predicts."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantstudy import layout
from quantstudy.errors import UserError
from quantstudy.files import load_array, save_array


def save_reference(study: str, logits: NDArray[np.float32]) -> None:
    """Write fp32's logits on the test images, then on the validation images, [images, classes]."""
    save_array(layout.reference(study), logits, _logits_of(study))


def load_reference(study: str, images: int, classes: int) -> NDArray[np.float32]:
    """Return fp32's logits, float32 [images, classes]; raise `UserError` if they are damaged or of other images."""
    path = layout.reference(study)
    found = load_array(_content(path, "fp32"), path, _logits_of(study))
    if found.shape != (images, classes) or found.dtype != np.float32:
        what = f"{found.dtype} of shape {found.shape}, not float32 of shape {(images, classes)}"
        raise UserError(f"{path}: {what} as the test and validation splits have it; run evaluate for fp32 again")
    return found


def save_predictions(study: str, variant: str, logits: NDArray[np.float32]) -> None:
    """Write the classes that a variant predicts, int16 [images]."""
    predicted = logits.argmax(1).astype(np.int16)
    save_array(layout.predictions(study, variant), predicted, _predictions_of(study, variant))


def load_predictions(study: str, variant: str, images: int, classes: int) -> NDArray[np.int16]:
    """Return the predicted classes of a variant, int16 [images]; raise `UserError` if they are of other images."""
    path = layout.predictions(study, variant)
    found = predictions_in(_content(path, variant), study, variant)
    if found.shape != (images,):
        raise UserError(f"{path}: predictions of {len(found)} images, the test split has {images}; run evaluate again")
    if not ((found >= 0) & (found < classes)).all():
        raise UserError(f"{path}: predicts others than the {classes} classes of the test split; run evaluate again")
    return found


def predictions_in(content: bytes, study: str, variant: str) -> NDArray[np.int16]:
    """Return the predictions in a file's content; raise `UserError` if it is damaged or of another variant."""
    path = layout.predictions(study, variant)
    found = load_array(content, path, _predictions_of(study, variant))
    if found.ndim != 1 or found.dtype != np.int16:
        raise UserError(f"{path}: {found.dtype} of shape {found.shape}, no predictions; run evaluate again")
    return found


def _content(path: Path, variant: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run evaluate for {variant} first") from None


def _logits_of(study: str) -> str:
    return f"the fp32 logits of {study}"


def _predictions_of(study: str, variant: str) -> str:
    return f"the predictions of {variant} in {study}"
