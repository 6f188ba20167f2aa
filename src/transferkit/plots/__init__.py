"""Pictures of a run: its history, its predictions, its data. Every function returns a matplotlib Figure.

The figures never go through pyplot, so they need no screen, change no global setting and are freed like any object.
They are made for white paper, and with ``dark=True`` for dark pages. Letters that no installed font has become □.
"""

from transferkit.plots._style import save_figure
from transferkit.plots.calibration import plot_reliability
from transferkit.plots.confusion import plot_confusion
from transferkit.plots.curves import plot_history, plot_lr_finding, plot_lrs, plot_steps
from transferkit.plots.pictures import (
    PredictionView,
    TopLoss,
    plot_heat_maps,
    plot_predictions,
    plot_samples,
    plot_top_losses,
)
from transferkit.plots.tradeoff import TradeoffPoint, plot_tradeoff

__all__ = [
    "PredictionView",
    "TopLoss",
    "TradeoffPoint",
    "plot_confusion",
    "plot_heat_maps",
    "plot_history",
    "plot_lr_finding",
    "plot_lrs",
    "plot_predictions",
    "plot_reliability",
    "plot_samples",
    "plot_steps",
    "plot_top_losses",
    "plot_tradeoff",
    "save_figure",
]
