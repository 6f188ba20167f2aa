"""Confusion matrices, read through their cells, names and numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from drawn import misplaced
from transferkit.exceptions import SettingError
from transferkit.plots import plot_confusion


def matrix_of(classes: int, *, pictures: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    true = np.repeat(np.arange(classes), pictures)
    said = np.where(rng.random(len(true)) < 0.8, true, rng.integers(0, classes, len(true)))
    return confusion_matrix(true, said, labels=np.arange(classes))


def numbers(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def listed(figure: Figure) -> list[tuple[str, str]]:
    numbers, pairs = (text.get_text().split("\n") for text in figure.axes[1].texts)
    return list(zip(numbers, pairs, strict=True))


def test_colours_are_shares_of_the_true_class() -> None:
    image = plot_confusion(torch.tensor([[3, 1], [10, 30]]), ["ant", "bee"]).axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[0.75, 0.25], [0.25, 0.75]])


def test_a_class_without_pictures_has_no_colour() -> None:
    image = plot_confusion([[2, 1], [0, 0]], ["ant", "bee"]).axes[0].images[0]
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False, False], [True, True]]


def test_rows_are_true_and_columns_are_predicted_classes() -> None:
    axes = plot_confusion(confusion_matrix([0, 0, 0, 1], [0, 1, 1, 1]), ["ant", "bee"]).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    at = {text.get_position(): text.get_text() for text in axes.texts}
    assert at == {(0, 0): "1", (1, 0): "2", (1, 1): "1"}  # (column, row)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "bee"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee"]


def test_numbers_are_pictures_or_percent_of_the_row() -> None:
    matrix = [[9990, 10], [1, 2]]
    assert numbers(plot_confusion(matrix, ["ant", "bee"])) == ["9,990", "10", "1", "2"]
    assert numbers(plot_confusion(matrix, ["ant", "bee"], shares=True)) == ["100 %", "<1 %", "33 %", "67 %"]


def test_the_headline_is_the_accuracy() -> None:
    assert plot_confusion([[3, 1], [1, 3]], ["ant", "bee"]).axes[0].get_title(loc="right") == "accuracy 75.0 %"


@pytest.mark.parametrize(("classes", "in_cells"), [(2, True), (20, True), (21, False), (100, False)])
def test_few_classes_have_numbers_in_their_cells_and_many_a_list_of_what_is_confused_most(
    classes: int, in_cells: bool
) -> None:
    matrix = matrix_of(classes)
    figure = plot_confusion(matrix, [f"class {index}" for index in range(classes)])
    if in_cells:
        assert len(numbers(figure)) == np.count_nonzero(matrix)
        return
    assert numbers(figure) == []
    assert len(listed(figure)) == 20
    mistakes = np.sort(matrix[~np.eye(classes, dtype=bool)])[::-1]
    assert [int(number) for number, _ in listed(figure)] == mistakes[:20].tolist()
    for number, pair in listed(figure):
        true, said = (int(name.removeprefix("class ")) for name in pair.split(" → "))
        assert matrix[true, said] == int(number)


def test_what_is_confused_most_is_ranked_by_share_where_shares_are_asked_for() -> None:
    matrix = np.diag(np.full(30, 100))
    matrix[0, 1], matrix[2] = 50, 0
    matrix[2, [2, 3]] = 1
    names = [f"class {index}" for index in range(30)]
    assert listed(plot_confusion(matrix, names)) == [("50", "class 0 → class 1"), ("1", "class 2 → class 3")]
    by_share = [("50 %", "class 2 → class 3"), ("33 %", "class 0 → class 1")]
    assert listed(plot_confusion(matrix, names, shares=True)) == by_share


def test_many_classes_without_a_mistake_are_said_to_have_none() -> None:
    figure = plot_confusion(np.eye(30), [str(index) for index in range(30)])
    assert listed(figure) == [("", "no mistakes")]


LARGE = [pytest.param(classes, marks=pytest.mark.long) for classes in (3, 10, 20, 50, 100, 250)]


@pytest.mark.parametrize("classes", [2, 21, *LARGE])
@pytest.mark.parametrize("name", ["", "of a class with a long name"])
def test_names_and_numbers_stand_clear_of_each_other_inside_the_figure(classes: int, name: str) -> None:
    figure = plot_confusion(matrix_of(classes), [f"{index} {name}" for index in range(classes)])
    assert max(figure.get_size_inches()) < 18.5
    assert misplaced(figure) == []


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 12), st.integers(0, 99))
def test_every_cell_is_coloured_by_what_scikit_learn_calls_normalised(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, said = rng.integers(0, classes, (2, 50))
    labels = np.arange(classes)
    figure = plot_confusion(confusion_matrix(true, said, labels=labels), [str(label) for label in labels])
    expected = confusion_matrix(true, said, labels=labels, normalize="true")
    np.testing.assert_allclose(np.ma.filled(figure.axes[0].images[0].get_array(), 0), expected)


def test_what_is_no_confusion_matrix_is_refused() -> None:
    with pytest.raises(SettingError, match=r"shape \(2, 2\) does not fit 3 class names"):
        plot_confusion([[1, 2], [3, 4]], ["a", "b", "c"])
    with pytest.raises(SettingError, match="counts pictures"):
        plot_confusion([[1, -2], [3, 4]], ["a", "b"])
    with pytest.raises(SettingError, match="counts pictures"):
        plot_confusion(np.zeros((2, 2)), ["a", "b"])
