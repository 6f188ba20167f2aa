"""Saving a run's state, so that a run that was broken off goes on as if it had not been."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transferkit.callbacks._base import Callback
from transferkit.interrupts import Interrupted
from transferkit.ranges import check_number, check_whole_number
from transferkit.resume import ResumeStore, check_fields, refuses_odd_content

if TYPE_CHECKING:
    from transferkit.model import TransferModel
    from transferkit.trainer import Trainer

__all__ = ["ResumeCheckpoint"]

_FIELDS = {
    **dict.fromkeys(("network", "optimizer", "callbacks", "identity"), dict),
    **dict.fromkeys(("batch", "batches_per_epoch"), int),
    "history": list,
    "sums": Tensor,
    "scaler": dict | None,
    "micro_batch": int | None,
    "seconds": float,
    "stopped": bool,
    "precision": str,
}
"""What :meth:`Trainer.state_dict` gives, and the identity."""


class ResumeCheckpoint(Callback):
    """Save the whole state of a run at the end of each epoch, and every few steps; give it as the last callback.

    ``trainer.load_state_dict(checkpoint.read())`` before ``trainer.fit`` goes on from there.

    Args:
        directory: Folder for the state alone.
        every: Optimizer steps between two states within an epoch; ``None`` for none.
        min_interval: Seconds that lie between two states at least, 0 or more, so that saving stays cheap where epochs
            are short. An interrupted run is always saved.
        identity: What a run must have in common with one that goes on with it, as JSON values; kept beside the state.

    Raises:
        SettingError: ``every`` or ``min_interval`` is outside its range.
        OutputError: While training: the state cannot be written; the one before is as it was.

    Example:
        >>> ResumeCheckpoint("runs/bees/resume", every=100).store.exists()
        False
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | None = None,
        min_interval: float = 0.0,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the settings; nothing is written yet."""
        check_whole_number("every", every, at_least=1, or_none=True)
        check_number("min_interval", min_interval, at_least=0)
        self.store = ResumeStore(directory)
        self.every, self.min_interval = every, min_interval
        self.identity = dict(identity or {})
        self._saved = -float("inf")
        self._at_beginning = False
        self._fit = ""  # frozen tensors are those of one fit: before another they may have become others

    def read(self) -> dict[str, Any] | None:
        """Return the state that was saved last, with ``"identity"`` in it, or ``None`` if there is none.

        Raises:
            ArtifactError: It is damaged, or no run has saved such a state.
        """
        found = self.store.read()
        if found is None:
            return None
        state, constant = found
        with refuses_odd_content():
            check_fields(state, _FIELDS, "the state")
            if not 0 <= state["batch"] <= state["batches_per_epoch"]:
                raise ValueError(f"it is after batch {state['batch']:,} of {state['batches_per_epoch']:,}")
        return {**state, "network": {**state["network"], **constant}}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Save where the run begins, so that its folder is known to hold one that can be gone on with."""
        self._fit = secrets.token_hex(8)
        if trainer.at_beginning:
            self._save(trainer)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Save after every so many steps."""
        within_step = trainer.batch % trainer.accumulate and trainer.batch < trainer.batches_per_epoch
        if self.every is not None and not within_step and trainer.step % self.every == 0:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Save."""
        self._save_if_due(trainer)

    def on_exception(self, trainer: Trainer) -> None:
        """Save what an interrupt has ended; an error leaves the state before it, unless nothing was done by then."""
        if isinstance(sys.exception(), Interrupted):
            self._save(trainer)
        elif self._at_beginning and trainer.at_beginning and trainer.is_main_process:
            self.store.clear()

    def _save_if_due(self, trainer: Trainer) -> None:
        waited = time.monotonic() - self._saved
        if trainer.any_process(trainer.is_main_process and waited >= self.min_interval):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        state = trainer.state_dict()
        self._at_beginning = trainer.at_beginning
        if trainer.is_main_process:
            network, constant = state["network"], _frozen_keys(trainer.model)
            changing = {key: value for key, value in network.items() if key not in constant}
            self.store.write(
                {**state, "network": changing, "identity": self.identity},
                constant={key: network[key] for key in network if key in constant},
                version=f"{self._fit} {_frozen_since(trainer)}",
            )
        self._saved = time.monotonic()


def _frozen_since(trainer: Trainer) -> str:
    """Name what is frozen, and since when: a stage that trained in between is not what it was."""
    names = trainer.model.stage_names
    since = max((0, *trainer.policy.changes(names, trainer.epoch + 1)))
    return f"{since}: {', '.join(name for name in names if name in trainer.model.frozen)}"


def _frozen_keys(model: TransferModel) -> set[str]:
    frozen = [stage for stage in model.stages if stage.name in model.frozen]
    tensors = {id(tensor) for stage in frozen for tensor in (*stage.parameters, *stage.buffers)}
    return {key for key, value in model.network.state_dict(keep_vars=True).items() if id(value) in tensors}
