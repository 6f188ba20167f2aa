"""Learning rates over time: each group's own rate, times the schedule's factor."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transferkit.callbacks._base import Callback
from transferkit.schedules import MetricSchedule, Progress, Schedule

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["LRScheduler"]


class LRScheduler(Callback):
    """Set every group's lr before each step: its own lr × the schedule's factor.

    Ratios between groups (layer-wise decay) stay what they were. A phase of the freeze policy that brings its own lr
    starts the schedule anew, scaled so that the head's group has that lr.

    Args:
        schedule: One of :mod:`transferkit.schedules`.

    Example:
        >>> from transferkit.schedules import Cosine
        >>> LRScheduler(Cosine(warmup_epochs=1))
        LRScheduler(Cosine(warmup_epochs=1, final=0.0))
    """

    def __init__(self, schedule: Schedule) -> None:
        """Store the schedule."""
        self.schedule = schedule
        self.base_lrs: list[float] = []

    def __repr__(self) -> str:
        """Name the schedule."""
        return f"LRScheduler({self.schedule!r})"

    def on_fit_start(self, trainer: Trainer) -> None:
        """Remember each group's own lr."""
        self.base_lrs = self.base_lrs or [group["lr"] for group in trainer.optimizer.param_groups]

    def on_train_batch_start(self, trainer: Trainer) -> None:
        """Set the rates of this step."""
        phase_lrs = trainer.policy.phase_lrs()
        bounds = sorted({0, *(epoch for epoch in phase_lrs if epoch < trainer.epochs), trainer.epochs})
        start, end = next((a, b) for a, b in pairwise(bounds) if a <= trainer.epoch < b)
        factor = phase_lrs[start] / self.base_lrs[trainer.head_group] if start in phase_lrs else 1.0
        if isinstance(self.schedule, MetricSchedule):
            factor *= self.schedule.factor_from(trainer.history[self.schedule.monitor][start:])
        else:
            steps = trainer.steps_per_epoch
            progress = Progress(step=trainer.step - start * steps, steps=(end - start) * steps, steps_per_epoch=steps)
            factor *= self.schedule.factor(progress)
        for group, lr in zip(trainer.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' own rates."""
        return {"base_lrs": self.base_lrs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the groups' own rates back."""
        self.base_lrs = list(state["base_lrs"])
