"""What every optimizer step did, kept to be drawn afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transferkit.callbacks._base import Callback

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["StepRecorder", "stage_groups"]


class StepRecorder(Callback):
    """Keep the training loss and each stage's lr of every optimizer step.

    A step's loss stays on its device until the epoch has been trained, so that no step waits for it. An interrupted run
    that goes on has the same record as one that was not.

    Attributes:
        losses: Mean loss over the pictures of each step, in all processes, with smoothing and mixing where they are on;
            NaN for steps of the run that were not seen.
        lrs: By stage, in execution order: the lr of each step, ``None`` where the stage is frozen, NaN for steps of the
            run that were not seen. Of a stage with several groups the first one's lr is meant.

    Source: :func:`transferkit.plots.plot_steps` and :func:`transferkit.plots.plot_lrs` draw what is kept here.

    Example:
        >>> recorder = StepRecorder()
        >>> recorder.losses, recorder.lrs, recorder.unfreeze_steps
        ([], {}, [])
    """

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self.losses: list[float] = []
        self.lrs: dict[str, list[float | None]] = {}
        self._groups: dict[str, int | None] = {}
        # as the trainer adds them up: before the first step that is not yet in losses, and after each
        self._sums: list[Tensor] = []
        self._reduce: Callable[[Tensor], Tensor] = lambda sums: sums

    @property
    def unfreeze_steps(self) -> list[int]:
        """The steps, counted from 1, in which a stage trained that was frozen in the step before."""
        freed = {
            step
            for rates in self.lrs.values()
            for step, (before, now) in enumerate(pairwise(rates), start=2)
            if before is None and now is not None
        }
        return sorted(freed)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Learn how processes add up."""
        self._reduce = trainer.accelerator.reduce

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Find each stage's group, and forget steps that were broken off and begin again."""
        self._settle()
        self._groups = stage_groups(trainer)
        self.lrs = {name: self.lrs.get(name, [])[: trainer.step] for name in self._groups}
        for rates in self.lrs.values():
            rates.extend([math.nan] * (trainer.step - len(rates)))
        del self.losses[trainer.step :]
        self.losses.extend([math.nan] * (trainer.step - len(self.losses)))
        self._sums = [trainer.loss_sums.to(trainer.device, copy=True)]

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Note a step that was taken."""
        if trainer.step < len(self.losses) + len(self._sums):
            return  # gradients are still being added up
        self._sums.append(trainer.loss_sums.clone())
        for name, group in self._groups.items():
            lr = None if group is None else float(trainer.optimizer.param_groups[group]["lr"])
            self.lrs[name].append(lr)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Fetch the epoch's losses."""
        self._settle()

    def _settle(self) -> None:
        """Make losses of the sums; every process must."""
        if len(self._sums) < 2:
            return
        loss, weight = self._reduce(torch.stack(self._sums).diff(dim=0)).cpu().double().unbind(1)
        self.losses += (loss / weight).tolist()
        del self._sums[:-1]

    def state_dict(self) -> dict[str, Any]:
        """Return both records."""
        self._settle()
        return {"losses": list(self.losses), "lrs": {name: list(rates) for name, rates in self.lrs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both records back."""
        self.losses = list(state["losses"])
        self.lrs = {name: list(rates) for name, rates in state["lrs"].items()}
        self._sums = []


def stage_groups(trainer: Trainer) -> dict[str, int | None]:
    """Return the place of each stage's group in the optimizer, in execution order; ``None`` for frozen stages.

    Args:
        trainer: The one that is asked; of a stage with several groups the first one is meant.
    """
    groups = trainer.optimizer.param_groups
    return {
        stage.name: None
        if stage.name in trainer.model.frozen
        else next(i for i, group in enumerate(groups) if any(each is stage.parameters[0] for each in group["params"]))
        for stage in trainer.model.stages
        if stage.parameters
    }
