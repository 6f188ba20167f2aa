"""Test-time augmentation: a picture is looked at in several ways, and the probabilities are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torchvision.transforms import v2

from transferkit.exceptions import SettingError
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import Transform, eval_transform

__all__ = ["TTA", "Views", "check_tta", "tta_views"]

TTA = ("flip", "crops")
"""The ways there are: the picture and its mirror image; its centre and its four corners."""

Views = Callable[[Tensor], list[Tensor]]
"""From a batch (B, C, H, W) to one batch (B, C, size, size) per look."""

_MARGIN = 8 / 7  # 256 px to 224: what most weights leave around the centre they are evaluated on


def check_tta(tta: str | None) -> None:
    """Raise ``SettingError`` unless there is such a way, or none is asked for."""
    if tta is not None and tta not in TTA:
        raise SettingError(f"tta={tta!r}; it can be {' or '.join(TTA)}, or None")


def tta_views(tta: str | None, eval_preset: str, preprocessing: Preprocessing) -> tuple[Transform, Views | None]:
    """Return how pictures are prepared for test-time augmentation, and what is looked at then.

    Args:
        tta: ``"flip"`` also looks at the mirror image, ``"crops"`` at the centre and the four corners of a picture with
            some margin (a seventh, or what the weights crop away if that is more); ``None`` looks once, as validation
            does.
        eval_preset: A key of :data:`~transferkit.transforms.EVAL_PRESETS`.
        preprocessing: What the network's weights expect.

    Returns:
        A transform from a picture to a tensor, and a function from a batch of these to the batches to average over, or
        ``None`` where each is looked at once. Nothing is random.

    Raises:
        SettingError: There is no such way, or no such preset.

    Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", §4.1.

    Example:
        >>> import torch
        >>> transform, views = tta_views("crops", "imagenet", Preprocessing(size=28, resize_size=32))
        >>> [tuple(view.shape) for view in views(torch.zeros(2, 3, 32, 32))]
        [(2, 3, 28, 28), (2, 3, 28, 28), (2, 3, 28, 28), (2, 3, 28, 28), (2, 3, 28, 28)]
    """
    check_tta(tta)
    size = preprocessing.size
    if tta == "crops":
        side = max(preprocessing.resize_size, round(_MARGIN * size))
        with_margin = replace(preprocessing, size=side, resize_size=side)
        return eval_transform(eval_preset, with_margin), lambda images: list(
            v2.functional.five_crop(images, [size, size])
        )
    return eval_transform(eval_preset, preprocessing), None if tta is None else _and_mirrored


def _and_mirrored(images: Tensor) -> list[Tensor]:
    return [images, images.flip(-1)]
