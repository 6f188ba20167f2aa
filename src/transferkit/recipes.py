"""The default recipe: what a person gets who names only a model.

Its values were chosen by measurement; ``benchmarks/results/default_recipe.md`` says what was tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from transferkit.freezing import FreezePolicy, FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.schedules import Cosine, Schedule
from transferkit.transforms import Transform

__all__ = ["Recipe", "default_recipe"]

HEAD_LR = 3e-3
FULL_LR = 1e-3
HEAD_SHARE = 0.4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained, apart from the data and the seed.

    Attributes:
        policy: What is frozen when.
        lr: Learning rate of the head at the top of its schedule.
        schedule: Shape of the learning rate over time.
        weight_decay: Of weight matrices and kernels.
        layer_decay: Factor of the lr from one stage to the one before it.
        train_preset: Name of the training transform, or the transform itself.
        label_smoothing: Share of the target spread over all classes.
    """

    policy: FreezePolicy
    lr: float
    schedule: Schedule = field(default_factory=Cosine)
    weight_decay: float = 0.01
    layer_decay: float = 0.7
    train_preset: str | Transform = "light"
    label_smoothing: float = 0.0

    def replaced(self, **settings: Any) -> Recipe:
        """Return the recipe with the settings that are not ``None`` in their places."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


def default_recipe(policy: FreezePolicy | None, epochs: int, *, lr: float | None = None) -> Recipe:
    """Return the recipe for a freeze policy; for ``None``, the head first, then everything.

    Args:
        policy: What the user chose, or ``None``.
        epochs: Length of the run, 1 or more. A single epoch is spent on the head.
        lr: What the user chose, or ``None``; where the recipe has two phases, the first keeps the recipe's lr.

    Source: Kumar et al. 2022 ("Fine-tuning can distort pretrained features and underperform out-of-distribution") for
        the order, Howard & Ruder 2018 for the layer-wise rates.

    Example:
        >>> default_recipe(None, 5).policy.phase_lrs()
        {0: 0.003, 2: 0.001}
    """
    if policy is None and epochs == 1:
        policy = LinearProbe()
    if policy is not None:
        own = HEAD_LR if isinstance(policy, LinearProbe) else FULL_LR
        return Recipe(policy, lr=own if lr is None else lr)
    head_epochs = max(1, round(epochs * HEAD_SHARE))
    phases: dict[int, FreezePolicy] = {0: LinearProbe(), head_epochs: FullFinetune()}
    return Recipe(ScheduledUnfreeze(phases, lr={0: HEAD_LR, head_epochs: FULL_LR if lr is None else lr}), lr=HEAD_LR)
