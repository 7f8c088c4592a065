"""Packed codes: exact round trips and no gap."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantstudy.quantization.packing import pack, unpack


@given(bits=st.integers(2, 8), count=st.integers(1, 100), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_unpacking_gives_the_codes_back(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), dtype=torch.int8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (7, 1), (4,)], ids=str)
def test_the_shape_comes_back(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert unpack(pack(codes, 4), 4, codes.shape).shape == shape


def test_four_bits_lie_two_to_a_byte_low_half_first() -> None:
    assert pack(torch.tensor([-8, 7], dtype=torch.int8), 4).tolist() == [0xF0]
