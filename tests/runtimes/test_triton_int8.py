"""The Triton kernel, on a CPU in Triton's interpreter, which has no bfloat16 products: float32 there."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import torch
from quantstudy.runtimes.triton_int8 import weight_int8_matmul
for rows, outputs, inputs in [(1, 10, 100), (5, 48, 128), (16, 64, 512), (33, 100, 300)]:
    x, scale = torch.randn(rows, inputs), torch.rand(outputs)
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    expected = (x.double() @ codes.double().T * scale).float()
    torch.testing.assert_close(weight_int8_matmul(x, codes, scale), expected, rtol=1e-4, atol=1e-2)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch without Triton")
def test_it_multiplies_blocks_of_any_size() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
