"""Mixed precision where the CPU has no 16-bit matrix products."""

import torch
from torch.nn import functional as F

from quantstudy.machine.device import RoundedOperands


def test_operands_and_their_gradients_are_rounded_and_sums_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(4, 8, generator=generator, requires_grad=True) for _ in range(2))
    with RoundedOperands(torch.bfloat16):
        found = F.linear(x, weight)
    rounded = [value.detach().bfloat16().float() for value in (x, weight)]
    assert torch.equal(found, F.linear(*rounded))
    found.square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, x.grad.bfloat16().float())
    torch.testing.assert_close(x.grad, (2 * found.detach() @ rounded[1]).bfloat16().float())
