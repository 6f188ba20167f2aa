"""Accuracy against a cost: places, spreads, and names that stand clear of each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from drawn import misplaced
from transferkit.exceptions import SettingError
from transferkit.plots import TradeoffPoint, plot_tradeoff

POINTS = [
    TradeoffPoint("small", 5.0, 0.90, 0.01),
    TradeoffPoint("large", 500.0, 0.95, 0.02),
    TradeoffPoint("bad", 50.0, 0.60),
]


def test_points_are_costs_and_accuracies_in_percent_with_their_spreads() -> None:
    axes = plot_tradeoff(POINTS, x_label="parameters (millions)").axes[0]
    (container,) = axes.containers
    data, _, (bars,) = container.lines
    places = dict(zip(data.get_xdata(), data.get_ydata(), strict=True))
    assert places == pytest.approx({500.0: 95.0, 5.0: 90.0, 50.0: 60.0})
    ends = {segment[0][0]: (segment[0][1], segment[1][1]) for segment in bars.get_segments()}
    assert ends[500.0] == pytest.approx((93, 97))
    assert ends[50.0] == pytest.approx((60, 60))
    assert axes.get_xlabel() == "parameters (millions)"


@pytest.mark.parametrize(("costs", "scale"), [((1, 7), "linear"), ((1, 8), "log"), ((0.01, 90_000), "log")])
def test_a_cost_over_a_wide_range_has_a_logarithmic_axis(costs: tuple[float, ...], scale: str) -> None:
    points = [TradeoffPoint(str(cost), cost, 0.5) for cost in costs]
    assert plot_tradeoff(points, x_label="seconds").axes[0].get_xscale() == scale


def test_accuracies_stay_between_0_and_100_percent() -> None:
    low, high = plot_tradeoff([TradeoffPoint("all", 1, 1.0, 0.2)], x_label="seconds").axes[0].get_ylim()
    assert 0 <= low < high <= 100


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from([0.0, 0.02]))
def test_up_to_20_names_stand_clear_of_each_other_inside_the_figure(seed: int, count: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    points = [
        TradeoffPoint(f"timm/some_network_{index}", 10 ** rng.uniform(0, 3), rng.uniform(0.7, 0.99), spread)
        for index in range(count)
    ]
    figure = plot_tradeoff(points, x_label="training time (s)")
    assert misplaced(figure) == []


def test_names_of_points_at_one_place_are_all_there_and_apart() -> None:
    figure = plot_tradeoff([TradeoffPoint(f"network {index}", 1.0, 0.9) for index in range(8)], x_label="seconds")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == [f"network {index}" for index in range(8)]
    assert misplaced(figure) == []


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(SettingError, match="no points to plot"):
        plot_tradeoff([], x_label="seconds")
    with pytest.raises(SettingError, match=r"free has seconds of 0\.0; it must be above 0"):
        plot_tradeoff([TradeoffPoint("free", 0.0, 0.5)], x_label="seconds")
