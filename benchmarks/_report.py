"""Figures of paired runs as Markdown: medians, ratios, accuracies with their spread, what was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Outcome",
    "later_share",
    "markdown_table",
    "mean_spread",
    "median_range",
    "paired_ratio",
    "table",
    "verdict",
]


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        process: Seconds from its start to its end, imports included.
        training: Seconds of its own training and validation.
        epochs: Seconds of each epoch.
        val_accuracy: That of the best epoch, 0 to 1.
        command: Seconds that transferkit's command took once it was imported, everything it writes included; 0 for
            others.
    """

    process: float
    training: float
    epochs: tuple[float, ...]
    val_accuracy: float
    command: float = 0.0

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.process:.1f} s, {self.training:.1f} s of it training, val_accuracy {self.val_accuracy:.3f}"


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over the repeats of how many times longer theirs took than ours.

    Example:
        >>> paired_ratio([10.0, 30.0, 90.0], [5.0, 10.0, 10.0])
        3.0
    """
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def later_share(epochs: Sequence[float]) -> float | None:
    """Return what an epoch after the first costs on average, as a share of the first; ``None`` for a single epoch.

    Example:
        >>> later_share([10.0, 0.1, 0.3]), later_share([10.0])
        (0.02, None)
    """
    return statistics.mean(epochs[1:]) / epochs[0] if len(epochs) > 1 else None


def mean_spread(values: Sequence[float]) -> str:
    """Write mean ± standard deviation.

    Example:
        >>> mean_spread([0.95, 0.97]), mean_spread([0.95])
        ('0.960 ± 0.014', '0.950')
    """
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def median_range(values: Sequence[float]) -> str:
    """Write the median, and smallest to largest in brackets.

    Example:
        >>> median_range([12.0, 10.0, 15.04]), median_range([9.0])
        ('12.0 (10.0–15.0)', '9.0')
    """
    median = f"{statistics.median(values):.1f}"
    return f"{median} ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else median


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table.

    Example:
        >>> print(markdown_table(["run", "s"], [["ours", "1.0"]]))
        | run | s |
        |---|---|
        | ours | 1.0 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def table(outcomes: Mapping[str, Sequence[Outcome] | str], *, ours: Sequence[str], accuracy: bool = True) -> str:
    """Write a row per contestant: seconds, ratios to ours, accuracy, and what a later epoch costs.

    Args:
        outcomes: Of each contestant, one per repeat and in the order of the repeats; or in words why there are none.
        ours: Which contestants the others are compared with; the training alone is compared with the first of them.
        accuracy: Whether accuracies mean something; they do not from random weights.
    """
    bases = [(name, found) for name in ours if not isinstance(found := outcomes[name], str)]
    head = ["run", "process, s", *(f"× {name}" for name, _ in bases)]
    head += ["training and validation, s", *(f"× {name}" for name, _ in bases[:1])]
    head += ["best val_accuracy", "later epoch / first"]
    rows = []
    for name, found in outcomes.items():
        if isinstance(found, str):
            rows.append([name, found, *["–"] * (len(head) - 2)])
            continue
        process, training = [each.process for each in found], [each.training for each in found]
        shares = [share for each in found if (share := later_share(each.epochs)) is not None]
        rows.append(
            [
                name,
                median_range(process),
                *(f"{paired_ratio(process, [each.process for each in base]):.2f}" for _, base in bases),
                median_range(training),
                *(f"{paired_ratio(training, [each.training for each in base]):.2f}" for _, base in bases[:1]),
                mean_spread([each.val_accuracy for each in found]) if accuracy else "–",
                f"{100 * statistics.median(shares):.1f} %" if shares else "–",
            ]
        )
    return markdown_table(head, rows)


def verdict(outcomes: Mapping[str, Sequence[Outcome] | str], name: str, against: Sequence[str], *, asked: float) -> str:
    """Say how the fastest of some contestants compares with one of ours, whole processes.

    Args:
        outcomes: As for :func:`table`.
        name: One of ours.
        against: The contestants it is compared with; those that did not run are named.
        asked: The ratio that was promised.

    Example:
        >>> runs = {"ours": [Outcome(2, 1, (1,), 0.9)], "loop": [Outcome(60, 9, (9,), 0.9)], "other": "not installed"}
        >>> verdict(runs, "ours", ["loop", "other"], asked=25)
        'ours: asked at least 25×, came to 30.00× (loop), not compared: other.'
    """
    base = outcomes[name]
    ratios = {
        each: paired_ratio([run.process for run in found], [run.process for run in base])
        for each in against
        if not isinstance(found := outcomes[each], str) and not isinstance(base, str)
    }
    missing = [each for each in against if each not in ratios]
    left_out = f", not compared: {', '.join(missing)}" if missing else ""
    if not ratios:
        return f"{name}: asked at least {asked:g}×{left_out}."
    closest = min(ratios, key=ratios.__getitem__)
    return f"{name}: asked at least {asked:g}×, came to {ratios[closest]:.2f}× ({closest}){left_out}."
