"""Whether a model is right as often as it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from transferkit.plots._style import DARK, LIGHT, legend_below, new_figure, style_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_reliability"]


def plot_reliability(
    confidences: Tensor | Sequence[float],
    right: Tensor | Sequence[bool],
    *,
    calibrated: Tensor | Sequence[float] | None = None,
    bins: int = 15,
    dark: bool = False,
) -> Figure:
    """Draw a reliability diagram: accuracy over confidence, and how many pictures have each confidence.

    On the diagonal a model is right as often as it says; below, it is too sure of itself. A point stands for the
    pictures of one bin, at their mean confidence.

    Args:
        confidences: (N,) probability of the likeliest class, 0 to 1.
        right: (N,) whether that class is the right one.
        calibrated: (N,) confidences of the same answers after calibration, drawn beside them; ``None`` for none.
        bins: How many of equal width, 1 or more.
        dark: Whether it is for a dark page.

    Returns:
        A figure of two panels, 5.4 × 5.6 inches; the legend gives the expected calibration error (ECE).

    Raises:
        SettingError: The three do not belong together, a confidence is outside 0 to 1, or there is no bin.
        DataError: There is no picture.

    Source: Guo et al. 2017, "On calibration of modern neural networks", figure 1.

    Example:
        >>> figure = plot_reliability([0.9, 0.9, 0.6, 0.6], [True, True, True, False], bins=5)
        >>> figure.legends[0].get_texts()[1].get_text()
        'the model, ECE 10.0 %'
    """
    from matplotlib.ticker import MaxNLocator

    from transferkit.calibration import reliability

    palette = DARK if dark else LIGHT
    series = [("the model", confidences, palette.validation)]
    if calibrated is not None:
        series = [("before", confidences, palette.train), ("calibrated", calibrated, palette.validation)]
    figure = new_figure(5.4, 5.6, palette)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    style_panel(above, "Reliability", palette)
    style_panel(below, "Pictures", palette)
    above.plot([0, 100], [0, 100], color=palette.quiet, linestyle=":", linewidth=1.4, label="as right as it says")
    for position, (name, values, colour) in enumerate(series):
        found = reliability(values, right, bins=bins)
        held = np.array(found.count) > 0
        said, hits = (100 * np.array(shares)[held] for shares in (found.confidence, found.accuracy))
        # unclipped, so that points on the edge of the panel stay whole
        line = {"marker": "o", "markersize": 5, "linewidth": 2, "clip_on": False, "zorder": 3}
        above.plot(said, hits, color=colour, label=f"{name}, ECE {100 * found.error:.1f} %", **line)
        bars = {"fill": True, "alpha": 0.6} if position == 0 else {"linewidth": 2}
        below.stairs(found.count, 100 * np.array(found.edges), color=colour, **bars)
    above.set_ylim(0, 100)
    above.set_ylabel("accuracy")
    above.yaxis.set_major_formatter("{x:g} %")
    below.set_xlim(0, 100)
    below.set_ylim(bottom=0)
    below.set_xlabel("confidence")
    below.xaxis.set_major_formatter("{x:g} %")
    below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True, min_n_ticks=1))
    handles, labels = above.get_legend_handles_labels()
    legend_below(figure, handles, labels, palette, columns=2)
    return figure
