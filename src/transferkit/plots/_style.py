"""What all figures share: colours, letters of any script, panels, and files."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transferkit.exceptions import OutputError, SettingError

if TYPE_CHECKING:
    # matplotlib takes a third of a second to import, so only drawing pays for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "TITLE_PAD",
    "Palette",
    "as_percent",
    "counted_axis",
    "legend_below",
    "legible",
    "new_figure",
    "save_figure",
    "shortened",
    "style_panel",
    "width_of",
]

logger = logging.getLogger("transferkit")

TITLE_PAD = 12  # points; room for the ring around a best epoch of 100 %
_FONT = "DejaVu Sans"  # comes with matplotlib
_LONGEST_NAME = 18
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Palette:
    """The colours of a figure.

    Attributes:
        background: Behind everything.
        text: Words and neutral marks.
        quiet: Axes and thresholds.
        grid: Lines behind the data.
        empty: Where a picture does not fill its square, or a class has no pictures.
        train: Of what is measured in training, or before a change.
        validation: Of what is measured in validation, or after a change.
        right: A prediction that is right.
        wrong: A prediction that is wrong.
        compared: Greys for other runs.
    """

    background: str
    text: str
    quiet: str
    grid: str
    empty: str
    train: str
    validation: str
    right: str
    wrong: str
    compared: tuple[str, ...]


# Okabe & Ito 2008: told apart by colour-blind readers too
LIGHT = Palette(
    background="#FFFFFF",
    text="#262626",
    quiet="#7F7F7F",
    grid="#E6E6E6",
    empty="#F2F2F2",
    train="#E69F00",
    validation="#0072B2",
    right="#009E73",
    wrong="#D55E00",
    compared=("#7F7F7F", "#A6A6A6", "#595959", "#BFBFBF"),
)
# the same hues, lighter where they would be hard to see on a dark page
DARK = Palette(
    background="#1E1E1E",
    text="#EDEDED",
    quiet="#9A9A9A",
    grid="#3A3A3A",
    empty="#2A2A2A",
    train="#E69F00",
    validation="#56B4E9",
    right="#2BC79A",
    wrong="#FF8A4C",
    compared=("#A6A6A6", "#7F7F7F", "#C8C8C8", "#666666"),
)


def new_figure(width: float, height: float, palette: Palette, *, pad: float | None = None) -> Figure:
    """Make an empty figure that keeps everything inside.

    Args:
        width: In inches.
        height: In inches.
        palette: Its colours.
        pad: Inches around each panel; ``None`` for matplotlib's own.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pads: dict[str, Any] = {} if pad is None else {"w_pad": pad, "h_pad": pad}
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(**pads), facecolor=palette.background)


def style_panel(axes: Axes, title: str, palette: Palette, *, headline: str = "", accent: str | None = None) -> None:
    """Give a panel its title, a quiet frame and horizontal lines.

    Args:
        axes: The panel.
        title: Bold, at the left.
        palette: The figure's colours.
        headline: What the panel says in a few words, at the right.
        accent: The headline's colour; ``None`` for that of validation.
    """
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=palette.text, pad=TITLE_PAD)
    axes.set_title(headline, loc="right", fontsize=10, color=accent or palette.validation, pad=TITLE_PAD)
    axes.set_facecolor(palette.background)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.quiet)
    axes.tick_params(axis="both", which="both", labelsize=9, colors=palette.text, length=0)
    axes.tick_params(axis="x", length=3, color=palette.quiet)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=9.5, color=palette.text)


def counted_axis(axes: Axes, name: str, first: float, last: float) -> None:
    """Count epochs or steps along the bottom, in whole numbers.

    Args:
        axes: The panel.
        name: What is counted.
        first: The first number drawn.
        last: The last.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def as_percent(axes: Axes) -> None:
    """Write the heights of a panel in percent, none below 0 or above 100."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    axes.yaxis.set_major_formatter("{x:g} %")


def legend_below(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], palette: Palette, *, columns: int = 6
) -> None:
    """Explain lines under all panels, where the explanation covers none.

    Args:
        figure: The figure.
        handles: The lines.
        labels: Their names, in any script.
        palette: The figure's colours.
        columns: Names in a row at most.
    """
    names, families = legible(labels)
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=math.ceil(len(handles) / math.ceil(len(handles) / columns)),  # rows of about the same length
        frameon=False,
        labelcolor=palette.text,
        prop={"family": families, "size": 9.5},
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


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
        >>> figure = new_figure(2, 2, LIGHT)
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
        kind = path.suffix[1:].lower()
        # of a figure full of photographs, squeezing it harder takes a third of a second and saves a twentieth
        packing: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if kind == "png" else {}
        figure.savefig(path, format=kind, dpi=144, bbox_inches=box, **packing)
    except OSError as error:
        raise OutputError(f"cannot write the figure {path}: {error}") from error
    return path


def width_of(name: str) -> int:
    """Count a name's letters, wide (East Asian) ones twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """Cut a long name with …

    Args:
        name: In any script; line breaks become spaces.
        longest: Letters that may stay, wide (East Asian) ones counted twice.

    Example:
        >>> shortened("a class with a really long name")
        'a class with a re…'
    """
    name = " ".join(name.split())
    if width_of(name) <= longest:
        return name
    widths = np.cumsum([width_of(letter) for letter in name])
    return name[: int(np.searchsorted(widths, longest - 1, side="right"))].rstrip() + "…"


def legible(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Find fonts for any script.

    Letters that no installed font has become □, or matplotlib would warn at every later drawing of the figure.

    Args:
        texts: What is to be drawn.

    Returns:
        The texts to draw and the font families to draw them with.
    """
    from matplotlib.font_manager import FontProperties, findfont

    missing = set("".join(texts)) - {"\n"} - _letters_of(findfont(FontProperties(family=[_FONT])))
    families = [_FONT, *_families_with(missing)]
    if missing and _notice_new_fonts():
        families += _families_with(missing)
    if missing:
        _tell("".join(sorted(missing)))
    return ["".join("□" if letter in missing else letter for letter in text) for text in texts], families


def _families_with(missing: set[str]) -> list[str]:
    """Return families that have the letters, which are taken out of ``missing``."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    families = []
    for entry in sorted(fontManager.ttflist, key=lambda entry: str(entry.name)):
        # a "last resort" font claims all letters and draws placeholders
        if not missing or "lastresort" in entry.name.replace(" ", "").lower():
            continue
        if missing & _letters_of(entry.fname):
            # text finds its font by family, which may be another file than this one
            found = missing & _letters_of(findfont(FontProperties(family=[entry.name])))
            families += [entry.name] if found else []
            missing -= found
    return families


@cache
def _notice_new_fonts() -> bool:
    """Tell matplotlib of fonts that were installed after it listed them; whether there are any. Once per process."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    new = sorted(set(findSystemFonts()) - known)
    for file in new:
        with suppress(OSError, RuntimeError, ValueError):  # a damaged font file is as good as none
            fontManager.addfont(file)
    return bool(new)


@cache
def _letters_of(font_file: str) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(font_file)
    except (OSError, RuntimeError, ValueError):
        return frozenset()  # a damaged font file is as good as none
    # matplotlib cannot draw the bitmaps that some emoji fonts are made of
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@cache
def _tell(missing: str) -> None:
    """Say, once, which letters cannot be drawn."""
    logger.warning(
        "no installed font has %s%s, so plots show □; install one that has, Noto Sans CJK for Chinese",
        ", ".join(map(repr, missing[:5])),
        " and more" if len(missing) > 5 else "",
    )
