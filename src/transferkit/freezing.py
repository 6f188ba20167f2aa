"""Freeze policies: which stages are frozen, as a pure function of the epoch.

Nothing else decides what is frozen, so a run resumed at epoch *n* cannot differ from one that reached epoch *n*.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transferkit.exceptions import SettingError, UnknownStageError, closest
from transferkit.ranges import check_number, check_whole_number

__all__ = [
    "FreezeFirst",
    "FreezeMatching",
    "FreezePolicy",
    "FreezeUntil",
    "FullFinetune",
    "GradualUnfreezing",
    "LinearProbe",
    "ScheduledUnfreeze",
    "TrainLast",
    "policy_from_text",
]


class FreezePolicy(ABC):
    """Decides which stages are frozen.

    A policy of your own needs one method; see :class:`LinearProbe`.
    """

    @abstractmethod
    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return the names of the stages that are frozen.

        Args:
            stage_names: All stages in execution order; the last is the head.
            epoch: Number of epochs done so far: 0 during the first epoch.

        Raises:
            UnknownStageError: The policy names a stage that the network does not have.
        """

    def changes(self, stage_names: Sequence[str], epochs: int) -> tuple[int, ...]:
        """Return the epochs, after the first, at which the frozen stages change.

        Args:
            stage_names: All stages in execution order.
            epochs: How many epochs to look at.
        """
        states = [self.frozen_stages(stage_names, epoch) for epoch in range(epochs)]
        return tuple(epoch for epoch in range(1, epochs) if states[epoch] != states[epoch - 1])

    def phase_lrs(self) -> Mapping[int, float]:
        """Return the learning rates that phases bring along, by the epoch they begin at."""
        return {}


@dataclass(frozen=True)
class FullFinetune(FreezePolicy):
    """Train everything.

    Example:
        >>> FullFinetune().frozen_stages(["stem", "stage1", "head"], 0)
        frozenset()
    """

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return no stage."""
        return frozenset()


@dataclass(frozen=True)
class LinearProbe(FreezePolicy):
    """Train the head alone (linear probing).

    Example:
        >>> sorted(LinearProbe().frozen_stages(["stem", "stage1", "head"], 0))
        ['stage1', 'stem']
    """

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return every stage but the last."""
        return frozenset(stage_names[:-1])


@dataclass(frozen=True)
class FreezeUntil(FreezePolicy):
    """Freeze every stage before the named one, which is the first that trains.

    Args:
        stage: Name of a stage.

    Example:
        >>> sorted(FreezeUntil("stage2").frozen_stages(["stem", "stage1", "stage2", "head"], 0))
        ['stage1', 'stem']
    """

    stage: str

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return the stages before :attr:`stage`."""
        if self.stage not in stage_names:
            raise UnknownStageError(
                f"no stage named {self.stage!r}; the stages are {', '.join(stage_names)}"
                f"{closest(self.stage, stage_names, count=1)}"
            )
        return frozenset(stage_names[: list(stage_names).index(self.stage)])


@dataclass(frozen=True)
class FreezeFirst(FreezePolicy):
    """Freeze the first ``count`` stages; the head always trains.

    Args:
        count: Number of stages, 0 or more.

    Raises:
        SettingError: ``count`` is no whole number, or negative.

    Example:
        >>> FreezeFirst(1).frozen_stages(["stem", "stage1", "head"], 0)
        frozenset({'stem'})
    """

    count: int

    def __post_init__(self) -> None:
        """Validate the count."""
        check_whole_number("the count of FreezeFirst", self.count, at_least=0)

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return the first stages."""
        return frozenset(stage_names[: min(self.count, len(stage_names) - 1)])


