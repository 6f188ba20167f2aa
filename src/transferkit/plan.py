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

    Example:
        >>> from PIL import Image
        >>> from transferkit.create import create_model
        >>> from transferkit.data import from_datasets
        >>> from transferkit.optim import param_groups
        >>> from transferkit.recipes import default_recipe
        >>> pictures = [(Image.new("RGB", (8, 8)), label) for label in (0, 1)]
        >>> data = from_datasets(pictures, pictures, class_names=["ant", "bee"])
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=data.class_names, image_size=32)
        >>> optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
        >>> print(plan_text(model, data, default_recipe(None, 5), optimizer, epochs=5).splitlines()[1])
        2 training and 2 validation pictures of 2 classes
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
