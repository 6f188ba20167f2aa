"""Curves over time: loss and accuracy per epoch, loss per step, learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transferkit.exceptions import SettingError
from transferkit.plots._style import (
    DARK,
    LIGHT,
    Palette,
    as_percent,
    counted_axis,
    legend_below,
    new_figure,
    shortened,
    style_panel,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_history", "plot_lr_finding", "plot_lrs", "plot_steps"]

_MARKERS = ("s", "^", "D", "v")
_RING: Mapping[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
_MOST_MARKERS = 40
_MOST_STAGES = 11


def plot_history(
    records: Sequence[Mapping[str, float]],
    *,
    unfreeze_epochs: Sequence[int] = (),
    compare: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    dark: bool = False,
) -> Figure:
    """Draw loss and validation accuracy over the epochs, the best epoch ringed.

    Args:
        records: One mapping per epoch with ``epoch`` (from 1), ``train_loss``, ``val_loss`` and ``val_accuracy``
            (a share from 0 to 1); other keys are not drawn.
        unfreeze_epochs: Epochs, counted as in ``records``, that began with an unfreezing; a dotted line each.
        compare: Records of other runs by name; their validation curves are drawn grey and dashed.
        dark: Whether it is for a dark page.

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
    palette = DARK if dark else LIGHT
    others = dict(compare or {})
    for name, run in (("this run", records), *others.items()):
        _require_drawable(name, run)
    figure = new_figure(9, 3.8, palette)
    loss, accuracy = figure.subplots(1, 2)

    for index, (name, run) in enumerate(others.items()):
        marker = _MARKERS[index % len(_MARKERS)]
        colour = palette.compared[index % len(palette.compared)]
        style = {"color": colour, "linestyle": "--", "marker": marker, "linewidth": 1.4, "markersize": 3.5}
        # matplotlib leaves labels that begin with _ out of its legends
        _curve(loss, run, "val_loss", label=shortened(name).lstrip("_") or "run", **style)
        _curve(accuracy, run, "val_accuracy", **style)
    solid = {"marker": "o", "linewidth": 2, "markersize": 4}
    _curve(loss, records, "train_loss", label="train", color=palette.train, **solid)
    _curve(loss, records, "val_loss", label="validation", color=palette.validation, **solid)
    _curve(accuracy, records, "val_accuracy", color=palette.validation, **solid)

    # As History.best does: where accuracies tie, the lower validation loss wins.
    best = max(records, key=lambda record: (record["val_accuracy"], -record["val_loss"]))
    _curve(loss, [best], "val_loss", label="best epoch", color=palette.text, **_RING)
    _curve(accuracy, [best], "val_accuracy", color=palette.text, **_RING)
    _mark_unfreezing(loss, unfreeze_epochs, palette, label="unfreeze")
    _mark_unfreezing(accuracy, unfreeze_epochs, palette)

    epochs = [record["epoch"] for run in (records, *others.values()) for record in run]
    headline = f"best {100 * best['val_accuracy']:.1f} % at epoch {best['epoch']:.0f}"
    style_panel(loss, "Loss", palette)
    style_panel(accuracy, "Validation accuracy", palette, headline=headline)
    for axes in (loss, accuracy):
        counted_axis(axes, "epoch", min(epochs), max(epochs))
    as_percent(accuracy)
    handles, labels = loss.get_legend_handles_labels()
    # the run first, the runs it is compared with last
    count = len(others)
    legend_below(figure, handles[count:] + handles[:count], labels[count:] + labels[:count], palette)
    return figure


