"""What a run is going to do, printed before it starts."""

from __future__ import annotations

import logging

import torch
from PIL import Image

from transferkit.loading import in_channels
from transferkit.model import TransferModel
from transferkit.recipes import Recipe
from transferkit.sources import LabelledPictures, PictureData

__all__ = ["note_enlarging", "plan_text"]

logger = logging.getLogger("transferkit")


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


def note_enlarging(model: TransferModel, source: LabelledPictures) -> None:
    """Say in the log that pictures are enlarged to more than twice their size; their first one is read for it.

    Args:
        model: What is trained. A stem that was adapted to small pictures has its own line in the log.
        source: The training pictures, 1 or more.

    Raises:
        PictureError: The first picture cannot be read.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=96)
        >>> note_enlarging(model, [(Image.new("RGB", (64, 48)), 0)])  # says nothing: they are half as large
    """
    if model.small_images != "upsample":
        return
    picture, _ = in_channels(source, model.preprocessing.channels)[0]
    side = min(picture.size if isinstance(picture, Image.Image) else picture.shape[-2:])
    if side < model.preprocessing.size // 2:
        logger.info(
            "pictures of %d px are enlarged to the network's %d px (small_images='upsample'); 'stem' adapts the "
            "network to them instead, and image_size= sets another size",
            side,
            model.preprocessing.size,
        )
