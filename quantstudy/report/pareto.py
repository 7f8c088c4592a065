"""What a plot of accuracy against cost shows: the points that no other beats, and where to break its axis."""

import itertools
from collections.abc import Sequence

from quantstudy.report.results import Result

SAME_COST = 0.01
"""Relative difference of two sizes or latencies below which neither is the smaller."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, accuracy) points that no other beats, from the cheapest up.

    Costs within `SAME_COST` of each other count as equal, so that a few bytes of file header do not decide.
    """
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if front and accuracy <= front[-1][1]:
            continue
        while front and front[-1][0] * (1 + SAME_COST) >= cost:
            front.pop()
        front.append((cost, accuracy))
    return front


def on_front(results: Sequence[Result], cost: str) -> list[Result]:
    """Return the variants that no other beats in both top-1 and the metric `cost`, from the cheapest up.

    A variant is on no front if its `cost` is null, or is a latency that cannot be compared.
    """
    points = {
        result.variant: (value, result.value("top1"))
        for result in results
        if (value := result[cost]) is not None and result.comparable(cost)
    }
    front = pareto_front(list(points.values()))
    found = [result for result in results if points.get(result.variant) in front]
    return sorted(found, key=lambda result: points[result.variant])


def split_level(values: Sequence[float]) -> float | None:
    """Return where to break an accuracy axis (percent), or None if one scale serves all `values`.

    The break is the middle of the first gap, from the top, that is wider than a quarter of the whole span and has at
    least half of the values above it. An axis that spans less than 12 points is not broken.
    """
    ordered = sorted(values, reverse=True)
    span = ordered[0] - ordered[-1] if ordered else 0.0
    if span < 12:
        return None
    for above, (high, low) in enumerate(itertools.pairwise(ordered), start=1):
        if high - low > span / 4 and above >= len(ordered) / 2:
            return (high + low) / 2
    return None
