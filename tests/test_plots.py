"""Figures of pictures, read through their artists: titles, colours, pixels. And what all figures have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text
from PIL import Image

from drawn import misplaced, run
from transferkit.exceptions import OutputError, SettingError
from transferkit.plots import (
    PredictionView,
    TopLoss,
    TradeoffPoint,
    plot_confusion,
    plot_heat_maps,
    plot_history,
    plot_lr_finding,
    plot_lrs,
    plot_predictions,
    plot_reliability,
    plot_samples,
    plot_steps,
    plot_top_losses,
    plot_tradeoff,
    save_figure,
)
from transferkit.plots._style import _notice_new_fonts, legible

GREEN, RED, NEUTRAL = "#009e73", "#d55e00", "#262626"


def picture(width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def view(predicted: str = "cat", actual: str | None = None, confidence: float = 0.97) -> PredictionView:
    return PredictionView(picture(), predicted, confidence, actual)


def mistake(name: str = "cats/1.jpg", *, loss: float = 3.5, actual: str = "cat", **more: object) -> TopLoss:
    return TopLoss(picture(), name, actual, "dog", 0.97, loss, **more)  # type: ignore[arg-type]


LONG = "the quick brown fox of the northern woods"
HEAT = np.linspace(0, 1, 64).reshape(8, 8)

KINDS: dict[str, Callable[..., Figure]] = {
    "history": lambda **more: plot_history(run([0.5, 0.9]), unfreeze_epochs=[2], compare={LONG: run([0.4])}, **more),
    "steps": lambda **more: plot_steps([1 / (1 + i) for i in range(900)], unfreeze_steps=[300], **more),
    "lrs": lambda **more: plot_lrs({f"stage{i}": [None] * i + [2.0**-i] * (30 - i) for i in range(26)}, **more),
    "lr finding": lambda **more: plot_lr_finding(
        [0.01, 0.1, 1.0], [2.0, 1.0, 3.0], [2.0, 1, 2], suggestion=0.1, **more
    ),
    "samples": lambda **more: plot_samples([picture()] * 3, ["cat", LONG, "猫" * 30], **more),
    "predictions": lambda **more: plot_predictions([view(LONG, "cat"), view("cat", LONG), view()], columns=2, **more),
    "top losses": lambda **more: plot_top_losses([mistake(f"{LONG}.jpg", actual=LONG, heat=HEAT)] * 5, **more),
    "heat maps": lambda **more: plot_heat_maps([picture(20, 10)] * 3, [HEAT] * 3, [LONG] * 3, **more),
    "confusion": lambda **more: plot_confusion(np.eye(5) + 1, [LONG, "猫", "cat", "$x$", "dog"], **more),
    "reliability": lambda **more: plot_reliability([0.9, 0.8], [True, False], calibrated=[0.7, 0.6], **more),
    "trade-off": lambda **more: plot_tradeoff([TradeoffPoint(LONG, 2.0, 0.9, 0.1)], x_label="seconds", **more),
}
EXTREMES: dict[str, Callable[..., Figure]] = {
    "history of one epoch": lambda: plot_history(run([1.0])),
    "history of 200 epochs": lambda: plot_history(run([0.5 + i / 500 for i in range(200)])),
    "one step": lambda: plot_steps([0.7]),
    "lrs of one step": lambda: plot_lrs({"head": [0.1]}),
    "one prediction": lambda: plot_predictions([view(LONG, LONG, 1.0)]),
    "one heat map": lambda: plot_heat_maps([picture()], [HEAT], ["cat, 97 %"]),
}


# All figures


def luminance(colour: object) -> float:
    """The share of light that WCAG 2 defines."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: object, other: object) -> float:
    """The ratio that WCAG 2 defines."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", KINDS | EXTREMES)
def test_words_stand_clear_of_each_other_inside_the_figure(name: str) -> None:
    assert misplaced((KINDS | EXTREMES)[name]()) == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dark", [False, True])
def test_words_and_background_differ_enough_to_be_read(name: str, dark: bool) -> None:
    figure = KINDS[name](dark=dark)
    page = figure.get_facecolor()
    assert (luminance(page) < 0.05) == dark
    for axes in figure.axes:
        axes.get_xticklabels()  # which makes them
        axes.get_yticklabels()
    inside = {id(text) for axes in figure.axes for text in axes.texts}  # numbers stand on the colours of their cells
    seen = figure.findobj(lambda each: isinstance(each, Text) and bool(each.get_text().strip()))
    assert seen
    assert all(contrast(text.get_color(), page) > 3 for text in seen if id(text) not in inside)
    assert all(contrast(line.get_color(), page) > 1.2 for axes in figure.axes for line in axes.lines)


def test_drawing_changes_no_global_setting_and_opens_no_window() -> None:
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    for name in ("history", "lrs", "top losses", "confusion", "trade-off"):
        KINDS[name]()
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


# Pictures


@pytest.mark.parametrize(
    ("actual", "title", "colour"),
    [
        ("cat", "✓ cat, 97 %", GREEN),
        ("dog", "✗ cat, 97 %\n(true: dog)", RED),
        (None, "cat, 97 %", NEUTRAL),
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


def test_any_class_name_is_drawn_without_a_warning(tmp_path: Path) -> None:
    names = ["猫", "кошка", "گربه", "बिल्ली", "🐱", "𒀀", "$5 and $6", "a_b^c", "two\nlines", "\x01"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_predictions([view(name, "dog") for name in names] + [view("cat", name) for name in names])
        figure.savefig(tmp_path / "plain.png")
        save_figure(figure, tmp_path / "saved.svg")
        save_figure(plot_history(run([0.5]), compare={name: run([0.4]) for name in names}), tmp_path / "history.png")


def test_letters_the_main_font_has_are_kept() -> None:
    titles = [axes.get_title() for axes in plot_samples([picture()] * 2, ["кошка", "$x$"]).axes]
    assert titles == ["кошка", "$x$"]


def test_letters_that_another_installed_font_has_are_drawn_with_it() -> None:
    letters_of = {
        family: set(get_font(findfont(FontProperties(family=[family]))).get_charmap())
        for family in ("DejaVu Sans", "DejaVu Sans Mono")  # matplotlib brings both
    }
    letter = chr(min(letters_of["DejaVu Sans Mono"] - letters_of["DejaVu Sans"]))
    title = plot_samples([picture()], [f"a{letter}b"]).axes[0].title
    assert title.get_text() == f"a{letter}b"
    assert len(title.get_fontfamily()) > 1


def test_a_font_that_was_installed_after_matplotlib_listed_the_fonts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    main, late = (get_font(findfont(FontProperties(family=[name]))) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    letter = chr(min(set(late.get_charmap()) - set(main.get_charmap())))
    monkeypatch.setattr(fontManager, "ttflist", [each for each in fontManager.ttflist if each.name == "DejaVu Sans"])
    for installed, drawn in ([], "□"), ([late.fname, __file__], letter):
        monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda found=installed: found)
        _notice_new_fonts.cache_clear()
        assert legible([letter])[0] == [drawn]
    _notice_new_fonts.cache_clear()


def test_letters_no_font_has_become_boxes_and_the_log_names_them_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert plot_samples([picture()], ["a\U0010fffcb"]).axes[0].get_title() == "a□b"
    (message,) = caplog.messages
    assert "\\U0010fffc" in message


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


def test_any_class_name_is_drawn_in_every_figure_that_names_classes(tmp_path: Path) -> None:
    names = ["猫", "$5 and $6", "\U0010fffd"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            plot_confusion(np.ones((3, 3)), names),
            plot_confusion(np.ones((21, 21)), names * 7),
            plot_top_losses([mistake(name, actual=name) for name in names]),
            plot_heat_maps([picture()] * 3, [HEAT] * 3, names),
            plot_tradeoff([TradeoffPoint(name, 1.0, 0.5) for name in names], x_label="seconds"),
        ):
            save_figure(figure, tmp_path / "figure.png")


def test_top_losses_come_highest_first_with_file_loss_prediction_and_truth() -> None:
    items = [mistake("low.jpg", loss=0.2, actual="dog"), mistake("high.jpg", loss=4.506), mistake("mid.jpg", loss=1.0)]
    titles = [axes.get_title() for axes in plot_top_losses(items).axes]
    assert titles[0] == "high.jpg\nloss 4.51\n✗ dog, 97 %\n(true: cat)"
    assert [title.split("\n")[0] for title in titles] == ["high.jpg", "mid.jpg", "low.jpg"]
    assert titles[2] == "low.jpg\nloss 0.20\n✓ dog, 97 %"


def test_a_long_file_name_keeps_its_end() -> None:
    title = plot_top_losses([mistake("pictures/of/many/ants_and_bees_0123.jpg")]).axes[0].get_title()
    assert title.split("\n")[0] == "…ny/ants_and_bees_0123.jpg"


def test_a_heat_map_leaves_cold_places_as_they_are_and_colours_hot_ones() -> None:
    grey = np.full((8, 8, 3), 128, np.uint8)
    heat = np.zeros((2, 2))
    heat[0, 1] = 1
    for figure in (
        plot_heat_maps([grey], [torch.tensor(heat)], ["cat"]),
        plot_top_losses([TopLoss(Image.fromarray(grey), "1.jpg", "cat", "dog", 0.9, 3.0, heat)]),
    ):
        drawn = np.asarray(figure.axes[0].images[0].get_array()).astype(int)
        changed = np.abs(drawn - 128).max(2)
        assert changed[:, :2].max() == 0
        assert changed[4:].max() <= changed[0, -1]
        assert changed[0, -1] == changed.max() > 50


def test_what_the_heat_colours_mean_is_explained_only_where_there_are_some() -> None:
    assert len(plot_top_losses([mistake()]).axes) == 1
    figure = plot_top_losses([mistake(), mistake(heat=HEAT)])
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["no evidence", "most evidence"]


def test_maps_and_titles_must_be_as_many_as_pictures() -> None:
    with pytest.raises(SettingError, match="1 images, 2 maps and 1 titles"):
        plot_heat_maps([picture()], [HEAT] * 2, ["cat"])


def test_large_pictures_are_reduced_and_the_callers_picture_is_not() -> None:
    large = picture(2000, 1000)
    (axes,) = plot_samples([large], ["cat"]).axes
    assert axes.images[0].get_array().shape == (200, 400, 3)
    assert large.size == (2000, 1000)


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="no pictures to plot"):
        plot_predictions([])
    with pytest.raises(SettingError, match="columns must be 1 or more, got 0"):
        plot_predictions([view()], columns=0)
    with pytest.raises(SettingError, match="2 images and 1 labels"):
        plot_samples([picture()] * 2, ["cat"])


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
