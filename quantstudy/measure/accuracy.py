"""How good logits are: their accuracy on labels, and how far they lie from those of fp32."""

import numpy as np

from quantstudy.measure.statistics import mcnemar_exact_p, wilson_half_width
from quantstudy.quantization.sqnr import sqnr_db


def accuracy(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics that compare a variant's logits with the labels and with fp32's logits.

    `top1_drop` is how many points fp32 is better, so that less than zero is a gain. Of equal logits the first counts.

    Args:
        logits: float [images, classes].
        reference: fp32's, on the same images in the same order; the same array when the variant is fp32.
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


def percent_equal(logits: np.ndarray, others: np.ndarray) -> float:
    """Return on what percent of the images two models predict the same class, from logits [images, classes]."""
    return 100 * float((logits.argmax(1) == others.argmax(1)).mean())
