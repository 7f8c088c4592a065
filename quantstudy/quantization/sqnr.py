"""The signal-to-quantization-noise ratio: how much quantization disturbs outputs, long before the accuracy moves."""

import math

import numpy as np
from numpy.typing import NDArray

SQNR_LIMIT_DB = 200.0
"""Bound of `sqnr_db` on both sides; float32 rounding alone lies near 150 dB."""

SMALLEST_ERROR, FLOAT32, ROUNDINGS = 1e-3, 1e-6, 2
"""The errors allowed to another runtime: of float32 arithmetic, of float32 numbers, and in multiples of rounding's."""


def sqnr_db(reference: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return 20·log10(‖reference‖ / ‖reference - other‖) in decibels, over all elements, in float64.

    Bounded by ±`SQNR_LIMIT_DB` so that it is always finite: identical arrays give the upper bound, arrays with an
    infinity or a NaN (a float16 overflow) the lower bound.

    Raises:
        ValueError: the two arrays differ in shape.
    """
    if np.shape(reference) != np.shape(other):
        raise ValueError(f"reference has shape {np.shape(reference)}, other {np.shape(other)}")
    signal = np.asarray(reference, dtype=np.float64)
    noise = signal - np.asarray(other, dtype=np.float64)
    signal_norm, noise_norm = float(np.linalg.norm(signal)), float(np.linalg.norm(noise))
    if noise_norm == 0.0:
        return SQNR_LIMIT_DB
    if signal_norm == 0.0 or not math.isfinite(noise_norm):
        return -SQNR_LIMIT_DB
    decibels = 20 * (math.log10(signal_norm) - math.log10(noise_norm))
    return max(-SQNR_LIMIT_DB, min(SQNR_LIMIT_DB, decibels))


def least_sqnr_db(rounding_db: float, scale: float = 1.0) -> float:
    """Return the least SQNR that another runtime's logits must have: about 60 dB if nothing is rounded.

    Args:
        rounding_db: SQNR of the logits against the logits of the same weights with unrounded activations.
        scale: norm of the logits, over the norm of the part of them that is judged.
    """
    return -20 * math.log10(SMALLEST_ERROR + FLOAT32 * scale + ROUNDINGS * 10 ** (-rounding_db / 20))
