"""Learning rates over time: each group's own rate, times the schedule's factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transferkit.callbacks._base import Callback
from transferkit.freezing import FreezePolicy
from transferkit.schedules import MetricSchedule, Progress, Schedule

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["LRScheduler", "factor_at", "span_of"]


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
        seen = trainer.history[self.schedule.monitor] if isinstance(self.schedule, MetricSchedule) else ()
        factor = factor_at(
            self.schedule,
            trainer.policy,
            head_lr=self.base_lrs[trainer.head_group],
            step=trainer.step,
            steps_per_epoch=trainer.steps_per_epoch,
            epochs=trainer.epochs,
            values=seen,
        )
        for group, lr in zip(trainer.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = float(lr * factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' own rates."""
        return {"base_lrs": self.base_lrs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the groups' own rates back."""
        self.base_lrs = list(state["base_lrs"])


def span_of(policy: FreezePolicy, epoch: int, *, epochs: int) -> tuple[int, int]:
    """Return the epochs, first and after the last, over which one pass of the schedule goes that holds an epoch.

    Args:
        policy: Its phases with a lr of their own start the schedule anew.
        epoch: Number of epochs done, from 0 to ``epochs - 1``.
        epochs: Length of the run.

    Example:
        >>> from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
        >>> span_of(ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}, lr={2: 1e-4}), 3, epochs=5)
        (2, 5)
    """
    starts = {0, *policy.phase_lrs()}
    start = max(each for each in starts if each <= epoch)
    return start, min((each for each in starts if epoch < each < epochs), default=epochs)


def factor_at(
    schedule: Schedule,
    policy: FreezePolicy,
    *,
    head_lr: float,
    step: int,
    steps_per_epoch: int,
    epochs: int,
    values: Sequence[float] = (),
) -> float:
    """Return what every group's own lr is multiplied by in one step; training and the printed plan both ask here.

    Args:
        schedule: Its shape over a span.
        policy: Its phases with a lr of their own start the schedule anew, at that lr.
        head_lr: The own lr of the head's group, which a phase's lr replaces.
        step: Optimizer steps done in the whole run: 0 for the first one.
        steps_per_epoch: Optimizer steps of one epoch.
        epochs: Length of the run.
        values: What a schedule of a metric looks at: that metric after each epoch so far.

    Example:
        >>> from transferkit.freezing import FullFinetune
        >>> from transferkit.schedules import StepDecay
        >>> factor_at(StepDecay(2, 0.1), FullFinetune(), head_lr=1.0, step=20, steps_per_epoch=10, epochs=4)
        0.1
    """
    start, end = span_of(policy, step // steps_per_epoch, epochs=epochs)
    lr = policy.phase_lrs().get(start)
    own = 1.0 if lr is None else lr / head_lr
    if isinstance(schedule, MetricSchedule):
        return own * schedule.factor_from(values[start:])
    steps = (end - start) * steps_per_epoch
    return own * schedule.factor(Progress(step - start * steps_per_epoch, steps, steps_per_epoch))
