"""Names beside points, without overlaps: a greedy placement that is the same in every run.

Points that share a size or an accuracy lie almost on each other. Each name, from the top point down, takes the
cheapest of some positions around its point, where covering another name or marker costs more than any distance;
a thin line leads back to the point when the name had to move away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from quantstudy.report.style import GREY, INK

FONT_SIZE = 8.0
GAP = 12.0
ROWS = 16
_Line = tuple[tuple[float, float], tuple[float, float]]
ABOVE, OVER_LABEL, OVER_MARKER, OVER_LINE, OUTSIDE = 20.0, 40.0, 15.0, 300.0, 4000.0


class _Box(NamedTuple):
    """What matplotlib's `Bbox` is, with plain numbers: they are compared a million times."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def at(cls, left: float, bottom: float, width: float, height: float) -> "_Box":
        return cls(left, bottom, left + width, bottom + height)


@dataclass(frozen=True)
class _Place:
    box: _Box
    start: tuple[float, float]
    """Where the leading line meets the name."""


@dataclass(frozen=True)
class _Taken:
    """What a name should not cover: names placed before it, markers of others, leading lines."""

    names: Sequence[_Box]
    markers: Sequence[_Box]
    lines: Sequence[_Line]

    def cost(self, place: _Place, point: tuple[float, float]) -> float:
        """Return what it costs to cover them with the name of `point`, or names with its line."""
        line = (place.start, point)
        cost = OVER_LABEL * sum(_overlap(place.box, box) for box in self.names)
        cost += OVER_MARKER * sum(_overlap(place.box, box) for box in self.markers)
        cost += OVER_LINE * sum(_crosses(place.box, line) for line in self.lines)
        return cost + OVER_LINE * sum(_crosses(box, line) for box in self.names)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write `names` beside `points` (data coordinates) of `axes`, whose limits and position must be final."""
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(list(points))] if points else []
    markers = [_Box.at(x - 5, y - 5, 10, 10) for x, y in pixels]
    placed: list[_Box] = []
    frame = _Box(*axes.bbox.extents)
    lines: list[_Line] = []
    for index in sorted(range(len(names)), key=lambda i: (-pixels[i][1], pixels[i][0], names[i])):
        point = pixels[index]
        width, height = _size(axes, names[index])
        others = [box for i, box in enumerate(markers) if i != index]
        place = _cheapest(_places(point, width, height), point, _Taken(placed, others, lines), frame)
        placed.append(place.box)
        if _distance(place.start, point) > GAP + 4:
            lines.append((place.start, point))
        _draw(axes, names[index], place, point)


def _size(axes: Axes, name: str) -> tuple[float, float]:
    text = axes.text(0, 0, name, fontsize=FONT_SIZE)
    box = text.get_window_extent()
    text.remove()
    return box.width + 2, box.height + 1


def _places(point: tuple[float, float], width: float, height: float) -> list[_Place]:
    x, y = point
    places = []
    for column in (GAP, 2.5 * GAP, 4.5 * GAP):
        for row in sorted(range(-ROWS, ROWS + 1), key=abs):
            center = y + row * height * 0.75
            bottom = center - height / 2
            right, left = x + column, x - column - width
            places.append(_Place(_Box.at(right, bottom, width, height), (right, center)))
            places.append(_Place(_Box.at(left, bottom, width, height), (left + width, center)))
    for step in (1.0, 1.75, 2.5):
        above, below = y + step * GAP, y - step * GAP
        places.append(_Place(_Box.at(x - width / 2, above, width, height), (x, above)))
        places.append(_Place(_Box.at(x - width / 2, below - height, width, height), (x, below)))
    return places


def _cheapest(places: Sequence[_Place], point: tuple[float, float], taken: _Taken, frame: _Box) -> _Place:
    """Return the place of least cost; what a place costs by itself comes first, as nothing makes it less."""
    alone = sorted(((_cost_alone(place, point, frame), number) for number, place in enumerate(places)))
    least, best = math.inf, places[0]
    for cost, number in alone:
        if cost >= least:
            break
        cost += taken.cost(places[number], point)
        if cost < least:
            least, best = cost, places[number]
    return best


def _cost_alone(place: _Place, point: tuple[float, float], frame: _Box) -> float:
    cost = _distance(place.start, point) + (1.0 if place.start[0] < point[0] else 0.0)
    cost += ABOVE if place.start[0] == point[0] else 0.0
    inside = frame.x0 <= place.box.x0 and place.box.x1 <= frame.x1 and frame.y0 <= place.box.y0 <= frame.y1
    return cost + (0.0 if inside and place.box.y1 <= frame.y1 else OUTSIDE)


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _crosses(box: _Box, line: _Line) -> bool:
    (x0, y0), (x1, y1) = line
    steps = [step / 12 for step in range(1, 12)]
    return any(box.x0 < x0 + step * (x1 - x0) < box.x1 and box.y0 < y0 + step * (y1 - y0) < box.y1 for step in steps)


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5)


def _draw(axes: Axes, name: str, place: _Place, point: tuple[float, float]) -> None:
    to_data = axes.transData.inverted().transform
    if _distance(place.start, point) > GAP + 4:
        (x0, y0), (x1, y1) = (to_data(place.start), to_data(point))
        axes.plot([x0, x1], [y0, y1], color=GREY, linewidth=0.6, zorder=1.5)
    x, y = to_data((place.box.x0 + 1, (place.box.y0 + place.box.y1) / 2))
    text = axes.text(x, y, name, fontsize=FONT_SIZE, color=INK, ha="left", va="center_baseline", zorder=4)
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
