"""What a policy needs inside a loop that is not ours: the model to freeze, and the checks that come before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from transferkit.exceptions import SettingError
from transferkit.freezing import FreezePolicy
from transferkit.model import TransferModel
from transferkit.optim import unassigned_parameters

__all__ = ["HostedPolicy", "epochs_at_most", "find_model"]

_WITHOUT_A_LIMIT = 1000  # epochs, where the host trains until somebody stops it


@dataclass(frozen=True)
class HostedPolicy:
    """A freeze policy in the hands of another library's training loop.

    Args:
        policy: Decides what is frozen.
        host: The loop's name, for messages.

    Raises:
        SettingError: The policy brings learning rates, which belong to the host.

    Example:
        >>> from transferkit import LinearProbe, create_model
        >>> module = nn.Sequential(create_model("torchvision/resnet18", weights=None, num_classes=2))
        >>> HostedPolicy(LinearProbe(), "this loop").apply(module, 0)
        >>> sorted({parameter.requires_grad for parameter in module.parameters()})
        [False, True]
    """

    policy: FreezePolicy
    host: str

    def __post_init__(self) -> None:
        """Refuse what only our own trainer can do."""
        if lrs := self.policy.phase_lrs():
            raise SettingError(
                f"the policy brings learning rates for the phases at {sorted(lrs)}, but {self.host} sets them by its "
                "own schedule; leave lr out of the policy"
            )

    def apply(self, module: nn.Module, epoch: int) -> None:
        """Put the model into training mode, frozen as the policy says.

        Args:
            module: What the host trains; it is or holds the :class:`TransferModel`.
            epoch: Number of epochs done.
        """
        model = find_model(module)
        model.train().freeze(self.policy.frozen_stages(model.stage_names, epoch))

    def check_processes(self, module: nn.Module, *, epochs: int, processes: int) -> None:
        """Refuse a policy that changes under several processes, whose gradients the host wraps once for all.

        Args:
            module: What the host trains.
            epochs: How many epochs it may train.
            processes: How many processes train together.

        Raises:
            SettingError: The frozen stages change, and there are several processes.
            UnknownStageError: The policy names a stage that the model does not have.
        """
        changes = self.policy.changes(find_model(module).stage_names, epochs)
        if changes and processes > 1:
            raise SettingError(
                f"{self.policy} changes what is frozen after epoch {', '.join(map(str, changes))}, which {self.host} "
                f"cannot do in {processes} processes: it wraps the model once, before training, and gradients of what "
                "is freed later would not be averaged; train in one process, with a policy that stays the same, or "
                "with transferkit's Trainer"
            )

    def check_optimizer(self, module: nn.Module, groups: Sequence[Mapping[str, Any]], *, epochs: int) -> None:
        """Refuse an optimizer without parameters that the policy trains in some epoch.

        Args:
            module: What the host trains.
            groups: ``optimizer.param_groups``, of all optimizers.
            epochs: How many epochs it may train.

        Raises:
            SettingError: A parameter is missing.
        """
        model = find_model(module)
        names = model.stage_names
        always_frozen = frozenset(names).intersection(
            *(self.policy.frozen_stages(names, epoch) for epoch in range(epochs))
        )
        missing = [
            f"{stage.name}.{name}"
            for stage in model.stages
            if stage.name not in always_frozen
            for name in unassigned_parameters(nn.ParameterList(stage.parameters), groups)
        ]
        if missing:
            raise SettingError(
                f"the optimizer lacks {len(missing)} parameters of {model.name} that {self.policy} trains; "
                "give it param_groups(model, lr=…), frozen stages included"
            )


def find_model(module: nn.Module) -> TransferModel:
    """Return the one :class:`TransferModel` that a module is or holds.

    Args:
        module: What a host trains.

    Raises:
        SettingError: There is none, or there are several.

    Example:
        >>> from transferkit import create_model
        >>> model = create_model("torchvision/resnet18", weights=None, num_classes=2)
        >>> find_model(nn.Sequential(model)) is model
        True
    """
    found = {name: each for name, each in module.named_modules() if isinstance(each, TransferModel)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise SettingError(
            f"{type(module).__name__} holds no TransferModel when training begins; make one with create_model in its "
            "__init__, as self.model"
        )
    raise SettingError(
        f"{type(module).__name__} holds {len(found)} TransferModels ({', '.join(found)}), so which one the policy is "
        "for is unclear; leave the callback out and call freeze on the right one where an epoch starts"
    )


def epochs_at_most(epochs: float | None, steps: int | None) -> int:
    """Return how many epochs a host may train, from limits of which those below 1 mean no limit.

    An epoch has one optimizer step or more, so a limit of steps is one of epochs too.

    Example:
        >>> epochs_at_most(2.5, -1), epochs_at_most(-1, 40), epochs_at_most(None, None)
        (3, 40, 1000)
    """
    limits = [-int(-limit // 1) for limit in (epochs, steps) if limit is not None and limit > 0]
    return min(limits, default=_WITHOUT_A_LIMIT)
