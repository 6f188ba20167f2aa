"""Pictures of a run: its history, its predictions, its data. Every function returns a matplotlib Figure.

The figures never go through pyplot, so they need no screen, change no global setting and are freed like any object.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from transferkit.exceptions import OutputError, SettingError

if TYPE_CHECKING:
    # matplotlib takes a third of a second to import, so only drawing pays for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PredictionView", "plot_history", "plot_lr_finding", "plot_predictions", "plot_samples", "save_figure"]

# Okabe & Ito 2008: told apart by colour-blind readers too
_TRAIN, _VALIDATION, _RIGHT, _WRONG = "#E69F00", "#0072B2", "#009E73", "#D55E00"
_TEXT, _QUIET, _GRID, _EMPTY = "#262626", "#7F7F7F", "#E6E6E6", "#F2F2F2"
_COMPARED = (("#7F7F7F", "s"), ("#A6A6A6", "^"), ("#595959", "D"), ("#BFBFBF", "v"))
_FONT = "DejaVu Sans"  # comes with matplotlib
_TITLE_PAD = 12  # points; room for the ring around a best epoch of 100 %
_LONGEST_NAME = 18
_LARGEST_PICTURE = 400
_MOST_MARKERS = 40
_FORMATS = (".png", ".svg", ".pdf")


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


def plot_history(
    records: Sequence[Mapping[str, float]],
    *,
    unfreeze_epochs: Sequence[int] = (),
    compare: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> Figure:
    """Draw loss and validation accuracy over the epochs, the best epoch ringed.

    Args:
        records: One mapping per epoch with ``epoch`` (from 1), ``train_loss``, ``val_loss`` and ``val_accuracy``
            (a share from 0 to 1); other keys are not drawn.
        unfreeze_epochs: Epochs, counted as in ``records``, that began with an unfreezing; a dotted line each.
        compare: Records of other runs by name; their validation curves are drawn grey and dashed.

    Returns:
        A figure of two panels, 9 × 3.8 inches.

    Raises:
        SettingError: A run has no records, or a record lacks a value.

    Source: ``matplotlib.figure.Figure``.

    Example:
        >>> figure = plot_history([{"epoch": 1, "train_loss": 0.9, "val_loss": 0.7, "val_accuracy": 0.8}])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['Loss', 'Validation accuracy']
    """
    from matplotlib.figure import Figure

    others = dict(compare or {})
    for name, run in (("this run", records), *others.items()):
        _require_drawable(name, run)
    figure = Figure(figsize=(9, 3.8), layout="constrained", facecolor="white")
    loss, accuracy = figure.subplots(1, 2)

    for (name, run), (colour, marker) in zip(others.items(), _cycled(_COMPARED, len(others)), strict=True):
        style = {"color": colour, "linestyle": "--", "marker": marker, "linewidth": 1.4, "markersize": 3.5}
        # matplotlib leaves labels that begin with _ out of its legends
        _curve(loss, run, "val_loss", label=_shortened(name).lstrip("_") or "run", **style)
        _curve(accuracy, run, "val_accuracy", **style)
    solid = {"marker": "o", "linewidth": 2, "markersize": 4}
    _curve(loss, records, "train_loss", label="train", color=_TRAIN, **solid)
    _curve(loss, records, "val_loss", label="validation", color=_VALIDATION, **solid)
    _curve(accuracy, records, "val_accuracy", color=_VALIDATION, **solid)

    # As History.best does: where accuracies tie, the lower validation loss wins.
    best = max(records, key=lambda record: (record["val_accuracy"], -record["val_loss"]))
    ring = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    _curve(loss, [best], "val_loss", label="best epoch", color=_TEXT, **ring)
    _curve(accuracy, [best], "val_accuracy", color=_TEXT, **ring)
    for axes in (loss, accuracy):
        for index, epoch in enumerate(unfreeze_epochs):
            label = "unfreeze" if index == 0 and axes is loss else None
            axes.axvline(epoch, color=_QUIET, linestyle=":", linewidth=1.4, zorder=1, label=label)

    epochs = [record["epoch"] for run in (records, *others.values()) for record in run]
    _style_panel(loss, "Loss", epochs)
    _style_panel(accuracy, "Validation accuracy", epochs)
    _as_percent(accuracy)
    headline = f"best {100 * best['val_accuracy']:.1f} % at epoch {best['epoch']:.0f}"
    accuracy.set_title(headline, loc="right", fontsize=10, color=_VALIDATION, pad=_TITLE_PAD)
    handles, labels = loss.get_legend_handles_labels()
    # the run first, the runs it is compared with last
    handles, labels = handles[len(others) :] + handles[: len(others)], labels[len(others) :] + labels[: len(others)]
    labels, families = _legible(labels)
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        labelcolor=_TEXT,
        prop={"family": families, "size": 9.5},
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def plot_predictions(items: Sequence[PredictionView], *, columns: int = 4) -> Figure:
    """Draw pictures with their predictions: ✓ and green when right, ✗ and red with the true class when wrong.

    Args:
        items: The pictures and their predictions, drawn in this order.
        columns: Pictures per row, 1 or more.

    Returns:
        A figure as wide as its pictures need, 2.2 inches each.

    Raises:
        SettingError: There are no items, or ``columns`` is below 1.

    Source: ``matplotlib.figure.Figure``; colours by Okabe & Ito 2008.

    Example:
        >>> figure = plot_predictions([PredictionView(Image.new("RGB", (8, 8)), "cat", 0.97, actual="cat")])
        >>> figure.axes[0].get_title()
        '✓ cat 97 %'
    """
    return _picture_grid(
        [item.image for item in items],
        [_prediction_title(item) for item in items],
        [_TEXT if item.is_right is None else _RIGHT if item.is_right else _WRONG for item in items],
        columns=columns,
    )


def plot_samples(
    images: Sequence[Image.Image | Tensor | np.ndarray[Any, Any]], labels: Sequence[str], *, columns: int = 4
) -> Figure:
    """Draw pictures with the names of their classes, to look at a data set before training on it.

    Args:
        images: Pillow images, or arrays ``(H, W)`` or ``(H, W, 3)`` or tensors ``(C, H, W)`` of uint8, or of floats in
            [0, 1]; of more than three channels the first three are drawn.
        labels: One class name per image.
        columns: Pictures per row, 1 or more.

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
    return _picture_grid(images, [_shortened(label) for label in labels], [_TEXT] * len(labels), columns=columns)


