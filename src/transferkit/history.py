"""What a run did, epoch by epoch."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transferkit.exceptions import ArtifactError, OutputError, SettingError, closest

__all__ = ["MONITORED", "EpochRecord", "History", "improves"]

MONITORED = {"val_accuracy": "max", "val_loss": "min", "train_loss": "min"}
"""The figures that can be monitored, and the direction in which each is better."""


@dataclass(frozen=True)
class EpochRecord:
    """Figures of one epoch.

    Attributes:
        epoch: Its number, counted from 1: how many epochs were done when it ended.
        train_loss: Mean training loss, with smoothing and mixing where they are on.
        val_loss: Mean cross-entropy on the validation pictures.
        val_accuracy: Share of validation pictures classified right, 0 to 1.
        seconds: Wall-clock time of the epoch, validation included.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass
class History:
    """The records of a run, first epoch first.

    Args:
        records: One per epoch; none by default.

    Example:
        >>> history = History([EpochRecord(1, 0.9, 0.8, 0.5, 2.0), EpochRecord(2, 0.7, 0.6, 0.9, 2.0)])
        >>> history.best().epoch, history["val_loss"]
        (2, [0.8, 0.6])
    """

    records: list[EpochRecord] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of epochs."""
        return len(self.records)

    def __iter__(self) -> Iterator[EpochRecord]:
        """Go through the records."""
        return iter(self.records)

    def __getitem__(self, name: str) -> list[float]:
        """Return one figure of every epoch.

        Args:
            name: An attribute of :class:`EpochRecord`, ``"val_loss"`` for example.

        Raises:
            SettingError: No such figure.
        """
        if name not in EpochRecord.__dataclass_fields__:
            known = list(EpochRecord.__dataclass_fields__)
            raise SettingError(f"no figure {name!r} in the history; it has {', '.join(known)}{closest(name, known)}")
        return [float(getattr(record, name)) for record in self.records]

    def best(self, monitor: str = "val_accuracy", mode: str | None = None) -> EpochRecord:
        """Return the best epoch so far; see :func:`improves`.

        Args:
            monitor: One of :data:`MONITORED`.
            mode: ``"min"`` or ``"max"``; ``None`` for the direction that is better for this figure.

        Raises:
            SettingError: There is no epoch yet, or no such figure.
        """
        if not self.records:
            raise SettingError("the history is empty: no epoch has ended yet")
        best = self.records[0]
        for record in self.records[1:]:
            if improves(record, best, monitor, mode):
                best = record
        return best

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return plain JSON values."""
        return [record.to_dict() for record in self.records]

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per epoch, replacing the file in one move; its folder is made if missing.

        Args:
            path: The file.

        Raises:
            OutputError: The file cannot be written; an older one is as it was.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(EpochRecord.__dataclass_fields__))
                writer.writeheader()
                writer.writerows(self.to_dicts())
            partial.replace(target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OutputError(f"{target} cannot be written: {error}") from error

    @classmethod
    def load_csv(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save_csv` wrote.

        Args:
            path: The file.

        Raises:
            ArtifactError: The file is missing or no such table.
        """
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
            if list(reader.fieldnames or ()) != list(EpochRecord.__dataclass_fields__):
                raise ValueError(f"its columns must be {', '.join(EpochRecord.__dataclass_fields__)}")
            return cls([EpochRecord(int(row.pop("epoch")), **{name: float(row[name]) for name in row}) for row in rows])
        except (OSError, csv.Error, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is no history of a run: {error}") from error


def improves(record: EpochRecord, best: EpochRecord, monitor: str = "val_accuracy", mode: str | None = None) -> bool:
    """Say whether ``record`` is better than ``best``; where they tie, the lower validation loss wins.

    Accuracy on a small validation set ties often, and the loss then still tells epochs apart.

    Args:
        record: The newer epoch.
        best: The best so far.
        monitor: One of :data:`MONITORED`.
        mode: ``"min"`` or ``"max"``; ``None`` for the direction that is better for this figure.

    Raises:
        SettingError: No such figure or mode.
    """
    if monitor not in MONITORED:
        raise SettingError(f"monitor={monitor!r}; it can be {', '.join(MONITORED)}{closest(monitor, MONITORED)}")
    direction = MONITORED[monitor] if mode is None else mode
    if direction not in ("min", "max"):
        raise SettingError(f"mode={mode!r}; it can be min or max")
    new, old = getattr(record, monitor), getattr(best, monitor)
    if new != old:
        return bool(new > old if direction == "max" else new < old) or (old != old and new == new)
    return record.val_loss < best.val_loss
