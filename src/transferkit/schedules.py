"""Learning-rate schedules as pure functions: a multiplier of every group's own learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transferkit.exceptions import SettingError, closest
from transferkit.ranges import MOST_EPOCHS, check_number, check_whole_number

__all__ = [
    "Constant",
    "Cosine",
    "ExponentialDecay",
    "MetricSchedule",
    "OneCycle",
    "Plateau",
    "Progress",
    "Schedule",
    "StepDecay",
    "StepSchedule",
    "schedule_by_name",
]


@dataclass(frozen=True)
class Progress:
    """How far a span of training has come.

    Args:
        step: Optimizer steps done within the span, from 0 to ``steps``; also the index of the step about to be made.
        steps: Optimizer steps of the whole span, 1 or more.
        steps_per_epoch: Optimizer steps of one epoch, 1 or more.

    Raises:
        SettingError: A number is outside its range.

    Example:
        >>> Progress(step=25, steps=100, steps_per_epoch=10).epoch
        2
    """

    step: int
    steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        """Validate every value."""
        check_whole_number("steps", self.steps, at_least=1)
        check_whole_number("step", self.step, at_least=0, at_most=self.steps)
        check_whole_number("steps_per_epoch", self.steps_per_epoch, at_least=1)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch


class StepSchedule(ABC):
    """A schedule that only depends on how far training has come; subclass it with one method for your own.

    Example:
        >>> class Halfway(StepSchedule):
        ...     def factor(self, progress):
        ...         return 1.0 if 2 * progress.step < progress.steps else 0.1
        >>> Halfway().factor(Progress(step=5, steps=10, steps_per_epoch=5))
        0.1
    """

    @abstractmethod
    def factor(self, progress: Progress) -> float:
        """Return the multiplier of each group's learning rate for the step about to be made.

        Args:
            progress: Where training is; its ``step`` counts the steps already made.

        Returns:
            A share of the group's own learning rate, from 0 to 1.
        """


class MetricSchedule(ABC):
    """A schedule that looks at one metric after each epoch.

    A subclass names the metric in ``monitor``, such as ``"val_loss"``.
    """

    monitor: str

    @abstractmethod
    def factor_from(self, values: Sequence[float]) -> float:
        """Return the multiplier of each group's learning rate after these epochs.

        Args:
            values: The metric after each epoch so far, oldest first; may be empty.

        Returns:
            A share of the group's own learning rate, from 0 to 1.
        """


Schedule: TypeAlias = StepSchedule | MetricSchedule
"""What a trainer accepts: a schedule of steps or a schedule of a metric."""


@dataclass(frozen=True)
class Constant(StepSchedule):
    """Keep the learning rate, after an optional linear warm-up.

    Args:
        warmup_epochs: Length of the warm-up in epochs, fractions allowed; 0 or more.

    Raises:
        SettingError: ``warmup_epochs`` is outside its range.

    Source: ``torch.optim.lr_scheduler.LinearLR`` for the warm-up.

    Example:
        >>> Constant(warmup_epochs=1).factor(Progress(step=0, steps=100, steps_per_epoch=10))
        0.1
    """

    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Validate the value."""
        check_number("warmup_epochs", self.warmup_epochs, at_least=0, at_most=MOST_EPOCHS)

    def factor(self, progress: Progress) -> float:
        """Return the share of the warm-up that the next step completes, then 1."""
        return _warmup(progress, _warmup_steps(progress, self.warmup_epochs))


