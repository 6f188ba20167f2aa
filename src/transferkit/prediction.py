"""Classifying pictures that have no label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from transferkit.bad_pictures import unreadable
from transferkit.evaluation import collect_logits
from transferkit.exceptions import DataError
from transferkit.loading import loader
from transferkit.metrics import topk
from transferkit.model import TransferModel
from transferkit.pictures import as_picture, list_pictures, read_picture
from transferkit.transforms import eval_transform

__all__ = ["Pictures", "Prediction", "predict"]

Pictures = str | os.PathLike[str] | Image.Image | Tensor | Sequence["str | os.PathLike[str] | Image.Image | Tensor"]
"""What can be predicted: a file, a folder, a PIL image, a tensor (C, H, W), or a list of these."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        path: The file, or ``None`` for a picture in memory.
        label: The likeliest class.
        confidence: Its probability, 0 to 1.
        probabilities: Probability by class name, in the order of the model's classes.
    """

    path: str | None
    label: str
    confidence: float
    probabilities: dict[str, float]

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the ``k`` likeliest classes, likeliest first, as (name, probability).

        Args:
            k: How many, 1 or more; more than there are classes gives all of them.

        Raises:
            SettingError: ``k`` is below 1.
        """
        return topk(torch.tensor(list(self.probabilities.values()), dtype=torch.float64), list(self.probabilities), k)


def predict(
    model: TransferModel,
    pictures: Pictures,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | None = None,
    engine: str = "eager",
    on_bad_image: str = "raise",
) -> list[Prediction]:
    """Classify pictures with exactly the transform that validation uses.

    Args:
        model: A trained model; its training mode is left as it was.
        pictures: A file, a folder (searched through), a PIL image, a uint8 or float tensor (C, H, W) not normalised
            (see :func:`transferkit.pictures.as_picture`), or a list of these. They are read in the model's channels:
            a model with 4 sees the transparency, one with 5 or more takes tensors alone.
        batch_size: Pictures per batch.
        num_workers: Processes that read and transform.
        device: Where to compute; ``None`` for where the model is.
        engine: What computes, one of :data:`~transferkit.inference.ENGINES`.
        on_bad_image: What happens to files that cannot be read: ``"raise"`` names them before any is classified;
            ``"skip"`` leaves them out and logs them.

    Returns:
        One prediction per picture that can be read, in the order given; a folder's pictures are sorted.

    Raises:
        DataError: A path does not exist, there is no picture, or it does not have the model's channels.
        PictureError: A picture cannot be read, and none may be left out or none is left.
    """
    if device is not None:
        model.to(device)
    device = next(model.parameters()).device
    items = [pictures] if isinstance(pictures, str | os.PathLike | Image.Image | Tensor) else list(pictures)
    paths: list[str | None] = []
    images: list[str | Image.Image | Tensor] = []
    for item in items:
        if isinstance(item, Image.Image | Tensor):
            paths.append(None)
            images.append(item)
        else:
            found = list_pictures(item)
            paths += found
            images += found
    if not images:
        raise DataError("there are no pictures to predict")
    files = [path for path in paths if path is not None]
    if bad := unreadable(files, on_bad_image=on_bad_image, others=len(images) - len(files)):
        images = [image for image, path in zip(images, paths, strict=True) if path not in bad]
        paths = [path for path in paths if path not in bad]
    batches = loader(
        _Unlabelled(images),
        eval_transform(model.eval_preset, model.preprocessing),
        batch_size=batch_size,
        train=False,
        num_workers=num_workers,
    )
    logits, _ = collect_logits(model.network, batches, device, engine=engine)
    shares = torch.softmax(logits.double(), dim=1)
    return [
        Prediction(
            path,
            model.class_names[int(row.argmax())],
            float(row.max()),
            dict(zip(model.class_names, row.tolist(), strict=True)),
        )
        for path, row in zip(paths, shares, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Unlabelled:
    """A source of files and pictures in memory, all of label 0."""

    images: Sequence[str | Image.Image | Tensor]
    channels: int = 3
    least_side: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        image = self.images[index]
        if isinstance(image, str):
            return read_picture(image, channels=self.channels, at_least=self.least_side), 0
        return as_picture(image, channels=self.channels), 0

    def labels(self) -> list[int]:
        return [0] * len(self.images)

    def name(self, index: int) -> str:
        image = self.images[index]
        return image if isinstance(image, str) else f"image {index}"

    def with_channels(self, channels: int) -> Self:
        return replace(self, channels=channels)

    def with_least_side(self, pixels: int) -> Self:
        return replace(self, least_side=pixels)