@dataclass(frozen=True)
class TrainLast(FreezePolicy):
    """Train the head and the last ``count`` stages before it.

    Args:
        count: Number of stages, 1 or more.

    Raises:
        SettingError: ``count`` is no whole number, or below 1.

    Example:
        >>> TrainLast(1).frozen_stages(["stem", "stage1", "head"], 0)
        frozenset({'stem'})
    """

    count: int

    def __post_init__(self) -> None:
        """Validate the count."""
        check_whole_number("the count of TrainLast", self.count, at_least=1, hint="LinearProbe trains the head alone")

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return all stages before the last ones."""
        return frozenset(stage_names[: max(0, len(stage_names) - 1 - self.count)])


@dataclass(frozen=True)
class FreezeMatching(FreezePolicy):
    """Freeze the stages whose whole name matches a regular expression.

    Args:
        pattern: A Python regular expression, ``"stem|stage[12]"`` for example.

    Raises:
        SettingError: The pattern is no regular expression.

    Example:
        >>> sorted(FreezeMatching("stem|stage[12]").frozen_stages(["stem", "stage1", "stage2", "stage3", "head"], 0))
        ['stage1', 'stage2', 'stem']
    """

    pattern: str

    def __post_init__(self) -> None:
        """Compile the pattern once to see that it can be."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise SettingError(f"{self.pattern!r} is no regular expression: {error}") from error

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return the matching stages."""
        matching = frozenset(name for name in stage_names if re.fullmatch(self.pattern, name))
        if not matching:
            raise UnknownStageError(f"no stage matches {self.pattern!r}; the stages are {', '.join(stage_names)}")
        return matching


@dataclass(frozen=True)
class ScheduledUnfreeze(FreezePolicy):
    """Follow one policy after another.

    Args:
        phases: Policy by the number of epochs done when it begins; must hold 0.
        lr: Learning rate by the same numbers, for phases that bring their own. Such a phase starts its learning-rate
            schedule anew; a phase without one goes on with the schedule that is running. It takes the place of one
            that the phase's own policy begins with.

    Raises:
        SettingError: No phase begins at 0, a number is negative, or an lr is not above 0 or has no phase.

    Example:
        >>> policy = ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}, lr={5: 1e-4})
        >>> sorted(policy.frozen_stages(["stem", "head"], 4)), sorted(policy.frozen_stages(["stem", "head"], 5))
        (['stem'], [])
    """

    phases: Mapping[int, FreezePolicy]
    lr: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate the phases."""
        for epoch in self.phases:
            check_whole_number("the epoch at which a phase begins", epoch, at_least=0)
        if 0 not in self.phases:
            raise SettingError(f"phases must begin at epoch 0, got {sorted(self.phases)}")
        for epoch, lr in self.lr.items():
            if epoch not in self.phases:
                raise SettingError(
                    f"lr is given for epoch {epoch}, where no phase begins; they do at {sorted(self.phases)}"
                )
            check_number(f"the lr of the phase at epoch {epoch}", lr, above=0)

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return what the phase that covers ``epoch`` freezes."""
        start = self._begin_of_phase(epoch)
        return self.phases[start].frozen_stages(stage_names, epoch - start)

    def phase_lrs(self) -> Mapping[int, float]:
        """Return the given learning rates, and those that the phases' own policies bring while they last."""
        nested = {
            start + epoch: lr
            for start, policy in self.phases.items()
            for epoch, lr in policy.phase_lrs().items()
            if self._begin_of_phase(start + epoch) == start
        }
        return dict(sorted({**nested, **self.lr}.items()))

    def _begin_of_phase(self, epoch: int) -> int:
        return max(start for start in self.phases if start <= epoch)


@dataclass(frozen=True)
class GradualUnfreezing(FreezePolicy):
    """Begin with the head and free one more stage, from the last to the first, every few epochs.

    Args:
        every: Epochs between two stages, 1 or more.

    Raises:
        SettingError: ``every`` is no whole number, or below 1.

    Source: Howard & Ruder 2018 (ULMFiT), section 3.3.

    Example:
        >>> [len(GradualUnfreezing(every=2).frozen_stages(["stem", "stage1", "head"], epoch)) for epoch in range(6)]
        [2, 2, 1, 1, 0, 0]
    """

    every: int = 1

    def __post_init__(self) -> None:
        """Validate the pace."""
        check_whole_number("every", self.every, at_least=1)

    def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
        """Return what is not yet freed."""
        return frozenset(stage_names[: max(0, len(stage_names) - 1 - epoch // self.every)])


def policy_from_text(text: str) -> FreezePolicy:
    """Read a policy as the terminal writes it: ``head``, ``full``, ``gradual``, ``until:STAGE`` or ``last:N``.

    Raises:
        SettingError: The text is none of these.

    Example:
        >>> policy_from_text("until:stage3"), policy_from_text("last:1")
        (FreezeUntil(stage='stage3'), TrainLast(count=1))
    """
    name, _, value = text.partition(":")
    plain: dict[str, FreezePolicy] = {"head": LinearProbe(), "full": FullFinetune(), "gradual": GradualUnfreezing()}
    if text in plain:
        return plain[text]
    if name == "until" and value:
        return FreezeUntil(value)
    if name == "last" and value.isdecimal():
        return TrainLast(int(value))
    known = ["head", "full", "gradual", "until:STAGE", "last:N"]
    raise SettingError(f"no freeze policy {text!r}; there are {', '.join(known)}{closest(text, known)}")