def plot_lr_finding(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], *, suggestion: float
) -> Figure:
    """Draw the losses of a learning rate range test over the learning rate, the suggestion marked.

    Args:
        lrs: Learning rate of each step, rising.
        losses: Loss of each step.
        smoothed: The same, smoothed.
        suggestion: One of ``lrs``.

    Returns:
        A figure of one panel, 6 × 3.8 inches.

    Example:
        >>> figure = plot_lr_finding([0.01, 0.1, 1.0], [2.0, 1.0, 3.0], [1.8, 1.4, 2.2], suggestion=0.1)
        >>> figure.axes[0].get_title(loc="right")
        'suggested lr 0.1'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _style_panel(axes, "Loss", lrs)
    axes.set_xscale("log")
    axes.set_xlim(lrs[0], lrs[-1])
    axes.set_xlabel("learning rate of the head", fontsize=9.5, color=_TEXT)
    axes.plot(lrs, losses, color=_TRAIN, linewidth=1, alpha=0.6, label="each batch")
    axes.plot(lrs, smoothed, color=_VALIDATION, linewidth=2, label="smoothed")
    axes.axvline(suggestion, color=_QUIET, linestyle=":", linewidth=1.4, zorder=1)
    height = smoothed[lrs.index(suggestion)]
    ring: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot([suggestion], [height], color=_TEXT, label="suggestion", **ring)
    # the explosion at the end would press all that matters into a line
    before = max(smoothed[: int(np.argmin(smoothed)) + 1])
    axes.set_ylim(0, min(max(losses), 2 * before) * 1.05)
    axes.set_title(f"suggested lr {suggestion:.2g}", loc="right", fontsize=10, color=_VALIDATION)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=_TEXT)
    return figure


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a figure at 144 dots per inch, nothing cut off; missing parent folders are made.

    Args:
        figure: Any matplotlib figure.
        path: File to write; its extension, ``.png``, ``.svg`` or ``.pdf``, is the format.

    Returns:
        The path written.

    Raises:
        SettingError: The extension is none of the three.
        OutputError: The file cannot be written.

    Source: ``matplotlib.figure.Figure.savefig``.

    Example:
        >>> import tempfile
        >>> figure = plot_samples([np.zeros((8, 8, 3))], ["cat"])
        >>> save_figure(figure, Path(tempfile.mkdtemp()) / "plots" / "samples.png").name
        'samples.png'
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise SettingError(f"cannot write a figure to {path.name!r}; its extension can be {', '.join(_FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a layout, as ours have, keeps all inside; looking for what sticks out draws everything a second time
        box = "tight" if figure.get_layout_engine() is None else None
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=144, bbox_inches=box)
    except OSError as error:
        raise OutputError(f"cannot write the figure {path}: {error}") from error
    return path


def _require_drawable(name: str, run: Sequence[Mapping[str, float]]) -> None:
    if not run:
        raise SettingError(f"{name} has no records; train at least one epoch before plotting")
    for record in run:
        for key in ("epoch", "train_loss", "val_loss", "val_accuracy"):
            if key not in record:
                raise SettingError(f"a record of {name} has no {key!r}; it has {', '.join(record)}")


def _cycled(styles: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [styles[index % len(styles)] for index in range(count)]


def _curve(axes: Axes, run: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    scale = 100 if key == "val_accuracy" else 1
    if len(run) > _MOST_MARKERS:
        style = {**style, "marker": ""}
    # unclipped, so that points on the edge of a panel stay whole
    epochs, values = [record["epoch"] for record in run], [scale * record[key] for record in run]
    axes.plot(epochs, values, zorder=3, clip_on=False, **style)


def _style_panel(axes: Axes, title: str, epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_TEXT, pad=_TITLE_PAD)
    axes.set_xlabel("epoch", fontsize=9.5, color=_TEXT)
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_facecolor("white")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_QUIET)
    axes.tick_params(axis="both", labelsize=9, colors=_TEXT, length=0)
    axes.tick_params(axis="x", length=3, color=_QUIET)


def _as_percent(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    axes.yaxis.set_major_formatter("{x:g} %")


def _prediction_title(item: PredictionView) -> str:
    said = f"{_shortened(item.predicted)} {100 * item.confidence:.0f} %"
    if item.actual is None:
        return said
    if item.is_right:
        return f"✓ {said}"
    return f"✗ {said}\n(true: {_shortened(item.actual)})"


def _picture_grid(
    images: Sequence[Image.Image | Tensor | np.ndarray[Any, Any]],
    titles: Sequence[str],
    colours: Sequence[str],
    *,
    columns: int,
) -> Figure:
    """Lay pictures out in rows; each keeps its proportions inside a square, so that titles stand in line."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not images:
        raise SettingError("there are no pictures to plot; give at least one")
    if columns < 1:
        raise SettingError(f"columns={columns}; it must be 1 or more")
    titles, families = _legible(titles)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = 1 + max(title.count("\n") for title in titles)
    figure = Figure(
        figsize=(2.2 * columns, (2.1 + 0.2 * lines) * rows),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
        facecolor="white",
    )
    for position, (image, title, colour) in enumerate(zip(images, titles, colours, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, position)
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        side = max(height, width)
        axes.imshow(pixels)
        axes.set_xlim((width - side) / 2 - 0.5, (width + side) / 2 - 0.5)
        axes.set_ylim((height + side) / 2 - 0.5, (height - side) / 2 - 0.5)
        axes.set_facecolor(_EMPTY)
        axes.set(xticks=[], yticks=[])
        framed = colour != _TEXT
        axes.spines[:].set(color=colour if framed else _GRID, linewidth=2.5 if framed else 1)
        # a class name is no formula, whatever dollar signs it holds
        axes.set_title(title, fontsize=9, color=colour, family=families, parse_math=False)
    return figure


def _pixels(image: Image.Image | Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(image, Tensor):
        image = (image[:3].permute(1, 2, 0) if len(image) > 2 else image[0]).numpy()
    if isinstance(image, np.ndarray):
        levels = image if image.dtype == np.uint8 else np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
        image = Image.fromarray(levels)
    small = image.convert("RGB")
    # a figure shows a few hundred pixels; whole photographs would only make the file large
    small.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    return np.asarray(small)


def _shortened(name: str) -> str:
    """Cut a long name with …, counting wide (East Asian) characters twice."""
    name = " ".join(name.split())
    widths = np.cumsum([2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name])
    if not len(name) or widths[-1] <= _LONGEST_NAME:
        return name
    return name[: int(np.searchsorted(widths, _LONGEST_NAME - 1, side="right"))].rstrip() + "…"


def _legible(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find fonts for any script.

    Letters that no installed font has become □, or matplotlib would warn at every later drawing of the figure.

    Returns:
        The texts to draw and the font families to draw them with.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    missing = set("".join(texts)) - {"\n"} - _letters_of(findfont(FontProperties(family=[_FONT])))
    families = [_FONT]
    for entry in sorted(fontManager.ttflist, key=lambda entry: str(entry.name)):
        # a "last resort" font claims all letters and draws placeholders
        if not missing or "lastresort" in entry.name.replace(" ", "").lower():
            continue
        if missing & _letters_of(entry.fname):
            # text finds its font by family, which may be another file than this one
            found = missing & _letters_of(findfont(FontProperties(family=[entry.name])))
            families += [entry.name] if found else []
            missing -= found
    return ["".join("□" if letter in missing else letter for letter in text) for text in texts], families


def _letters_of(font_file: str) -> set[str]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(font_file)
    except (OSError, RuntimeError, ValueError):
        return set()  # a damaged font file is as good as none
    # matplotlib cannot draw the bitmaps that some emoji fonts are made of
    return set(map(chr, font.get_charmap())) if font.scalable else set()
