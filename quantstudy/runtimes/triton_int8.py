"""A matrix product of bfloat16 rows and int8 weights on a GPU, for when reading the weights is what takes time.

PyTorch has `_weight_int8pack_mm` for CUDA too, one thread an output value, whose reads of the weight are scattered;
torchao's weight-only layers write the weight out in bfloat16 first. Here each program reads a block of rows of the
weight once, widens the codes in registers and multiplies them on tensor cores with up to 16 rows of the input.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K, WARPS, STAGES = 16, 32, 256, 4, 4


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, y, rows, outputs, inputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # A layer's codes may be more than 2^31.
    x_at = x + m.to(tl.int64)[:, None] * inputs + k[None, :]
    codes_at = codes + n.to(tl.int64)[None, :] * inputs + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + k < inputs
        values = tl.load(x_at + start, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(codes_at + start, mask=inside[:, None] & (n < outputs)[None, :], other=0)
        sums += tl.dot(values, weight.to(values.dtype))
    found = sums * tl.load(scale + n, mask=n < outputs, other=0.0)[None, :]
    y_at = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y_at, found, mask=(m < rows)[:, None] & (n < outputs)[None, :])


def weight_int8_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return x @ (codes * scale).T, float32 [M, N].

    Args:
        x: bfloat16 [M, K], contiguous (float32 in Triton's interpreter, which multiplies no bfloat16).
        codes: int8 [N, K], contiguous.
        scale: float32 [N].
    """
    (rows, inputs), outputs = x.shape, len(codes)
    y = torch.empty(rows, outputs, dtype=torch.float32, device=x.device)
    grid: Any = (triton.cdiv(outputs, BLOCK_N), triton.cdiv(rows, BLOCK_M))
    _kernel[grid](
        *(x, codes, scale, y, rows, outputs, inputs),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return y
