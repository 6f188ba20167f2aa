"""Accuracy against what it costs, a point per network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transferkit.exceptions import SettingError
from transferkit.plots._style import DARK, LIGHT, Palette, as_percent, legible, new_figure, shortened, style_panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["TradeoffPoint", "plot_tradeoff"]

_DISTANCES = (6, 11, 17, 25, 35, 47, 61, 78)  # points between a mark and its name
_SHARES = tuple(step / 30 for step in range(2, 30))  # where a line is looked at, beyond the mark it begins at
_DIRECTIONS = ((1, 0), (-1, 0), *((right, up) for right in (0, 0.5, -0.5, 1, -1) for up in (1, -1)))
_LONGEST = 30
_INCH = 72  # points

_Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True)
class TradeoffPoint:
    """What one network costs, and how good it is.

    Args:
        name: Written beside the point.
        x: The cost: seconds, parameters, …; above 0.
        accuracy: Share of pictures classified right, 0 to 1, a mean over seeds where there are several.
        spread: How much it varies between seeds, of the same unit, drawn to both sides; 0 for one seed.

    Example:
        >>> TradeoffPoint("resnet18", 11.7, accuracy=0.94, spread=0.01).accuracy
        0.94
    """

    name: str
    x: float
    accuracy: float
    spread: float = 0.0


def plot_tradeoff(points: Sequence[TradeoffPoint], *, x_label: str, dark: bool = False) -> Figure:
    """Draw accuracy against a cost, each point with its name and its spread; names stand clear of each other.

    Args:
        points: One per network.
        x_label: What the cost is, with its unit: ``"training time (s)"``.
        dark: Whether it is for a dark page.

    Returns:
        A figure of one panel, 8 × 5 inches; the cost is on a logarithmic axis where it spans a factor of 8 or more.

    Raises:
        SettingError: There are no points, or a cost is not above 0.

    Source: ``matplotlib.axes.Axes.errorbar``.

    Example:
        >>> points = [TradeoffPoint("resnet18", 11.7, 0.94, 0.01), TradeoffPoint("resnet50", 25.6, 0.96, 0.005)]
        >>> figure = plot_tradeoff(points, x_label="parameters (millions)")
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['resnet50', 'resnet18']
    """
    if not points:
        raise SettingError("there are no points to plot; give at least one")
    for point in points:
        if not point.x > 0:
            raise SettingError(f"{point.name} has {x_label} of {point.x}; it must be above 0")
    palette = DARK if dark else LIGHT
    best_first = sorted(points, key=lambda point: (-point.accuracy, point.x))
    costs = [point.x for point in best_first]
    heights = [100 * point.accuracy for point in best_first]
    spreads = [100 * point.spread for point in best_first]
    figure = new_figure(8, 5, palette)
    axes = figure.subplots()
    style_panel(axes, "Accuracy", palette)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", color=palette.grid, linewidth=0.8)
    if max(costs) >= 8 * min(costs):
        _log_costs(axes)
    axes.margins(x=0.15, y=0.12)
    axes.errorbar(
        costs, heights, yerr=spreads, fmt="o", color=palette.validation, markersize=6, elinewidth=1.2, capsize=3
    )
    as_percent(axes)
    _name_points(figure, axes, [point.name for point in best_first], costs, heights, spreads, palette)
    return figure


def _log_costs(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _name_points(
    figure: Figure,
    axes: Axes,
    names: Sequence[str],
    costs: Sequence[float],
    heights: Sequence[float],
    spreads: Sequence[float],
    palette: Palette,
) -> None:
    """Write each name at a free place near its point, with a line to it where it is not next to it."""
    names, families = legible([shortened(name, _LONGEST) for name in names])
    words: dict[str, Any] = {"fontsize": 9, "family": families, "parse_math": False, "color": palette.text}
    figure.draw_without_rendering()  # so that the panel has its place
    to_points = _INCH / figure.dpi
    marks = []
    for name, cost, height, spread in zip(names, costs, heights, spreads, strict=True):
        (x, low), (_, high) = axes.transData.transform([(cost, height - spread), (cost, height + spread)]) * to_points
        measured = figure.text(0, 0, name, **words)
        extent = measured.get_window_extent()
        measured.remove()
        marks.append(_Mark(x, (low + high) / 2, (high - low) / 2, extent.width * to_points, extent.height * to_points))
    left, bottom, right, top = (float(edge) * to_points for edge in axes.bbox.extents)
    places = _free_places(marks, (left, bottom, right, top))
    for name, cost, height, place in zip(names, costs, heights, places, strict=True):
        line = {"arrowstyle": "-", "color": palette.quiet, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        label = axes.annotate(
            name,
            (cost, height),
            xytext=place.offset,
            textcoords="offset points",
            ha="center",
            va="center",
            arrowprops=line if place.line else None,
            **words,
        )
        label.set_in_layout(False)  # it was placed within the panel as it is


@dataclass(frozen=True)
class _Mark:
    """A point of the panel, its spread to both sides, and the size of its name, in points."""

    x: float
    y: float
    spread: float
    width: float
    tall: float


@dataclass(frozen=True)
class _Place:
    """Where a name could be, in points.

    Attributes:
        offset: From the point to the middle of the name.
        box: What the name covers.
        line: What a line from the point to the name covers; nothing where the name is next to the point.
    """

    offset: tuple[float, float]
    box: _Box
    line: tuple[_Box, ...]


def _free_places(marks: Sequence[_Mark], panel: _Box) -> list[_Place]:
    """Place the names: first those that have room next to their points, then those with lines, ever farther away."""
    taken = [(mark.x - 5, mark.y - mark.spread - 5, mark.x + 5, mark.y + mark.spread + 5) for mark in marks]
    found: dict[int, _Place] = {}
    for distance in _DISTANCES:
        for index, mark in enumerate(marks):
            near = () if index in found else _places(mark, distance)
            free = next((place for place in near if _in_the_way(place, panel, taken, own=index) < 1e-6), None)
            if free is not None:
                found[index] = free
                taken += [free.box, *free.line]
    for index, mark in enumerate(marks):
        if index not in found:  # there is no room anywhere
            every = [place for distance in _DISTANCES for place in _places(mark, distance)]
            found[index] = min(every, key=lambda place: _in_the_way(place, panel, taken, own=index))
            taken += [found[index].box, *found[index].line]
    return [found[index] for index in range(len(marks))]


def _places(mark: _Mark, distance: float) -> Iterator[_Place]:
    """Yield the places at a distance from a point."""
    for right, up in _DIRECTIONS:
        across, above = right * (mark.width / 2 + distance), up * (mark.tall / 2 + distance)
        x, y = mark.x + across, mark.y + above
        box = (x - mark.width / 2, y - mark.tall / 2, x + mark.width / 2, y + mark.tall / 2)
        along = [(mark.x + share * across, mark.y + share * above) for share in _SHARES]
        beyond = [
            (a, b) for a, b in along if distance > _DISTANCES[0] and not (box[0] < a < box[2] and box[1] < b < box[3])
        ]
        yield _Place((across, above), box, tuple((a - 1, b - 1, a + 1, b + 1) for a, b in beyond))


def _in_the_way(place: _Place, panel: _Box, taken: Sequence[_Box], *, own: int) -> float:
    """Return how many square points of a place are outside of the panel or taken, lines counting five times.

    Its line may run over the spread of its own mark, the one with this index.
    """
    left, bottom, right, top = place.box
    outside = (right - left) * (top - bottom) - _shared([place.box], [panel])
    crossed = _shared(place.line, [*taken[:own], *taken[own + 1 :]]) if place.line and len(taken) > 1 else 0.0
    return outside + _shared([place.box], taken) + 5 * crossed


def _shared(boxes: Sequence[_Box], others: Sequence[_Box]) -> float:
    """Return how many square points boxes and others have in common."""
    ours, theirs = np.array(boxes)[:, None], np.array(others)
    sides = np.minimum(ours[..., 2:], theirs[:, 2:]) - np.maximum(ours[..., :2], theirs[:, :2])
    return float(sides.clip(0).prod(-1).sum())