def plot_steps(losses: Sequence[float], *, unfreeze_steps: Sequence[int] = (), dark: bool = False) -> Figure:
    """Draw the training loss of each optimizer step, and the same smoothed.

    Each smoothed loss is the mean over the steps around it, a fiftieth of all before it and after it. Single steps
    with a loss over twice the largest smoothed one are drawn beyond the upper edge.

    Args:
        losses: Mean loss of each step's pictures, first step first (:class:`~transferkit.StepRecorder` keeps them);
            NaN where it is not known.
        unfreeze_steps: Steps, counted from 1, that began with an unfreezing; a dotted line each.
        dark: Whether it is for a dark page.

    Returns:
        A figure of one panel, 9 × 3.8 inches.

    Raises:
        SettingError: There is no loss.

    Source: ``matplotlib.figure.Figure``.

    Example:
        >>> figure = plot_steps([2.0, 1.5, 1.0, 0.5], unfreeze_steps=[3])
        >>> figure.axes[0].get_title(loc="right")
        'from 1.75 to 0.75, smoothed'
    """
    palette = DARK if dark else LIGHT
    values = np.where(np.isfinite(losses), np.asarray(losses, dtype=float), np.nan)
    if np.isnan(values).all():
        raise SettingError("there are no losses to plot; train at least one step with a StepRecorder")
    smooth = _smoothed(values)
    figure = new_figure(9, 3.8, palette)
    axes = figure.subplots()
    steps = np.arange(1, len(values) + 1)
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) <= _MOST_MARKERS else {}
    axes.plot(steps, values, color=palette.train, linewidth=1, alpha=0.6, label="each step", **marker)
    axes.plot(steps, smooth, color=palette.validation, linewidth=2, label="smoothed")
    _mark_unfreezing(axes, unfreeze_steps, palette, label="unfreeze")
    low, high = np.nanmin(values), min(np.nanmax(values), 2 * np.nanmax(smooth))
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    known = smooth[~np.isnan(smooth)]
    headline = f"from {known[0]:.3g} to {known[-1]:.3g}, smoothed"
    style_panel(axes, "Training loss per step", palette, headline=headline)
    counted_axis(axes, "step", 1, len(values))
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles, labels, palette)
    return figure


def plot_lrs(
    lrs: Mapping[str, Sequence[float | None]], *, unfreeze_steps: Sequence[int] = (), dark: bool = False
) -> Figure:
    """Draw the learning rate of each stage over the optimizer steps, with gaps where it is frozen.

    Neighbouring stages that always have one rate share a line. The lowest 2 % of the rates may be below the lower edge.

    Args:
        lrs: The rates of each step by stage name, stages in execution order (:class:`~transferkit.StepRecorder` keeps
            them); ``None``, NaN or 0 where a stage does not learn.
        unfreeze_steps: Steps, counted from 1, that began with an unfreezing; a dotted line each.
        dark: Whether it is for a dark page.

    Returns:
        A figure of one panel, 9 × 3.8 inches, higher where many stages are named; its vertical axis is logarithmic.

    Raises:
        SettingError: No stage has a rate above 0, or stages have different numbers of steps.

    Source: ``matplotlib.figure.Figure``.

    Example:
        >>> figure = plot_lrs({"stem": [None, 1e-5], "stage1": [None, 1e-5], "head": [1e-3, 1e-3]})
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['head', 'stem – stage1']
    """
    from matplotlib import colormaps

    palette = DARK if dark else LIGHT
    rates = {name: np.asarray([each or math.nan for each in series], dtype=float) for name, series in lrs.items()}
    counts = sorted({len(series) for series in rates.values()})
    if len(counts) > 1:
        raise SettingError(f"the stages have learning rates of {', '.join(map(str, counts))} steps; give all as many")
    if all(np.isnan(series).all() for series in rates.values()):
        raise SettingError("no stage has a learning rate above 0; train at least one step with a StepRecorder")
    groups = _alike(rates)
    rows = math.ceil((min(len(groups), _MOST_STAGES) + bool(unfreeze_steps)) / 6)
    figure = new_figure(9, 3.6 + 0.2 * rows, palette)
    axes = figure.subplots()
    axes.set_yscale("log")
    style_panel(axes, "Learning rate per stage", palette)
    shades = colormaps["viridis"](np.linspace(0.35, 1, len(groups)) if dark else np.linspace(0, 0.85, len(groups)))
    # where lines lie on each other, the thinner, later one lets the thicker be seen
    widths = np.linspace(1.5, 3.5 if 1 < len(groups) <= 6 else 1.5, len(groups))
    steps = np.arange(1, counts[0] + 1)
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) <= _MOST_MARKERS else {}
    for (name, series), shade, width in reversed(list(zip(groups.items(), shades, widths, strict=True))):
        label = f"{name} (frozen)" if np.isnan(series).all() else name
        axes.plot(steps, series, color=shade, linewidth=width, label=label, **marker)
    _mark_unfreezing(axes, unfreeze_steps, palette, label="unfreeze")
    every = np.concatenate(list(rates.values()))
    highest = np.nanmax(every)
    # the last steps of a cosine, near 0, would take most of a logarithmic axis
    axes.set_ylim(0.7 * min(np.nanpercentile(every, 2), highest / 10), 1.4 * highest)
    counted_axis(axes, "step", 1, counts[0])
    handles, labels = axes.get_legend_handles_labels()
    named = [*reversed(range(len(groups))), *range(len(groups), len(handles))]  # the first stage first
    if len(groups) > _MOST_STAGES:  # the shades run from the first to the last, so some of them tell the others
        kept = np.linspace(0, len(groups) - 1, _MOST_STAGES).round().astype(int)
        named = [named[index] for index in kept] + named[len(groups) :]
    legend_below(figure, [handles[each] for each in named], [labels[each] for each in named], palette)
    return figure


