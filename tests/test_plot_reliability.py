"""Reliability diagrams, read through their lines and legend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve

from drawn import legend_names, points
from transferkit.exceptions import DataError, SettingError
from transferkit.plots import plot_reliability


def answers(count: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    confidences = rng.beta(5, 1, count)
    return torch.tensor(confidences), torch.tensor(rng.random(count) < 0.8 * confidences)


def test_points_are_what_scikit_learn_computes() -> None:
    confidences, right = answers()
    above, _ = plot_reliability(confidences, right, bins=10).axes
    accuracy, confidence = calibration_curve(right, confidences, n_bins=10)
    _, (said, hits) = points(above)
    assert said == pytest.approx(100 * confidence)
    assert hits == pytest.approx(100 * accuracy)


def test_the_lower_panel_counts_the_pictures_of_each_bin() -> None:
    confidences, right = answers()
    _, below = plot_reliability(confidences, right, bins=5).axes
    (bars,) = below.patches
    counts, edges, _ = bars.get_data()
    np.testing.assert_array_equal(counts, np.histogram(confidences, bins=5, range=(0, 1))[0])
    np.testing.assert_allclose(edges, [0, 20, 40, 60, 80, 100])


def test_the_legend_gives_the_calibration_error() -> None:
    figure = plot_reliability([0.75, 0.75, 0.75, 0.75], [True, True, False, False], bins=4)
    assert legend_names(figure) == ["as right as it says", "the model, ECE 25.0 %"]


def test_confidences_after_calibration_are_a_second_line() -> None:
    right = [True, True, False, False]
    figure = plot_reliability([0.75] * 4, right, calibrated=[0.5] * 4, bins=4)
    assert legend_names(figure) == ["as right as it says", "before, ECE 25.0 %", "calibrated, ECE 0.0 %"]
    assert points(figure.axes[0])[1:] == [([75.0], [50.0]), ([50.0], [50.0])]


def test_confidences_that_are_none_are_refused() -> None:
    with pytest.raises(SettingError):
        plot_reliability([0.5, 2.0], [True, True])
    with pytest.raises(DataError):
        plot_reliability([], [])
