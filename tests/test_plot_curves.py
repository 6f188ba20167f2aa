"""Curves, read through their lines, legends and axes."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drawn import legend_names, points, run
from transferkit.exceptions import SettingError
from transferkit.plots import plot_history, plot_lrs, plot_steps


def drawn_ticks(figure: Figure, axes: Any) -> list[str]:
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_xlim()
    return [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]


# Epochs


def test_history_draws_both_losses_and_the_accuracy_in_percent() -> None:
    loss, accuracy = plot_history(run([0.5, 0.75, 0.7])).axes
    assert points(loss)[:2] == [([1, 2, 3], [1, 1 / 2, 1 / 3]), ([1, 2, 3], [2, 1, 2 / 3])]
    assert points(accuracy)[0] == ([1, 2, 3], pytest.approx([50, 75, 70]))


def test_history_rings_the_epoch_of_best_validation_accuracy_in_both_panels() -> None:
    figure = plot_history(run([0.5, 0.75, 0.7]))
    loss, accuracy = figure.axes
    assert points(loss)[-1] == ([2], [1.0])
    assert points(accuracy)[-1] == ([2], [75.0])
    assert accuracy.get_title(loc="right") == "best 75.0 % at epoch 2"
    assert legend_names(figure) == ["train", "validation", "best epoch"]


def test_where_accuracies_tie_the_ring_marks_the_lower_loss() -> None:
    figure = plot_history(run([0.5, 0.8, 0.8]))  # the loss falls from epoch to epoch
    assert all(([3], [height]) in points(axes) for axes, height in zip(figure.axes, (2 / 3, 80.0), strict=True))


def test_history_of_one_epoch_shows_as_markers() -> None:
    figure = plot_history(run([0.5]))
    for axes in figure.axes:
        assert all(line.get_marker() == "o" for line in axes.lines)
        assert drawn_ticks(figure, axes) == ["1"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 100])
def test_epoch_ticks_are_whole_numbers(epochs: int) -> None:
    figure = plot_history(run([0.5] * epochs))
    labels = drawn_ticks(figure, figure.axes[0])
    assert labels
    assert all(label.isdigit() and 1 <= int(label) <= epochs for label in labels)


def test_unfreeze_epochs_are_dotted_lines_named_once() -> None:
    figure = plot_history(run([0.5, 0.6, 0.7]), unfreeze_epochs=[2, 3])
    for axes in figure.axes:
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == [2, 3]
    assert legend_names(figure).count("unfreeze") == 1


def test_compared_runs_are_grey_dashed_and_named_after_the_run_itself() -> None:
    other = run([0.1, 0.2, 0.3, 0.4])
    figure = plot_history(run([0.5, 0.6]), compare={"random weights": other, "_probe": run([0.3])})
    loss, accuracy = figure.axes
    for axes, expected in ((loss, [2, 1, 2 / 3, 1 / 2]), (accuracy, [10, 20, 30, 40])):
        line = axes.lines[0]
        assert list(line.get_ydata()) == pytest.approx(expected)
        assert line.get_linestyle() == "--"
        assert len(set(mpl.colors.to_rgb(line.get_color()))) == 1
    assert legend_names(figure) == ["train", "validation", "best epoch", "random weights", "probe"]


def test_accuracy_axis_stays_between_0_and_100_percent() -> None:
    for accuracies in ([1.0, 1.0], [0.0, 0.0], [0.0, 1.0]):
        low, high = plot_history(run(accuracies)).axes[1].get_ylim()
        assert 0 <= low < high <= 100


def test_a_history_without_epochs_is_refused() -> None:
    with pytest.raises(SettingError, match="this run has no records"):
        plot_history([])
    with pytest.raises(SettingError, match="probe has no records"):
        plot_history(run([0.5]), compare={"probe": []})


def test_a_record_without_a_value_is_refused() -> None:
    with pytest.raises(SettingError, match="has no 'val_loss'; it has epoch, train_loss"):
        plot_history([{"epoch": 1, "train_loss": 1.0}])


# Steps


def test_every_steps_loss_is_drawn_and_smoothed_by_the_mean_of_its_neighbourhood() -> None:
    losses = [math.sin(step) + 2 for step in range(200)]
    figure = plot_steps(losses)
    (steps, each), (same_steps, smooth) = points(figure.axes[0])
    assert steps == same_steps == list(range(1, 201))
    assert each == losses
    expected = [np.mean(losses[max(0, step - 4) : step + 5]) for step in range(200)]
    assert smooth == pytest.approx(expected)
    assert legend_names(figure) == ["each step", "smoothed"]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.none() | st.floats(0.01, 100), min_size=1, max_size=300).filter(lambda each: any(each)))
def test_losses_that_are_not_known_are_gaps_and_do_not_spread(losses: list[float | None]) -> None:
    values = [math.nan if loss is None else loss for loss in losses]
    (_, each), (_, smooth) = points(plot_steps(values).axes[0])
    known = [loss is not None for loss in losses]
    assert [not math.isnan(value) for value in each] == known
    assert [not math.isnan(value) for value in smooth] == known
    seen = [loss for loss in losses if loss is not None]
    inside = [value for value in smooth if not math.isnan(value)]
    assert min(seen) - 1e-9 <= min(inside) <= max(inside) <= max(seen) + 1e-9


def test_one_bad_step_does_not_press_the_others_into_a_line() -> None:
    losses = [1.0] * 500
    losses[250] = 900.0
    low, high = plot_steps(losses).axes[0].get_ylim()
    assert low < 1 < high < 200


def test_unfreezing_steps_are_dotted_lines_named_once() -> None:
    figure = plot_steps([3.0, 2.0, 1.0, 0.5], unfreeze_steps=[2, 4])
    dotted = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == [2, 4]
    assert legend_names(figure).count("unfreeze") == 1


def test_steps_without_any_loss_are_refused() -> None:
    for losses in ([], [math.nan, math.inf]):
        with pytest.raises(SettingError, match="no losses to plot"):
            plot_steps(losses)


# Learning rates


def test_each_stage_has_a_line_on_a_logarithmic_axis_with_gaps_where_it_is_frozen() -> None:
    lrs = {"stem": [None, None, 1e-5], "stage1": [None, 1e-4, 1e-4], "head": [1e-3, math.nan, 0.0]}
    figure = plot_lrs(lrs, unfreeze_steps=[2])
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(lines["stem"], [math.nan, math.nan, 1e-5])
    np.testing.assert_array_equal(lines["stage1"], [math.nan, 1e-4, 1e-4])
    np.testing.assert_array_equal(lines["head"], [1e-3, math.nan, math.nan])
    assert axes.get_yscale() == "log"
    assert legend_names(figure) == ["stem", "stage1", "head", "unfreeze"]


def test_neighbouring_stages_of_one_rate_share_a_line() -> None:
    lrs = {name: [None, 1e-4] for name in ("stem", "stage1", "stage2")} | {"head": [1e-3, 1e-3]}
    assert legend_names(plot_lrs(lrs)) == ["stem – stage2", "head"]


def test_stages_that_never_train_are_named_as_frozen() -> None:
    assert legend_names(plot_lrs({"stem": [None], "head": [0.1]})) == ["stem (frozen)", "head"]


def test_of_many_stages_some_are_named_the_first_and_the_last_among_them() -> None:
    lrs = {f"stage{index}": [1e-6 * 2**index] * 3 for index in range(26)}
    figure = plot_lrs(lrs)
    names = legend_names(figure)
    assert len(figure.axes[0].lines) == 26
    assert (names[0], names[-1], len(names)) == ("stage0", "stage25", 11)
    assert names == sorted(names, key=lambda name: int(name.removeprefix("stage")))


def test_rates_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(SettingError, match="learning rates of 1, 2 steps; give all as many"):
        plot_lrs({"stem": [0.1], "head": [0.1, 0.1]})
    for lrs in ({}, {"head": []}, {"head": [None, 0.0]}):
        with pytest.raises(SettingError, match="no stage has a learning rate above 0"):
            plot_lrs(lrs)