def plot_lr_finding(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    *,
    suggestion: float,
    dark: bool = False,
) -> Figure:
    """Draw the losses of a learning rate range test over the learning rate, the suggestion marked.

    Args:
        lrs: Learning rate of each step, rising.
        losses: Loss of each step.
        smoothed: The same, smoothed.
        suggestion: Within ``lrs``.
        dark: Whether it is for a dark page.

    Returns:
        A figure of one panel, 6 × 3.8 inches.

    Example:
        >>> figure = plot_lr_finding([0.01, 0.1, 1.0], [2.0, 1.0, 3.0], [1.8, 1.4, 2.2], suggestion=0.1)
        >>> figure.axes[0].get_title(loc="right")
        'suggested lr 0.1'
    """
    palette = DARK if dark else LIGHT
    figure = new_figure(6, 3.8, palette)
    axes = figure.subplots()
    axes.set_xscale("log")
    style_panel(axes, "Loss", palette, headline=f"suggested lr {suggestion:.2g}")
    axes.set_xlim(lrs[0], lrs[-1])
    axes.set_xlabel("learning rate of the head")
    axes.plot(lrs, losses, color=palette.train, linewidth=1, alpha=0.6, label="each batch")
    axes.plot(lrs, smoothed, color=palette.validation, linewidth=2, label="smoothed")
    axes.axvline(suggestion, color=palette.quiet, linestyle=":", linewidth=1.4, zorder=1)
    height = np.interp(np.log(suggestion), np.log(lrs), smoothed)
    axes.plot([suggestion], [height], color=palette.text, label="suggestion", **_RING)
    # the explosion at the end would press all that matters into a line
    before = max(smoothed[: int(np.argmin(smoothed)) + 1])
    axes.set_ylim(0, min(max(losses), 2 * before) * 1.05)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=palette.text)
    return figure


def _require_drawable(name: str, run: Sequence[Mapping[str, float]]) -> None:
    if not run:
        raise SettingError(f"{name} has no records; train at least one epoch before plotting")
    for record in run:
        for key in ("epoch", "train_loss", "val_loss", "val_accuracy"):
            if key not in record:
                raise SettingError(f"a record of {name} has no {key!r}; it has {', '.join(record)}")


def _curve(axes: Axes, run: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    scale = 100 if key == "val_accuracy" else 1
    if len(run) > _MOST_MARKERS:
        style = {**style, "marker": ""}
    # unclipped, so that points on the edge of a panel stay whole
    epochs, values = [record["epoch"] for record in run], [scale * record[key] for record in run]
    axes.plot(epochs, values, zorder=3, clip_on=False, **style)


def _mark_unfreezing(axes: Axes, places: Sequence[int], palette: Palette, *, label: str | None = None) -> None:
    for index, place in enumerate(places):
        name = label if index == 0 else None
        axes.axvline(place, color=palette.quiet, linestyle=":", linewidth=1.4, zorder=1, label=name)


def _smoothed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Average what is known around each known value, in a time that does not grow with the reach."""
    places, reach = np.arange(len(values)), max(1, len(values) // 50)
    first, behind = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    known = ~np.isnan(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(known, values, 0), known))
    means: np.ndarray[Any, Any] = np.full(len(values), np.nan)
    np.divide(sums[behind] - sums[first], counts[behind] - counts[first], out=means, where=known)
    return means


def _alike(rates: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Join neighbouring stages with equal rates; they are named by the first and the last."""
    joined: list[tuple[str, str, np.ndarray[Any, Any]]] = []
    for name, series in rates.items():
        if joined and np.array_equal(joined[-1][2], series, equal_nan=True):
            joined[-1] = (joined[-1][0], name, series)
        else:
            joined.append((name, name, series))
    return {first if first == last else f"{first} – {last}": series for first, last, series in joined}
