"""Backbones side by side: what each gave, which score would have told, and the same as CSV, JSON, Markdown and HTML."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.filesize import decimal

from transferkit.exceptions import OutputError, SettingError
from transferkit.pages import in_markdown, markdown_table, render_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Leaderboard", "LeaderboardRow", "RankAgreement"]

_SCORES = {"log_me": "LogME", "h_score": "H-score"}
_FEW = 4
_COST = "billion multiply-accumulates per picture"


@dataclass(frozen=True)
class LeaderboardRow:
    """What one backbone gave; figures that are not known are ``None``.

    Attributes:
        backbone: Its name in the comparison.
        accuracy: Share of validation pictures that the best epoch has right, 0 to 1, mean over the seeds.
        spread: Standard deviation of it over the seeds; ``None`` for a single one.
        full_accuracy: The same with everything trained, where that was asked for.
        full_spread: The same.
        seeds: Those that ``accuracy`` is of.
        seconds: What all its runs took together: loading, frozen pass, training, validation.
        weights: What was loaded, in words; ``None`` for random weights.
        licence: Of the weights, ``"not stated"`` where it is not known; ``None`` for random ones.
        image_size: Side of its input in pixels.
        parameters: Scalars in its parameters, the new head's included.
        macs: Multiply-accumulates for one picture.
        pictures_per_second: Of the frozen pass, decoding included.
        peak_memory: Bytes; of a GPU what its tensors took, else what its process took, Python and libraries included.
        log_me: :func:`~transferkit.transferability.log_me` of its features, before training.
        h_score: :func:`~transferkit.transferability.h_score` of its features, the regularised one.
        failure: Why it, or some of its runs, failed, in one sentence.
    """

    backbone: str
    accuracy: float | None = None
    spread: float | None = None
    full_accuracy: float | None = None
    full_spread: float | None = None
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    weights: str | None = None
    licence: str | None = None
    image_size: int | None = None
    parameters: int | None = None
    macs: int | None = None
    pictures_per_second: float | None = None
    peak_memory: int | None = None
    log_me: float | None = None
    h_score: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class RankAgreement:
    """How well a score, which needs no training, put backbones into the order of their accuracy.

    Attributes:
        score: Its name.
        count: How many backbones.
        kendall: Kendall's tau-b, from -1 to 1; ``None`` where it has no meaning, since all figures are the same.
        spearman: Spearman's rho, the same.
    """

    score: str
    count: int
    kendall: float | None
    spearman: float | None

    def __str__(self) -> str:
        """Say it in one sentence.

        Example:
            >>> print(RankAgreement("LogME", 5, 0.8, 0.9))
            LogME told the order of the 5 backbones nearly (Kendall 0.80, Spearman 0.90).
        """
        if self.kendall is None or self.spearman is None:
            return f"{self.score} has no order to tell: there are fewer than 2 backbones, or all have one figure."
        few = f"; over fewer than {_FEW} backbones that says little" if self.count < _FEW else ""
        figures = f"Kendall {self.kendall:.2f}, Spearman {self.spearman:.2f}{few}"
        if self.kendall < 0.2:
            return f"{self.score} did not tell the order of the {self.count} backbones ({figures})."
        how = "exactly" if self.kendall == 1 else "nearly" if self.kendall >= 0.6 else "in part"
        return f"{self.score} told the order of the {self.count} backbones {how} ({figures})."


@dataclass(frozen=True)
class Leaderboard:
    """What :func:`~transferkit.compare` found.

    Args:
        rows: The best first, those without an accuracy last.
        about: What was done on what, JSON values by name: classes, pictures, epochs, policy, seeds, device, versions.

    Example:
        >>> rows = (LeaderboardRow("resnet18", 0.94, 0.01, macs=1_800_000_000), LeaderboardRow("lost", failure="why"))
        >>> board = Leaderboard(rows, {"validation pictures": 100})
        >>> board.best().backbone, [each["failure"] for each in board.to_dicts()]
        ('resnet18', [None, 'why'])
    """

    rows: tuple[LeaderboardRow, ...]
    about: Mapping[str, Any]

    def best(self) -> LeaderboardRow:
        """Return the row with the highest accuracy.

        Raises:
            SettingError: No backbone has one.
        """
        if not self.rows or self.rows[0].accuracy is None:
            raise SettingError("no backbone of this comparison has an accuracy; their rows say why")
        return self.rows[0]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as JSON values by name."""
        return [{**asdict(row), "seeds": list(row.seeds)} for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values: ``about``, ``rows``, and ``scores`` with how well each told the order."""
        return {
            "about": dict(self.about),
            "rows": self.to_dicts(),
            "scores": [asdict(each) for each in self.agreements()],
        }

    def agreements(self) -> tuple[RankAgreement, ...]:
        """Say of each score how well it told the order of the accuracies; rows without one do not count."""
        rows = [row for row in self.rows if row.accuracy is not None]
        accuracies = [row.accuracy for row in rows]
        found = []
        for name, title in _SCORES.items():
            scores = [getattr(row, name) for row in rows]
            kendall = spearman = None
            if len(set(scores)) > 1 and len(set(accuracies)) > 1:
                from scipy.stats import kendalltau, spearmanr

                kendall = float(kendalltau(scores, accuracies).statistic)
                spearman = float(spearmanr(scores, accuracies).statistic)
            found.append(RankAgreement(title, len(rows), kendall, spearman))
        return tuple(found)

    def table(self) -> list[list[str]]:
        """Return the rows as they are shown, with a heading."""
        columns = self._columns()
        return [[column.title for column in columns], *([each.text(row) for each in columns] for row in self.rows)]

    def notes(self) -> list[str]:
        """Return sentences that belong under the table: what the figures mean, what the scores told, what failed."""
        pictures = self.about.get("validation pictures")
        one = f" One validation picture is {1 / pictures:.3f}." if pictures else ""
        return [
            f"val accuracy: that of the best epoch, mean ± standard deviation over the seeds.{one}",
            "MACs: multiply-accumulates for one picture. pictures/s: of the frozen pass, decoding included. peak "
            "memory: of the process, Python and libraries included; on a GPU that of tensors alone.",
            *map(str, self.agreements()),
            *(f"{row.backbone} failed: {row.failure}" for row in self.rows if row.failure),
        ]

    def to_markdown(self) -> str:
        """Return the table and its notes as Markdown."""
        numbers = [place for place, column in enumerate(self._columns()) if not _is_text(column)]
        lines = markdown_table(self.table(), numbers=numbers)
        return "\n".join([*lines, "", *(f"- {in_markdown(note)}" for note in self.notes())]) + "\n"

    def plot(self, *, dark: bool = False) -> Figure:
        """Draw accuracy against what a picture costs, a point per backbone.

        Args:
            dark: Whether it is for a dark page.

        Raises:
            SettingError: No backbone has an accuracy.
        """
        from transferkit.plots import TradeoffPoint, plot_tradeoff

        points = [
            TradeoffPoint(row.backbone, row.macs / 1e9, row.accuracy, row.spread or 0.0)
            for row in self.rows
            if row.accuracy is not None and row.macs
        ]
        return plot_tradeoff(points, x_label=_COST, dark=dark)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``leaderboard.csv``, ``.json``, ``.md`` and ``.html``, and ``tradeoff.png`` where there is an accuracy.

        The page holds all it shows, and opens from the disk.

        Args:
            folder: Where to; made if missing, and what is there under these names is replaced.

        Returns:
            The folder.

        Raises:
            OutputError: It cannot be written.
        """
        folder = Path(folder)
        with_plot = any(row.accuracy is not None and row.macs for row in self.rows)
        plots = {name: _png(self.plot(dark=dark)) for name, dark in _PLOTS.items()} if with_plot else {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "leaderboard.csv", self._csv())
            _write(folder / "leaderboard.json", json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
            _write(folder / "leaderboard.md", self.to_markdown())
            _write(folder / "leaderboard.html", self._html(plots))
            if plots:
                (folder / "tradeoff.png").write_bytes(plots["light"])
        except OSError as error:
            raise OutputError(f"the leaderboard cannot be written into {folder}: {error.strerror or error}") from error
        return folder

    def _columns(self) -> list[_Column]:
        full = any(row.full_accuracy is not None for row in self.rows)
        return [column for column in _COLUMNS if full or column.title != "everything trained"]

    def _csv(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [each.name for each in fields(LeaderboardRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "seeds": " ".join(map(str, row["seeds"]))} for row in self.to_dicts())
        return text.getvalue()

    def _html(self, plots: Mapping[str, bytes]) -> str:
        columns = self._columns()
        rows = [[(each.text(row), each.value(row), _is_text(each)) for each in columns] for row in self.rows]
        return render_page(
            "leaderboard.html",
            about=[(name, _in_words(value)) for name, value in self.about.items()],
            columns=[(column.title, _is_text(column)) for column in columns],
            rows=rows,
            notes=self.notes(),
            plots={name: base64.b64encode(content).decode() for name, content in plots.items()},
            cost=_COST,
        )


_PLOTS = {"light": False, "dark": True}


class _Column(NamedTuple):
    """A column: its title, what a row shows there, and what it is sorted by."""

    title: str
    text: Callable[[LeaderboardRow], str]
    value: Callable[[LeaderboardRow], Any]


def _shown(
    name: str, write: Callable[[Any], str]
) -> tuple[Callable[[LeaderboardRow], str], Callable[[LeaderboardRow], Any]]:
    def text(row: LeaderboardRow) -> str:
        value = getattr(row, name)
        return "–" if value is None else write(value)

    return text, lambda row: getattr(row, name)


def _accuracy(name: str, spread: str) -> tuple[Callable[[LeaderboardRow], str], Callable[[LeaderboardRow], Any]]:
    def text(row: LeaderboardRow) -> str:
        mean, deviation = getattr(row, name), getattr(row, spread)
        return "–" if mean is None else f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"

    return text, lambda row: getattr(row, name)


_COLUMNS = (
    _Column("backbone", *_shown("backbone", str)),
    _Column("val accuracy", *_accuracy("accuracy", "spread")),
    _Column("everything trained", *_accuracy("full_accuracy", "full_spread")),
    _Column("seconds", *_shown("seconds", "{:,.0f}".format)),
    _Column("parameters", *_shown("parameters", lambda count: f"{count / 1e6:,.1f} M")),
    _Column("MACs", *_shown("macs", lambda count: f"{count / 1e9:,.2f} G")),
    _Column("input", *_shown("image_size", "{} px".format)),
    _Column("pictures/s", *_shown("pictures_per_second", "{:,.0f}".format)),
    _Column("peak memory", *_shown("peak_memory", decimal)),
    _Column("licence of weights", *_shown("licence", str)),
    _Column("LogME", *_shown("log_me", "{:.3f}".format)),
    _Column("H-score", *_shown("h_score", "{:.3f}".format)),
)


def _is_text(column: _Column) -> bool:
    return column.title in ("backbone", "licence of weights")


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=144)
    return content.getvalue()


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold bytes that are no text
