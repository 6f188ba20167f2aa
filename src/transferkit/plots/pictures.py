"""Grids of pictures: samples, predictions, the worst mistakes, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from transferkit.exceptions import SettingError
from transferkit.plots._style import DARK, LIGHT, Palette, legible, new_figure, shortened
from transferkit.ranges import check_whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PredictionView", "TopLoss", "plot_heat_maps", "plot_predictions", "plot_samples", "plot_top_losses"]

_LARGEST_PICTURE = 400
_HEAT = "inferno"
_MOST_HEAT = 0.7  # how much of a picture the hottest place covers


@dataclass(frozen=True)
class PredictionView:
    """One picture and what a model said about it.

    Args:
        image: The picture, of any size and mode; of a tensor (C, H, W), uint8 or floats in [0, 1], with more than three
            channels the first three are drawn.
        predicted: Name of the predicted class.
        confidence: The model's probability for it, from 0 to 1.
        actual: Name of the true class, or ``None`` when it is not known.

    Example:
        >>> PredictionView(Image.new("RGB", (8, 8)), "cat", 0.97, actual="dog").is_right
        False
    """

    image: Image.Image | Tensor
    predicted: str
    confidence: float
    actual: str | None = None

    @property
    def is_right(self) -> bool | None:
        """Whether the prediction is the true class; ``None`` when that is not known."""
        return None if self.actual is None else self.predicted == self.actual


@dataclass(frozen=True)
class TopLoss:
    """One labelled picture whose loss is high.

    Args:
        image: The picture, as in :class:`PredictionView`.
        name: Its file name.
        actual: Name of the true class.
        predicted: Name of the predicted class.
        confidence: The model's probability for it, from 0 to 1.
        loss: Cross-entropy in nats.
        heat: What the model looked at, (H, W) from 0 to 1 (:func:`~transferkit.heat_map` gives it), laid over the whole
            picture; ``None`` for the picture alone.

    Example:
        >>> TopLoss(Image.new("RGB", (8, 8)), "cat/1.jpg", "cat", "dog", 0.97, loss=3.5).loss
        3.5
    """

    image: Image.Image | Tensor
    name: str
    actual: str
    predicted: str
    confidence: float
    loss: float
    heat: Tensor | np.ndarray[Any, Any] | None = None


def plot_predictions(items: Sequence[PredictionView], *, columns: int = 4, dark: bool = False) -> Figure:
    """Draw pictures with their predictions: ✓ and green when right, ✗ and red with the true class when wrong.

    Args:
        items: The pictures and their predictions, drawn in this order.
        columns: Pictures per row, 1 or more.
        dark: Whether it is for a dark page.

    Returns:
        A figure as wide as its pictures need, 2.2 inches each.

    Raises:
        SettingError: There are no items, or ``columns`` is below 1.

    Source: ``matplotlib.figure.Figure``; colours by Okabe & Ito 2008.

    Example:
        >>> figure = plot_predictions([PredictionView(Image.new("RGB", (8, 8)), "cat", 0.97, actual="cat")])
        >>> figure.axes[0].get_title()
        '✓ cat, 97 %'
    """
    palette = DARK if dark else LIGHT
    return _picture_grid(
        [_pixels(item.image) for item in items],
        [_said(item.predicted, item.confidence, item.actual) for item in items],
        [_colour(item.is_right, palette) for item in items],
        columns=columns,
        palette=palette,
    )


def plot_samples(
    images: Sequence[Image.Image | Tensor | np.ndarray[Any, Any]],
    labels: Sequence[str],
    *,
    columns: int = 4,
    dark: bool = False,
) -> Figure:
    """Draw pictures with the names of their classes, to look at a data set before training on it.

    Args:
        images: Pillow images, or arrays ``(H, W)`` or ``(H, W, 3)`` or tensors ``(C, H, W)`` of uint8, or of floats in
            [0, 1]; of more than three channels the first three are drawn.
        labels: One class name per image.
        columns: Pictures per row, 1 or more.
        dark: Whether it is for a dark page.

    Returns:
        A figure as wide as its pictures need, 2.2 inches each.

    Raises:
        SettingError: There are no images, another number of labels, or ``columns`` is below 1.

    Source: ``matplotlib.figure.Figure``.

    Example:
        >>> figure = plot_samples([np.zeros((8, 8, 3))] * 2, ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes]
        ['cat', 'dog']
    """
    if len(images) != len(labels):
        raise SettingError(f"{len(images)} images and {len(labels)} labels; give one label per image")
    palette = DARK if dark else LIGHT
    names = [shortened(label) for label in labels]
    return _picture_grid(
        [_pixels(image) for image in images], names, [palette.text] * len(names), columns=columns, palette=palette
    )


def plot_top_losses(items: Sequence[TopLoss], *, columns: int = 4, dark: bool = False) -> Figure:
    """Draw the pictures on which a model does worst, highest loss first: wrong labels are often among them.

    Args:
        items: The pictures, in any order.
        columns: Pictures per row, 1 or more.
        dark: Whether it is for a dark page.

    Returns:
        A figure as wide as its pictures need, 2.2 inches each. Above each picture stand file name, loss, prediction
        with its confidence and, where that is wrong, the true class.

    Raises:
        SettingError: There are no items, or ``columns`` is below 1.

    Source: after fastai's ``plot_top_losses``.

    Example:
        >>> worst = TopLoss(Image.new("RGB", (8, 8)), "cats/1.jpg", "cat", "dog", 0.97, loss=3.51)
        >>> print(plot_top_losses([worst]).axes[0].get_title())
        cats/1.jpg
        loss 3.51
        ✗ dog, 97 %
        (true: cat)
    """
    palette = DARK if dark else LIGHT
    ordered = sorted(items, key=lambda item: item.loss, reverse=True)
    return _picture_grid(
        [_heated(_pixels(item.image), item.heat) for item in ordered],
        [
            f"{_end_of(item.name)}\nloss {item.loss:.2f}\n{_said(item.predicted, item.confidence, item.actual)}"
            for item in ordered
        ],
        [_colour(item.predicted == item.actual, palette) for item in ordered],
        columns=columns,
        palette=palette,
        heated=any(item.heat is not None for item in ordered),
    )


def plot_heat_maps(
    images: Sequence[Image.Image | Tensor | np.ndarray[Any, Any]],
    maps: Sequence[Tensor | np.ndarray[Any, Any]] | Tensor,
    titles: Sequence[str],
    *,
    columns: int = 4,
    dark: bool = False,
) -> Figure:
    """Draw what a model looked at over the pictures: where the map is 0, the picture is as it is.

    Args:
        images: What the model saw, cut as it saw it (:func:`~transferkit.denormalize` makes pictures of a batch); in
            the forms that :func:`plot_samples` takes.
        maps: One map (H, W) per picture, from 0 to 1 (:func:`~transferkit.heat_map`), of any size: each is laid over
            its whole picture.
        titles: One per picture.
        columns: Pictures per row, 1 or more.
        dark: Whether it is for a dark page.

    Returns:
        A figure as wide as its pictures need, 2.2 inches each, the colours explained below.

    Raises:
        SettingError: There are no images, another number of maps or titles, or ``columns`` is below 1.

    Source: the colours are matplotlib's ``inferno``.

    Example:
        >>> figure = plot_heat_maps([np.zeros((8, 8, 3))], [np.eye(4)], ["cat 97 %"])
        >>> figure.axes[0].get_title()
        'cat 97 %'
    """
    if not len(images) == len(maps) == len(titles):
        raise SettingError(
            f"{len(images)} images, {len(maps)} maps and {len(titles)} titles; give one map and one title per image"
        )
    palette = DARK if dark else LIGHT
    return _picture_grid(
        [_heated(_pixels(image), heat) for image, heat in zip(images, maps, strict=True)],
        [shortened(title, 28) for title in titles],
        [palette.text] * len(titles),
        columns=columns,
        palette=palette,
        heated=True,
    )


def _said(predicted: str, confidence: float, actual: str | None) -> str:
    said = f"{shortened(predicted)}, {100 * confidence:.0f} %"
    if actual is None:
        return said
    return f"✓ {said}" if predicted == actual else f"✗ {said}\n(true: {shortened(actual)})"


def _colour(is_right: bool | None, palette: Palette) -> str:
    if is_right is None:
        return palette.text
    return palette.right if is_right else palette.wrong


def _end_of(name: str) -> str:
    """Cut a long file name at its beginning: files of one folder differ at the end."""
    backwards = shortened(" ".join(name.split())[::-1], 26)
    return backwards[::-1]


def _picture_grid(
    pictures: Sequence[np.ndarray[Any, Any]],
    titles: Sequence[str],
    colours: Sequence[str],
    *,
    columns: int,
    palette: Palette,
    heated: bool = False,
) -> Figure:
    """Lay pictures (H, W, 3) out in rows; each keeps its proportions inside a square, so that titles stand in line."""
    if not pictures:
        raise SettingError("there are no pictures to plot; give at least one")
    check_whole_number("columns", columns, at_least=1)
    titles, families = legible(titles)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    lines = 1 + max(title.count("\n") for title in titles)
    figure = new_figure(2.2 * columns, (2.1 + 0.2 * lines) * rows + 0.4 * heated, palette, pad=0.08)
    grid = figure.add_gridspec(rows + heated, columns, height_ratios=[1] * rows + [0.04] * heated)
    for position, (pixels, title, colour) in enumerate(zip(pictures, titles, colours, strict=True)):
        axes = figure.add_subplot(grid[divmod(position, columns)])
        height, width = pixels.shape[:2]
        side = max(height, width)
        axes.imshow(pixels)
        axes.set_xlim((width - side) / 2 - 0.5, (width + side) / 2 - 0.5)
        axes.set_ylim((height + side) / 2 - 0.5, (height - side) / 2 - 0.5)
        axes.set_facecolor(palette.empty)
        axes.set(xticks=[], yticks=[])
        framed = colour != palette.text
        axes.spines[:].set(color=colour if framed else palette.grid, linewidth=2.5 if framed else 1)
        # a class name is no formula, whatever dollar signs it holds
        axes.set_title(title, fontsize=9, color=colour, family=families, parse_math=False)
    if heated:
        _explain_heat(figure, figure.add_subplot(grid[-1, :]), palette)
    return figure


def _explain_heat(figure: Figure, axes: Axes, palette: Palette) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=_HEAT), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 1], labels=["no evidence", "most evidence"])
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=palette.text)
    lowest, highest = axes.get_xticklabels()
    lowest.set_horizontalalignment("left")  # within the bar's width, which may be that of one picture
    highest.set_horizontalalignment("right")


def _pixels(image: Image.Image | Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(image, Tensor):
        image = (image[:3].permute(1, 2, 0) if len(image) > 2 else image[0]).cpu().numpy()
    if isinstance(image, np.ndarray):
        levels = image if image.dtype == np.uint8 else np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
        image = Image.fromarray(levels)
    small = image.convert("RGB")
    # a figure shows a few hundred pixels; whole photographs would only make the file large
    small.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    return np.asarray(small)


def _heated(pixels: np.ndarray[Any, Any], heat: Tensor | np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """Lay a map over a picture, the more opaque the hotter."""
    if heat is None:
        return pixels
    from matplotlib import colormaps

    values = heat.detach().cpu().numpy() if isinstance(heat, Tensor) else heat
    height, width = pixels.shape[:2]
    whole = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    shares = np.clip(np.asarray(whole), 0, 1)
    cover = _MOST_HEAT * shares[..., None]
    mixed = (1 - cover) * pixels + cover * 255 * colormaps[_HEAT](shares)[..., :3]
    return np.asarray(mixed.round(), dtype=np.uint8)
