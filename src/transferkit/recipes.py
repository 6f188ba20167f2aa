"""The default recipe: what a person gets who names only a model.

Its values were chosen by measurement; ``benchmarks/results/default_recipe.md`` says what was tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from transferkit.freezing import FreezePolicy, FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.schedules import Cosine, Schedule
from transferkit.transforms import Transform

__all__ = ["Recipe", "default_recipe"]

HEAD_LR = 3e-3
HEAD_LR_EPOCHS = 5
HEAD_LR_MULTIPLIER = 100.0
HEAD_SHARE = 0.4
RESCALED_LR_MULTIPLIER = 10.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a network is trained, apart from the data and the seed.

    Attributes:
        policy: What is frozen when.
        lr: Learning rate of the head at the top of the schedule.
        schedule: Shape of the learning rate over time.
        weight_decay: Of weight matrices and kernels.
        layer_decay: Factor of the lr from one stage to the one before it.
        head_lr_multiplier: How much faster the new head learns than the pretrained stage below it.
        train_preset: Name of the training transform, or the transform itself.
        label_smoothing: Share of the target spread over all classes.
    """

    policy: FreezePolicy
    lr: float
    schedule: Schedule = field(default_factory=Cosine)
    weight_decay: float = 0.01
    layer_decay: float = 0.7
    head_lr_multiplier: float = HEAD_LR_MULTIPLIER
    train_preset: str | Transform = "light"
    label_smoothing: float = 0.0

    def replaced(self, **settings: Any) -> Recipe:
        """Return the recipe with the settings that are not ``None`` in their places."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


def default_recipe(
    policy: FreezePolicy | None,
    epochs: int,
    *,
    lr: float | None = None,
    pretrained: bool = True,
    rescaled: bool = False,
    views: int | None = None,
) -> Recipe:
    """Return the recipe for a freeze policy; for ``None``, the head first, then everything.

    Args:
        policy: What the user chose, or ``None``.
        epochs: Length of the run, 1 or more. A single epoch is spent on the head.
        lr: Learning rate of the head, or ``None`` for the recipe's: 0.003, less for a head alone that is trained for
            more than 5 epochs, by the root of how many times 5 they are. Both phases of the default policy begin at it,
            each with its own warm-up.
        pretrained: Whether the network has pretrained weights; random ones must learn as fast as the head.
        rescaled: Whether the stem was adapted to small pictures. Pretrained layers then see another scale: everything
            learns from the start, the backbone ten times faster than else.
        views: How many of each picture are kept (:class:`ActivationCache`). Asking for several asks for augmentation,
            which a head alone does without else.

    Source: Kumar et al. 2022 ("Fine-tuning can distort pretrained features and underperform out-of-distribution") for
        the order, Howard & Ruder 2018 for the layer-wise rates.

    Example:
        >>> default_recipe(None, 5).policy.phase_lrs()
        {0: 0.003, 2: 0.003}
        >>> default_recipe(LinearProbe(), 20).lr
        0.0015
    """
    if lr is None:
        longer = epochs / HEAD_LR_EPOCHS if isinstance(policy, LinearProbe) else 1.0
        lr = HEAD_LR / math.sqrt(max(1.0, longer))
    if policy is None and rescaled:
        policy = FullFinetune()
    if policy is None and epochs == 1:
        policy = LinearProbe()
    if policy is None:
        head_epochs = max(1, round(epochs * HEAD_SHARE))
        policy = ScheduledUnfreeze({0: LinearProbe(), head_epochs: FullFinetune()}, lr={0: lr, head_epochs: lr})
    multiplier = RESCALED_LR_MULTIPLIER if rescaled else HEAD_LR_MULTIPLIER
    return Recipe(
        policy,
        lr=lr,
        head_lr_multiplier=multiplier if pretrained else 1.0,
        train_preset="none" if isinstance(policy, LinearProbe) and (views or 0) < 2 else "light",
    )
