"""Which classes are taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from transferkit.exceptions import SettingError
from transferkit.plots._style import (
    DARK,
    LIGHT,
    TITLE_PAD,
    Palette,
    legible,
    new_figure,
    shortened,
    style_panel,
    width_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_confusion"]

_MOST_NUMBERED = 20  # classes; of more, the numbers would not fit into the cells
_MOST_PAIRS = 20
_LIST = 4.2  # inches
_INCH = 72  # points


def plot_confusion(
    matrix: Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float]],
    class_names: Sequence[str],
    *,
    shares: bool = False,
    dark: bool = False,
) -> Figure:
    """Draw a confusion matrix: a row per true class, a column per predicted class.

    A cell's colour is its share of the row, so that large and small classes compare; it rises with the square root, so
    that few mistakes among many pictures are seen. Up to 20 classes have their numbers in the cells. Of more, the pairs
    that are confused most are listed instead.

    Args:
        matrix: (C, C) numbers of pictures, 0 or more; row ``i``, column ``j``: of class ``i``, predicted as ``j``
            (``sklearn.metrics.confusion_matrix`` gives it).
        class_names: C names, in the same order.
        shares: Whether the numbers are percent of the row instead of pictures.
        dark: Whether it is for a dark page.

    Returns:
        A figure that grows with the number of classes, to 18 inches at most. Where rows are too low for a name, every
        second, third … class is named.

    Raises:
        SettingError: The matrix is not square, has negative numbers or no pictures, or has another number of names.

    Source: ``sklearn.metrics.ConfusionMatrixDisplay`` has the same rows and columns.

    Example:
        >>> figure = plot_confusion([[9, 1], [2, 8]], ["ant", "bee"])
        >>> figure.axes[0].get_title(loc="right"), [text.get_text() for text in figure.axes[0].texts]
        ('accuracy 85.0 %', ['9', '1', '2', '8'])
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    counts = _checked(matrix, class_names)
    palette = DARK if dark else LIGHT
    classes = len(counts)
    totals = counts.sum(1, keepdims=True)
    parts = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    names, families = legible([shortened(name, 28) for name in class_names])

    side = min(max(0.5 * classes, 3.0), 10.0)
    cell = side * _INCH / classes
    size = min(9.0, max(5.0, 0.75 * cell))
    longest = max(map(width_of, names)) * 0.6 * size / _INCH
    upright = longest * _INCH <= 0.95 * cell
    listed = classes > _MOST_NUMBERED
    wide, tall = side + longest + 1.6, side + (0.2 if upright else longest) + 0.95
    figure = new_figure(wide + _LIST * listed, tall, palette)
    axes, *rest = figure.subplots(1, 1 + listed, width_ratios=[wide, _LIST][: 1 + listed], squeeze=False)[0]

    shades = LinearSegmentedColormap.from_list("share", [palette.background, palette.validation])
    image = axes.imshow(
        parts,
        cmap=shades.with_extremes(bad=palette.empty),
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        aspect="auto",
        interpolation="none",
    )
    accuracy = 100 * np.trace(counts) / counts.sum()
    style_panel(axes, "Confusion matrix", palette, headline=f"accuracy {accuracy:.1f} %")
    axes.grid(visible=False)
    axes.spines[:].set(visible=True, color=palette.grid)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    named = range(0, classes, math.ceil(1.2 * size / cell))
    words: dict[str, Any] = {"fontsize": size, "family": families, "parse_math": False, "color": palette.text}
    slanted = {} if upright else {"rotation": 90}
    axes.set_xticks(named, labels=[names[each] for each in named], **words, **slanted)
    axes.set_yticks(named, labels=[names[each] for each in named], **words)
    axes.tick_params(length=0)
    if listed:
        _list_pairs(rest[0], counts, parts, class_names, shares=shares, palette=palette)
    else:
        _write_numbers(axes, counts, parts, image.to_rgba(parts), shares=shares, cell=cell)
    bar = figure.colorbar(image, ax=axes, fraction=0.2 / side, aspect=side / 0.15, pad=0.01)
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1], labels=["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.ax.tick_params(length=0, labelsize=8, colors=palette.text)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", fontsize=9, color=palette.text)
    return figure


def _checked(
    matrix: Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float]], class_names: Sequence[str]
) -> np.ndarray[Any, Any]:
    counts = np.asarray(matrix.cpu() if isinstance(matrix, Tensor) else matrix, dtype=float)
    if counts.shape != (len(class_names), len(class_names)):
        raise SettingError(
            f"a confusion matrix of shape {counts.shape} does not fit {len(class_names)} class names; give one row and "
            "one column per class"
        )
    if not (counts >= 0).all() or not counts.sum() > 0:
        raise SettingError(
            "a confusion matrix counts pictures: give numbers of 0 or more, at least one of them above 0"
        )
    return counts


def _number(count: float, part: float, *, shares: bool) -> str:
    if not count:
        return ""
    return f"{count:,.10g}" if not shares else f"{100 * part:.0f} %" if part >= 0.005 else "<1 %"


def _write_numbers(
    axes: Axes,
    counts: np.ndarray[Any, Any],
    parts: np.ndarray[Any, Any],
    shown: np.ndarray[Any, Any],
    *,
    shares: bool,
    cell: float,
) -> None:
    """Write into each cell that is not 0, as large as the longest number allows."""
    numbers = {
        place: _number(float(count), float(parts[place]), shares=shares) for place, count in np.ndenumerate(counts)
    }
    size = min(11.0, 0.9 * cell / (0.65 * max(map(len, numbers.values()))))
    brightness = shown[..., :3] @ np.array([0.299, 0.587, 0.114])
    for (row, column), number in numbers.items():
        if number:
            ink = LIGHT.text if brightness[row, column] > 0.5 else "#FFFFFF"
            axes.text(column, row, number, ha="center", va="center", fontsize=size, color=ink)


def _list_pairs(
    axes: Axes,
    counts: np.ndarray[Any, Any],
    parts: np.ndarray[Any, Any],
    class_names: Sequence[str],
    *,
    shares: bool,
    palette: Palette,
) -> None:
    """Write down which mistakes are most frequent, in pictures or by their share of the true class."""
    axes.set_axis_off()
    title = f"Most confused, {'of the true class' if shares else 'in pictures'}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=palette.text, pad=TITLE_PAD)
    mistakes = np.where(np.eye(len(counts), dtype=bool), 0, np.nan_to_num(parts) if shares else counts)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
    worst = [divmod(int(place), len(counts)) for place in order if mistakes.flat[place] > 0]
    names = {each: shortened(class_names[each], 24) for pair in worst for each in pair}
    pairs, families = legible([f"{names[row]} → {names[column]}" for row, column in worst])
    numbers = [_number(float(counts[place]), float(parts[place]), shares=shares) for place in worst]
    words: dict[str, Any] = {"va": "top", "fontsize": 9, "linespacing": 1.7, "color": palette.text, "family": families}
    axes.text(0.12, 1, "\n".join(numbers), ha="right", transform=axes.transAxes, **words)
    axes.text(0.16, 1, "\n".join(pairs) or "no mistakes", parse_math=False, transform=axes.transAxes, **words)
