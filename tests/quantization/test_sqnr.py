import numpy as np
import pytest

from quantstudy.quantization.sqnr import SQNR_LIMIT_DB, sqnr_db


def test_sqnr_of_known_noise() -> None:
    logits = np.full((4, 10), 3.0, dtype=np.float32)
    assert sqnr_db(logits, logits * 0.9) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(logits, logits * 2) == pytest.approx(0, abs=1e-6)
    big = np.full(1000, 60_000, dtype=np.float16)
    assert sqnr_db(big, -big) == pytest.approx(-6.0206, abs=1e-3)
    assert sqnr_db(np.zeros(3), np.ones(3)) == -SQNR_LIMIT_DB
    assert sqnr_db(np.zeros(3), np.zeros(3)) == SQNR_LIMIT_DB
    with pytest.raises(ValueError, match="shape"):
        sqnr_db(np.ones((2, 3)), np.ones((3, 2)))


@pytest.mark.parametrize(
    ("other", "decibels"), [(1.0, SQNR_LIMIT_DB), (np.inf, -SQNR_LIMIT_DB), (np.nan, -SQNR_LIMIT_DB)]
)
def test_sqnr_is_always_finite(other: float, decibels: float) -> None:
    ones = np.ones((2, 3), dtype=np.float32)
    assert sqnr_db(ones, ones * np.float32(other)) == decibels
