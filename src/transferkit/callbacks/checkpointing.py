"""Keeping the best weights, and stopping when they no longer get better."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transferkit.calibration import temperature_for
from transferkit.callbacks._base import Callback
from transferkit.checkpoint import read_weights, save_artifact
from transferkit.distribution import load_network_state, network_state, share_object
from transferkit.history import EpochRecord, improves
from transferkit.ranges import check_whole_number

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["BestCheckpoint", "EarlyStopping"]


class BestCheckpoint(Callback):
    """Keep the weights of the best epoch of the whole run, and put them back into the model at its end.

    With them goes the temperature that calibrates their confidences on the validation pictures
    (:func:`~transferkit.calibration.temperature_for`).

    Args:
        directory: Folder in which the best model so far is saved whenever it changes, ready to be loaded; ``None``
            keeps the weights in memory only.
        monitor: ``"val_accuracy"``, ``"val_loss"`` or ``"train_loss"``; where two epochs tie, the lower validation
            loss wins.
        mode: ``"min"`` or ``"max"``; ``None`` for the direction that is better for the figure.

    Raises:
        SettingError: No such figure or mode.

    Example:
        >>> BestCheckpoint(monitor="val_loss").best is None
        True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        monitor: str = "val_accuracy",
        mode: str | None = None,
    ) -> None:
        """Store the settings."""
        improves(_WORST, _WORST, monitor, mode)
        self.directory = None if directory is None else Path(directory)
        self.monitor, self.mode = monitor, mode
        self.best: EpochRecord | None = None
        self.temperature = 1.0
        self.val_logits = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Trainer) -> None:
        """Keep the weights if this epoch is the best."""
        record = trainer.history.records[-1]
        if self.best is not None and not improves(record, self.best, self.monitor, self.mode):
            return
        trainer.model.temperature = temperature = temperature_for(*trainer.val_logits)
        weights = network_state(trainer.model.network)
        if self.directory is None:
            self._weights = {key: value.cpu().clone() for key, value in weights.items()}
        elif trainer.is_main_process:
            save_artifact(trainer.model, self.directory, weights=weights)
        # not before they are saved, which may fail
        self.best, self.temperature, self.val_logits = record, temperature, trainer.val_logits

    def on_fit_end(self, trainer: Trainer) -> None:
        """Put the best weights into the model."""
        if self.best is not None:
            self.restore(trainer)

    def restore(self, trainer: Trainer) -> None:
        """Put the best weights so far into the model, with their temperature; every process must ask.

        Args:
            trainer: The one that trained them, after one epoch or more.

        Raises:
            ArtifactError: The saved model is gone or damaged.
        """
        weights: dict[str, Tensor] | None = self._weights
        if self.directory is not None:  # the folder may be on the main process's machine alone
            weights = read_weights(self.directory) if trainer.is_main_process else None
        load_network_state(trainer.model.network, share_object(trainer.accelerator, weights))
        trainer.model.temperature = self.temperature

    def state_dict(self) -> dict[str, Any]:
        """Return the best record, its temperature, and its weights where no folder keeps them."""
        best = None if self.best is None else asdict(self.best)
        return {"best": best, "temperature": self.temperature, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best record, its temperature and its weights back."""
        self.temperature = float(state["temperature"])
        self.best = None if state["best"] is None else EpochRecord(**state["best"])
        self._weights = dict(state["weights"])


class EarlyStopping(Callback):
    """End training when a figure has not improved for some epochs; counting starts anew when stages are unfrozen.

    Args:
        patience: Epochs without improvement that are borne, 1 or more.
        monitor: ``"val_loss"``, ``"val_accuracy"`` or ``"train_loss"``.
        mode: ``"min"`` or ``"max"``; ``None`` for the direction that is better for the figure.

    Raises:
        SettingError: A value is outside its range.

    Source: Prechelt 1998, "Early stopping — but when?".

    Example:
        >>> EarlyStopping(patience=2).waited
        0
    """

    def __init__(self, *, patience: int = 3, monitor: str = "val_loss", mode: str | None = None) -> None:
        """Store the settings."""
        check_whole_number("patience", patience, at_least=1)
        improves(_WORST, _WORST, monitor, mode)
        self.patience, self.monitor, self.mode = patience, monitor, mode
        self.best: EpochRecord | None = None
        self.waited = 0

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin to count anew where the frozen stages have changed."""
        if trainer.epoch in trainer.policy.changes(trainer.model.stage_names, trainer.epoch + 1):
            self.waited = 0

    def on_validation_end(self, trainer: Trainer) -> None:
        """Count, and stop when patience is over."""
        record = trainer.history.records[-1]
        if self.best is None or improves(record, self.best, self.monitor, self.mode):
            self.best, self.waited = record, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the best record and the count."""
        return {"best": None if self.best is None else asdict(self.best), "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best record and the count back."""
        self.best = None if state["best"] is None else EpochRecord(**state["best"])
        self.waited = int(state["waited"])


_WORST = EpochRecord(0, float("inf"), float("inf"), 0.0, 0.0)
