"""How good logits are: their accuracy on labels, and their distance from fp32's logits."""

import numpy as np

from quantstudy.measure.statistics import mcnemar_exact_p, paired_drop_half_width, wilson_half_width
from quantstudy.quantization.sqnr import sqnr_db


def accuracy(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics that compare a variant's logits with the labels and with fp32's logits.

    `top1_drop` is fp32's top-1 minus the variant's, in points: a negative drop is a gain. Of equal logits the first
    counts.

    Args:
        logits: float [images, classes].
        reference: fp32's logits on the same images in the same order; the same array if the variant is fp32.
        labels: int [images].
    """
    predicted, expected = logits.argmax(1), reference.argmax(1)
    right, right_before = predicted == labels, expected == labels
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    images = len(labels)
    return {
        "top1": 100 * float(right.mean()),
        "top5": 100 * float((five == labels[:, None]).any(1).mean()),
        "top1_ci95": wilson_half_width(int(right.sum()), images),
        "top1_drop": 100 * float(right_before.mean() - right.mean()),
        "top1_drop_p": mcnemar_exact_p(right_before, right),
        "images": images,
        "agreement": percent_equal(logits, reference),
        "sqnr_db": sqnr_db(reference, logits),
    }


def validation_figures(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Return top-1 and its drop on the validation images, in percentage points; null without images.

    Variants are chosen by these figures, never by those of the test images.
    The arguments are those of `accuracy`. `validation_drop_ci95` is half the width of the drop's 95 % interval.
    """
    found: dict[str, float | None] = dict.fromkeys(("validation_top1", "validation_drop", "validation_drop_ci95"))
    if images := len(labels):
        right, right_before = logits.argmax(1) == labels, reference.argmax(1) == labels
        found["validation_top1"] = 100 * float(right.mean())
        found["validation_drop"] = 100 * float(right_before.mean() - right.mean())
        found["validation_drop_ci95"] = paired_drop_half_width(right_before, right)
    return found | {"validation_images": images}


def percent_equal(logits: np.ndarray, others: np.ndarray) -> float:
    """Return the percentage of images on which two models predict the same class, from logits [images, classes]."""
    return 100 * float((logits.argmax(1) == others.argmax(1)).mean())
