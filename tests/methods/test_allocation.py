"""The integer program against brute force, and its budgets."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantstudy.errors import UserError
from quantstudy.methods.allocation import Budget, allocate, operations_budget, size_budget, stored_bits

WIDTHS = (2, 4, 16)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, dict[int, float]], list[Budget]]:
    """Losses of one to five layers over many orders of magnitude, and one or two budgets that can be kept."""
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 5)))]
    exponent, mantissa = st.integers(-8, 0), st.integers(1, 999)
    losses = {layer: {b: draw(mantissa) * 10.0 ** draw(exponent) for b in WIDTHS} for layer in layers}
    budgets = []
    for key in draw(st.sampled_from([["size"], ["size", "operations"]])):
        costs = {layer: {b: draw(st.integers(1, 10**9)) for b in WIDTHS} for layer in layers}
        smallest, largest = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
        budgets.append(Budget(key, draw(st.integers(smallest, largest)), 1, costs))
    return losses, budgets


def brute_force(losses: dict[str, dict[int, float]], budgets: list[Budget]) -> float | None:
    """Return the least summed loss within the budgets, None where nothing is."""
    found = []
    for widths in itertools.product(WIDTHS, repeat=len(losses)):
        bits = dict(zip(losses, widths, strict=True))
        if all(budget.spent(bits) <= budget.limit for budget in budgets):
            found.append(sum(losses[layer][width] for layer, width in bits.items()))
    return min(found, default=None)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_integer_program_equals_brute_force(case: tuple[dict[str, dict[int, float]], list[Budget]]) -> None:
    losses, budgets = case
    least = brute_force(losses, budgets)
    if least is None:
        with pytest.raises(UserError, match="no choice of bits is within both"):
            allocate(losses, budgets)
        return
    bits = allocate(losses, budgets)
    assert all(budget.spent(bits) <= budget.limit for budget in budgets)
    assert sum(losses[layer][width] for layer, width in bits.items()) == pytest.approx(least, rel=1e-9)


def test_costs_by_hand_and_more_budget_never_loses_more() -> None:
    torch.manual_seed(0)
    shapes = {f"layer{i}": torch.Size((8 * (i + 1), 16, 3, 3)) for i in range(12)}
    losses = {name: {b: float(torch.rand(())) * 2.0**-b for b in (2, 3, 4, 6, 8, 16)} for name in shapes}
    found = []
    for mean_bits in (2.6, 3.0, 4.0, 6.0, 8.0, 16.0):
        bits = allocate(losses, [size_budget("mean_bits", mean_bits, shapes, 32, (2, 3, 4, 6, 8, 16))])
        found.append(sum(losses[name][width] for name, width in bits.items()))
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    budget = operations_budget("bit_operations", 0.25, {"a": 10, "b": 30}, WIDTHS)
    assert budget.spent({"a": 16, "b": 16}) == budget.most  # 16 x 16 of 32 x 32
    assert stored_bits(torch.Size((8, 64)), 4, 32) == 8 * 64 * 4 + 8 * 2 * 16
    assert stored_bits(torch.Size((8, 64)), 3, None) == 8 * 64 * 3 + 8 * 32
    assert stored_bits(torch.Size((1, 1, 3, 3)), 3, 32) == 32 + 16  # 27 bits of codes take four bytes
    assert stored_bits(torch.Size((8, 64)), 16, 32) == 8 * 64 * 16


@pytest.mark.parametrize(
    ("budget", "key"),
    [
        (size_budget("m.mean_bits", 2.0, {"a": torch.Size((8, 64))}, 32, WIDTHS), "m.mean_bits: 2"),
        (operations_budget("m.bit_operations", 0.01, {"a": 1000}, WIDTHS), "m.bit_operations: 0.01"),
    ],
    ids=["size", "operations"],
)
def test_an_infeasible_budget_names_the_smallest_possible(budget: Budget, key: str) -> None:
    losses = {"a": {2: 1.0, 4: 0.5, 16: 0.0}}
    with pytest.raises(UserError) as error:
        allocate(losses, [budget])
    assert str(error.value).startswith(f"{key} is too small")
    smallest = float(re.findall(r"[\d.]+$", str(error.value))[0])
    enough = Budget(budget.key, smallest, budget.unit, budget.costs)
    assert allocate(losses, [enough]) == {"a": 2}
