"""What a run is going to do, printed before it starts."""

from __future__ import annotations

import torch

from transferkit.model import TransferModel
from transferkit.recipes import Recipe
from transferkit.sources import PictureData

__all__ = ["plan_text"]


def plan_text(
    model: TransferModel, data: PictureData, recipe: Recipe, optimizer: torch.optim.Optimizer, *, epochs: int
) -> str:
    """Describe a run: network, pictures, policy, and per stage what trains at which rate.

    Args:
        model: What is trained; it is frozen as in the first epoch.
        data: The pictures.
        recipe: Policy and schedule.
        optimizer: Where each stage's lr and weight decay are read from.
        epochs: Length of the run.

    Returns:
        Lines of text.
    """
    policy, names = recipe.policy, model.stage_names
    model.freeze(policy.frozen_stages(names, 0))
    lines = [
        f"{model.name}, {model.weights or 'random weights'}, {model.preprocessing.size} px",
        f"{len(data.train)} training and {len(data.val)} validation pictures of {len(data.class_names)} classes",
        f"{epochs} epochs, {policy}, {recipe.schedule}",
        model.summary(optimizer),
    ]
    for epoch in policy.changes(names, epochs):
        frozen = policy.frozen_stages(names, epoch)
        training = ", ".join(name for name in names if name not in frozen)
        lr = policy.phase_lrs().get(epoch)
        lines.append(f"from epoch {epoch + 1}: {training}{f' at lr {lr:g}' if lr else ''}")
    return "\n".join(lines)
