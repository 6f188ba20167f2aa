"""Figures, read through their artists: lines, titles, colours, legends, files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from transferkit.exceptions import OutputError, SettingError
from transferkit.plots import PredictionView, plot_history, plot_predictions, plot_samples, save_figure

GREEN, RED, NEUTRAL = "#009e73", "#d55e00", "#262626"


def run(accuracies: list[float]) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "val_accuracy": accuracy, "seconds": 1.0}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def picture(width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def view(predicted: str = "cat", actual: str | None = None, confidence: float = 0.97) -> PredictionView:
    return PredictionView(picture(), predicted, confidence, actual)


def points(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def legend_names(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn_ticks(figure: Figure, axes: Any) -> list[str]:
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_xlim()
    return [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]


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


@pytest.mark.parametrize(
    ("actual", "title", "colour"),
    [
        ("cat", "✓ cat 97 %", GREEN),
        ("dog", "✗ cat 97 %\n(true: dog)", RED),
        (None, "cat 97 %", NEUTRAL),
    ],
)
def test_a_prediction_is_told_by_mark_and_colour(actual: str | None, title: str, colour: str) -> None:
    (axes,) = plot_predictions([view("cat", actual)]).axes
    assert axes.get_title() == title
    assert to_hex(axes.title.get_color()) == colour


def test_a_known_prediction_is_framed_in_its_colour() -> None:
    right, wrong = plot_predictions([view("cat", "cat"), view("cat", "dog")]).axes
    assert {to_hex(spine.get_edgecolor()) for spine in right.spines.values()} == {GREEN}
    assert {to_hex(spine.get_edgecolor()) for spine in wrong.spines.values()} == {RED}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_a_grid_has_one_panel_per_picture_and_no_empty_ones(count: int) -> None:
    figure = plot_predictions([view()] * count, columns=4)
    assert len(figure.axes) == count
    assert all(len(axes.images) == 1 for axes in figure.axes)
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (-(-count // 4), min(count, 4))


def test_long_names_are_shortened_and_short_ones_kept() -> None:
    title = plot_samples([picture()], ["a class with a really long name"]).axes[0].get_title()
    assert title == "a class with a re…"
    assert len(title) == 18
    assert plot_samples([picture()], ["exactly 18 letters"]).axes[0].get_title() == "exactly 18 letters"


def test_wide_letters_count_twice_when_shortening() -> None:
    title = plot_samples([picture()], ["ア" * 12]).axes[0].get_title()
    assert len(title) == 9
    assert title.endswith("…")


@pytest.mark.parametrize(
    "name", ["猫", "кошка", "گربه", "बिल्ली", "🐱", "𒀀", "$5 and $6", "a_b^c", "two\nlines", "\x01"]
)
def test_any_class_name_is_drawn_without_a_warning(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_predictions([view(name, "dog"), view("cat", name)])
        figure.savefig(tmp_path / "plain.png")
        save_figure(figure, tmp_path / "saved.svg")
        save_figure(plot_history(run([0.5]), compare={name: run([0.4])}), tmp_path / "history.png")


def test_letters_the_main_font_has_are_kept() -> None:
    titles = [axes.get_title() for axes in plot_samples([picture()] * 2, ["кошка", "$x$"]).axes]
    assert titles == ["кошка", "$x$"]


def test_letters_no_font_has_become_boxes() -> None:
    private = "\U0010fffd"
    assert plot_samples([picture()], [f"a{private}b"]).axes[0].get_title() == "a□b"


@pytest.mark.parametrize(("width", "height"), [(8, 8), (40, 10), (10, 40)])
def test_a_picture_keeps_its_proportions_inside_a_square(width: int, height: int) -> None:
    (axes,) = plot_samples([picture(width, height)], ["cat"]).axes
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert right - left == bottom - top == max(width, height)
    assert axes.images[0].get_array().shape == (height, width, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_pictures_of_any_mode_are_drawn_in_colour(mode: str) -> None:
    (axes,) = plot_samples([picture(mode=mode)], ["cat"]).axes
    assert axes.images[0].get_array().shape == (8, 8, 3)


def test_arrays_are_drawn_as_the_pixels_they_hold() -> None:
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    from_levels, from_shares, grey = plot_samples([levels, levels / 255, levels[..., 0]], ["a", "b", "c"]).axes
    np.testing.assert_array_equal(from_levels.images[0].get_array(), levels)
    np.testing.assert_array_equal(from_shares.images[0].get_array(), levels)
    np.testing.assert_array_equal(grey.images[0].get_array()[..., 1], levels[..., 0])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_of_a_tensor_the_first_three_channels_are_drawn(channels: int) -> None:
    levels = torch.arange(channels * 16, dtype=torch.uint8).reshape(channels, 4, 4)
    expected = levels[:3].expand(3, 4, 4).permute(1, 2, 0)
    for image in (levels, levels / 255):
        (axes,) = plot_predictions([PredictionView(image, "cat", 0.97)]).axes
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)


def test_large_pictures_are_reduced_and_the_callers_picture_is_not() -> None:
    large = picture(2000, 1000)
    (axes,) = plot_samples([large], ["cat"]).axes
    assert axes.images[0].get_array().shape == (200, 400, 3)
    assert large.size == (2000, 1000)


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="no pictures to plot"):
        plot_predictions([])
    with pytest.raises(SettingError, match="columns=0; it must be 1 or more"):
        plot_predictions([view()], columns=0)
    with pytest.raises(SettingError, match="2 images and 1 labels"):
        plot_samples([picture()] * 2, ["cat"])


def test_drawing_changes_no_global_setting_and_opens_no_window() -> None:
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    plot_history(run([0.5]))
    plot_predictions([view()])
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(("extension", "start"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_a_figure_is_saved_in_the_format_of_its_extension(extension: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / f"history{extension}"
    assert save_figure(plot_history(run([0.5])), path) == path
    assert path.read_bytes().startswith(start)


def test_a_saved_png_has_144_dots_per_inch(tmp_path: Path) -> None:
    with Image.open(save_figure(plot_history(run([0.5])), str(tmp_path / "history.png"))) as saved:
        assert saved.info["dpi"] == pytest.approx((144, 144), abs=0.1)


def test_an_unknown_extension_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"'history\.bmp'; its extension can be \.png, \.svg, \.pdf"):
        save_figure(plot_history(run([0.5])), tmp_path / "new" / "history.bmp")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the figure"):
        save_figure(plot_history(run([0.5])), tmp_path / "file" / "history.png")


def test_a_figure_without_a_layout_is_saved_with_what_sticks_out(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 2), dpi=144)
    figure.text(1.5, 0.5, "outside")
    with Image.open(save_figure(figure, tmp_path / "wide.png")) as image:
        assert np.asarray(image.convert("L")).min() < 100
