"""Telling what a run does: in the terminal and in a table."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferkit.callbacks._base import Callback

if TYPE_CHECKING:
    from rich.console import Console

    from transferkit.trainer import Trainer

__all__ = ["CSVLogger", "Progress", "UnfreezeLogger"]

logger = logging.getLogger("transferkit")


class Progress(Callback):
    """Show a progress bar while an epoch runs and one line when it ends.

    Args:
        console: Where to write; ``None`` for the terminal's standard error, so that standard output stays free.
        monitor: The figure by which an epoch is called the best.

    Example:
        >>> Progress().console is None
        True
    """

    def __init__(self, console: Console | None = None, *, monitor: str = "val_accuracy") -> None:
        """Store the settings; nothing is written yet."""
        self.console = console
        self.monitor = monitor
        self._bar: Any = None
        self._task: Any = None
        self._frozen: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start the bar."""
        if not trainer.is_main_process:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console or Console(stderr=True),
            transient=True,
        )
        self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin an epoch's bar."""
        if self._bar is not None:
            title = f"epoch {trainer.epoch + 1}/{trainer.epochs}"
            self._task = self._bar.add_task(title, total=trainer.batches_per_epoch, completed=trainer.batch, note="")

    def on_frozen_pass_batch_end(self, trainer: Trainer) -> None:
        """Move a bar of its own, which is there while activations are computed."""
        if self._bar is None:
            return
        done, of = trainer.frozen_pass
        if self._frozen is None:
            self._frozen = self._bar.add_task("frozen stages, once", total=of, note="")
        self._bar.update(self._frozen, completed=done)
        if done == of:
            self._bar.remove_task(self._frozen)
            self._frozen = None

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_validation_end(self, trainer: Trainer) -> None:
        """Replace the bar by the epoch's line."""
        if self._bar is None:
            return
        record = trainer.history.records[-1]
        best = trainer.history.best(self.monitor) is record
        self._bar.remove_task(self._task)
        self._bar.console.print(
            f"epoch {record.epoch}/{trainer.epochs}  train_loss {record.train_loss:.4f}  "
            f"val_loss {record.val_loss:.4f}  val_accuracy {record.val_accuracy:.4f}  "
            f"{record.seconds:.1f} s{'  best' if best else ''}",
            highlight=False,
            soft_wrap=True,  # one line per epoch, however narrow the terminal or the log is
        )

    def on_fit_end(self, trainer: Trainer) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._frozen = None

    def on_exception(self, trainer: Trainer) -> None:
        """Take the bar away, so that the error is readable."""
        self.on_fit_end(trainer)


class CSVLogger(Callback):
    """Write ``history.csv`` anew after every epoch.

    Args:
        path: The file; its folder is made if missing.

    Raises:
        OutputError: While training: the file cannot be written.

    Example:
        >>> CSVLogger("runs/bees/history.csv").path.name
        'history.csv'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Store the path; nothing is written yet."""
        self.path = Path(path)

    def on_validation_end(self, trainer: Trainer) -> None:
        """Write the table."""
        if trainer.is_main_process:
            trainer.history.save_csv(self.path)


class UnfreezeLogger(Callback):
    """Log which stages train, at the start and whenever that changes.

    Example:
        >>> UnfreezeLogger().shown is None
        True
    """

    def __init__(self) -> None:
        """Start with nothing shown."""
        self.shown: frozenset[str] | None = None

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Log a change."""
        if trainer.model.frozen != self.shown:
            self.shown = trainer.model.frozen
            training = [name for name in trainer.model.stage_names if name not in self.shown]
            logger.info("epoch %d: training %s", trainer.epoch + 1, ", ".join(training))
