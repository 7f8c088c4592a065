"""Choose the bits of each layer: an integer program, solved exactly.

Each layer gets one width, such that the sum of the losses is smallest and every budget holds:

    minimize Σ loss[l, b] x[l, b]   subject to   Σ_b x[l, b] = 1,   Σ cost[l, b] x[l, b] <= limit,   x binary.

HAWQ-V3 (Yao et al., *HAWQ-V3: Dyadic Neural Network Quantization*, ICML 2021, section 3.4) allocates bits in the same
way. Here scipy's `milp`, the solver HiGHS, does the branch and bound, down to a relative gap of zero.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantstudy.errors import UserError
from quantstudy.quantization.schemes import WeightScheme

HALF = 16
"""Bits of a layer that is not quantized but cast to a 16-bit float type."""
_LARGEST_LOSS = 1e4
"""Losses are scaled so that the largest has this size, far above the solver's absolute gap of 1e-6."""

Losses = Mapping[str, Mapping[int, float]]
Allocation = Mapping[str, int]
"""Bits of each layer."""


@dataclass(frozen=True)
class Budget:
    """A limit on the sum of integer `costs`, by layer and bits: at most `limit` times `unit`.

    `key` is the param that sets `limit`; `unit` is the cost that a limit of 1 allows.
    """

    key: str
    limit: float
    unit: int
    costs: Mapping[str, Mapping[int, int]]

    @property
    def most(self) -> int:
        """The largest sum of costs within the budget."""
        return math.floor(self.limit * self.unit * (1 + 1e-12))

    def spent(self, bits: Mapping[str, int]) -> int:
        """Return the sum of costs of an allocation."""
        return sum(self.costs[layer][width] for layer, width in bits.items())


def size_budget(
    key: str, mean_bits: float, shapes: Mapping[str, torch.Size], group_size: int | None, widths: Sequence[int]
) -> Budget:
    """Return the budget of `mean_bits` stored bits per weight, scales included."""
    costs = {layer: {bits: stored_bits(shape, bits, group_size) for bits in widths} for layer, shape in shapes.items()}
    return Budget(key, mean_bits, sum(shape.numel() for shape in shapes.values()), costs)


def operations_budget(key: str, share: float, macs: Mapping[str, int], widths: Sequence[int]) -> Budget:
    """Return the budget of a `share` of fp32's bit-operations; activations have 16 bits, as in the mixed methods."""
    costs = {layer: {bits: count * bits * HALF for bits in widths} for layer, count in macs.items()}
    return Budget(key, share, sum(macs.values()) * 32 * 32, costs)


def stored_bits(shape: torch.Size, bits: int, group_size: int | None) -> int:
    """Return the bits that a weight of `shape` takes in a file: packed codes and scales, or 16 for each value."""
    if bits == HALF:
        return HALF * shape.numel()
    return 8 * WeightScheme(bits, group_size).layout(shape).nbytes


def allocate(losses: Losses, budgets: Sequence[Budget]) -> dict[str, int]:
    """Return the bits of each layer, with the least summed loss within `budgets`.

    Args:
        losses: finite, by layer and bits; a layer gets one of its own widths.
        budgets: with a cost for every layer and width of `losses`.

    Raises:
        UserError: no allocation fits the budgets; if one budget alone is too small, the line names its smallest limit.
    """
    layers, widths = list(losses), sorted({bits for own in losses.values() for bits in own})
    for budget in budgets:
        smallest = sum(min(budget.costs[layer][bits] for bits in losses[layer]) for layer in layers)
        if smallest > budget.most:
            possible = math.ceil(1e4 * smallest / budget.unit) / 1e4
            raise UserError(f"{budget.key}: {budget.limit:g} is too small; the smallest possible is {possible:g}")
    loss = np.array([[losses[layer].get(bits, np.nan) for bits in widths] for layer in layers], dtype=float)
    costs = [np.array([[b.costs[layer].get(bits, 0) for bits in widths] for layer in layers]) for b in budgets]
    chosen = _solve(loss, costs, [budget.most for budget in budgets])
    if chosen is None:
        keys = " and ".join(budget.key for budget in budgets)
        raise UserError(f"{keys}: no choice of bits is within both; raise one of them")
    return {layer: widths[index] for layer, index in zip(layers, chosen, strict=True)}


def _solve(
    loss: NDArray[np.float64], costs: Sequence[NDArray[np.int64]], limits: Sequence[int]
) -> NDArray[np.int64] | None:
    """Return the index of each row's choice, where `loss` is a number; None if no choice is within the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, widths = loss.shape
    rows = np.arange(layers)
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(widths)), 1, 1)
    possible, loss = np.isfinite(loss), np.nan_to_num(loss)
    scaled = loss.ravel() * (_LARGEST_LOSS / max(float(np.abs(loss).max()), 1e-300))
    tightened = list(limits)
    while True:
        within = [LinearConstraint(c.ravel()[None], -np.inf, most) for c, most in zip(costs, tightened, strict=True)]
        found = milp(
            scaled,
            integrality=np.ones(loss.size),
            bounds=Bounds(0, possible.ravel().astype(float)),
            constraints=[one_each, *within],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen: NDArray[np.int64] = found.x.reshape(layers, widths).argmax(1)
        excess = [int(c[rows, chosen].sum()) - most for c, most in zip(costs, limits, strict=True)]
        if max(excess) <= 0:
            return chosen
        # The solver accepts nearly whole numbers, so a large cost may exceed its limit by a few units.
        tightened = [now - max(over, 0) for now, over in zip(tightened, excess, strict=True)]
