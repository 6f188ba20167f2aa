"""What a drawn figure shows: its words, where they are, and what is wrong with their places."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def words(figure: Figure) -> list[tuple[str, Bbox]]:
    """Draw a figure; return every text that is seen, with its place in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = {
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not (axes.axison and low <= tick.get_loc() <= high)
    }
    found = figure.findobj(lambda each: isinstance(each, Text) and each.get_visible() and bool(each.get_text().strip()))
    shown = {id(each): each for each in found if id(each) not in unseen}
    # without the lines that lead from a name to its point
    return [(each.get_text(), Text.get_window_extent(each, canvas.get_renderer())) for each in shown.values()]


def misplaced(figure: Figure) -> list[str]:
    """Name the texts that stick out of a figure, and those that lie on each other by more than a pixel."""
    seen, whole = words(figure), figure.bbox
    wrong = [
        f"{text!r} sticks out"
        for text, box in seen
        if box.x0 < whole.x0 - 0.5 or box.y0 < whole.y0 - 0.5 or box.x1 > whole.x1 + 0.5 or box.y1 > whole.y1 + 0.5
    ]
    wrong += [
        f"{one!r} lies on {other!r}"
        for (one, first), (other, second) in combinations(seen, 2)
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]
    return wrong


def points(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """Return the places of every line of a panel."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def legend_names(figure: Figure) -> list[str]:
    """Return what the legend below the panels names."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def run(accuracies: list[float]) -> list[dict[str, float]]:
    """Make the records of a run whose losses fall."""
    return [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "val_accuracy": accuracy, "seconds": 1.0}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