@dataclass(frozen=True)
class StepDecay(StepSchedule):
    """Multiply the learning rate by ``gamma`` every few epochs.

    Args:
        every: Epochs between two drops, 1 or more.
        gamma: Factor of each drop; above 0, at most 1.

    Raises:
        SettingError: A value is outside its range.

    Source: ``torch.optim.lr_scheduler.StepLR(step_size=every, gamma=gamma)``.

    Example:
        >>> StepDecay(every=7, gamma=0.1).factor(Progress(step=7, steps=10, steps_per_epoch=1))
        0.1
    """

    every: int = 7
    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Validate every value."""
        _check_staircase(self.every, self.gamma)

    def factor(self, progress: Progress) -> float:
        """Return ``gamma`` to the power of the drops so far."""
        return _staircase(progress, self.every, self.gamma)


@dataclass(frozen=True)
class ExponentialDecay(StepSchedule):
    """Multiply the learning rate by ``gamma`` after each epoch, or after every ``every`` epochs.

    Args:
        gamma: Factor of each drop; above 0, at most 1.
        every: Epochs between two drops, 1 or more.

    Raises:
        SettingError: A value is outside its range.

    Source: ``torch.optim.lr_scheduler.ExponentialLR(gamma)``, the case ``every=1``.

    Example:
        >>> ExponentialDecay(gamma=0.5).factor(Progress(step=2, steps=10, steps_per_epoch=1))
        0.25
    """

    gamma: float = 0.9
    every: int = 1

    def __post_init__(self) -> None:
        """Validate every value."""
        _check_staircase(self.every, self.gamma)

    def factor(self, progress: Progress) -> float:
        """Return ``gamma`` to the power of the drops so far."""
        return _staircase(progress, self.every, self.gamma)


@dataclass(frozen=True)
class Cosine(StepSchedule):
    """Warm up linearly, then fall along half a cosine until the end of the span.

    Args:
        warmup_epochs: Length of the warm-up in epochs, fractions allowed; 0 or more.
        final: Share of the learning rate left at the end, from 0 to 1.

    Raises:
        SettingError: A value is outside its range.

    Source: Loshchilov & Hutter 2017 (SGDR, without restarts); without warm-up it is
    ``torch.optim.lr_scheduler.CosineAnnealingLR(T_max=steps)`` stepped after each optimizer step.

    Example:
        >>> Cosine(warmup_epochs=0).factor(Progress(step=50, steps=100, steps_per_epoch=10))
        0.5
    """

    warmup_epochs: float = 0.5
    final: float = 0.0

    def __post_init__(self) -> None:
        """Validate every value."""
        check_number("warmup_epochs", self.warmup_epochs, at_least=0, at_most=MOST_EPOCHS)
        check_number("final", self.final, at_least=0, at_most=1)

    def factor(self, progress: Progress) -> float:
        """Return the warm-up's share, then the cosine's."""
        warmup_steps = _warmup_steps(progress, self.warmup_epochs)
        if progress.step < warmup_steps:
            return _warmup(progress, warmup_steps)
        return _anneal(1.0, self.final, (progress.step - warmup_steps) / max(1, progress.steps - warmup_steps))


@dataclass(frozen=True)
class OneCycle(StepSchedule):
    """Rise from a small share to the full learning rate and fall to almost nothing, along two half cosines.

    Args:
        peak_at: Share of the span spent rising, from 0 to 1.
        start: Share of the learning rate at the first step, from 0 to 1.
        final: Share of the learning rate at the last step, from 0 to 1.

    Raises:
        SettingError: A value is outside its range.

    Source: Smith & Topin 2018; ``torch.optim.lr_scheduler.OneCycleLR`` with each group's learning rate as ``max_lr``.

    Example:
        >>> OneCycle(peak_at=0.3).factor(Progress(step=29, steps=100, steps_per_epoch=10))
        1.0
    """

    peak_at: float = 0.3
    start: float = 1 / 25
    final: float = 1e-4 / 25

    def __post_init__(self) -> None:
        """Validate every value."""
        for name in ("peak_at", "start", "final"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)

    def factor(self, progress: Progress) -> float:
        """Return the share on the rising or on the falling cosine."""
        last = progress.steps - 1
        step = min(progress.step, last)
        # as in torch this may be fractional, and below 0 when the span is too short to rise at all
        peak = self.peak_at * progress.steps - 1
        if step < peak:
            return _anneal(self.start, 1.0, step / peak)
        return _anneal(1.0, self.final, (step - peak) / (last - peak)) if step > peak else 1.0


@dataclass(frozen=True)
class Plateau(MetricSchedule):
    """Multiply the learning rate by ``factor`` when a metric has stopped improving.

    Args:
        monitor: Name of the metric, such as ``"val_loss"``.
        mode: ``"min"`` when smaller is better, ``"max"`` when larger is.
        factor: Factor of each drop; above 0, below 1.
        patience: Epochs without improvement that are let pass before a drop, 0 or more.
        min_factor: Smallest share of the learning rate, from 0 to 1.
        threshold: Relative improvement that counts; at least 0, below 1.

    Raises:
        SettingError: A value is outside its range.

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau`` in its relative threshold mode.

    Example:
        >>> Plateau(patience=1).factor_from([1.0, 0.5, 0.5, 0.6])
        0.1
    """

    monitor: str = "val_loss"
    mode: str = "min"
    factor: float = 0.1
    patience: int = 2
    min_factor: float = 1e-4
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        """Validate every value."""
        if self.mode not in ("min", "max"):
            raise SettingError(f"mode={self.mode!r}; it can be min or max")
        check_number("factor", self.factor, above=0, below=1)
        check_whole_number("patience", self.patience, at_least=0)
        check_number("min_factor", self.min_factor, at_least=0, at_most=1)
        check_number("threshold", self.threshold, at_least=0, below=1)

    def factor_from(self, values: Sequence[float]) -> float:
        """Return the multiplier after these epochs; replaying them makes it independent of any saved state."""
        sign, best = (1, math.inf) if self.mode == "min" else (-1, -math.inf)
        share, bad_epochs = 1.0, 0
        for value in values:
            if sign * value < sign * best * (1 - sign * self.threshold):
                best, bad_epochs = value, 0
            else:
                bad_epochs += 1
            if bad_epochs > self.patience:
                share, bad_epochs = max(share * self.factor, self.min_factor), 0
        return share


_SCHEDULES: Mapping[str, Callable[[], Schedule]] = {
    "constant": Constant,
    "step": StepDecay,
    "exponential": ExponentialDecay,
    "cosine": Cosine,
    "one_cycle": OneCycle,
    "plateau": Plateau,
}


def schedule_by_name(name: str) -> Schedule:
    """Make a schedule with its default settings.

    Args:
        name: ``"constant"``, ``"step"``, ``"exponential"``, ``"cosine"``, ``"one_cycle"`` or ``"plateau"``.

    Returns:
        The schedule.

    Raises:
        SettingError: No schedule has this name.

    Source: The schedules themselves name theirs.

    Example:
        >>> schedule_by_name("cosine")
        Cosine(warmup_epochs=0.5, final=0.0)
    """
    if name not in _SCHEDULES:
        raise SettingError(f"no schedule named {name!r}; there are {', '.join(_SCHEDULES)}{closest(name, _SCHEDULES)}")
    return _SCHEDULES[name]()


def _check_staircase(every: int, gamma: float) -> None:
    check_whole_number("every", every, at_least=1)
    check_number("gamma", gamma, above=0, at_most=1)


def _staircase(progress: Progress, every: int, gamma: float) -> float:
    return gamma ** (progress.epoch // every)


def _warmup_steps(progress: Progress, epochs: float) -> int:
    return round(epochs * progress.steps_per_epoch)


def _warmup(progress: Progress, warmup_steps: int) -> float:
    # the step about to be made counts, so that the first one is not wasted on a learning rate of 0
    return min(1.0, (progress.step + 1) / warmup_steps) if warmup_steps else 1.0


def _anneal(start: float, end: float, share: float) -> float:
    """Go from ``start`` to ``end`` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
