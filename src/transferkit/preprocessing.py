"""What a picture must look like before a network sees it, as its weights were trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from transferkit.exceptions import ArtifactError, SettingError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Size, cropping and normalisation that belong to a set of weights.

    Evaluation resizes the shorter side to ``resize_size`` and cuts the centre ``size`` × ``size`` square
    (``crop="center"``), or squeezes the whole picture into that square (``crop="squash"``); then pixels in [0, 1]
    become ``(pixel - mean) / std``.

    Args:
        size: Side of the square the network receives, in pixels.
        resize_size: Shorter side before the crop, in pixels; at least ``size``.
        mean: One value per channel, of pixels in [0, 1].
        std: One positive value per channel.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        crop: ``"center"`` or ``"squash"``.

    Raises:
        SettingError: A value is outside its range.

    Source: torchvision ``ImageClassification`` presets and timm ``resolve_data_config`` carry the same facts.

    Example:
        >>> Preprocessing(size=224, resize_size=256).resized(112).resize_size
        128
    """

    size: int = 224
    resize_size: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop: str = "center"

    def __post_init__(self) -> None:
        """Validate every value."""
        if self.size < 1 or self.resize_size < self.size:
            raise SettingError(
                f"preprocessing needs 1 <= size <= resize_size, got size={self.size}, resize_size={self.resize_size}"
            )
        if len(self.mean) != len(self.std) or any(not value > 0 for value in self.std):
            raise SettingError(f"mean={self.mean} and std={self.std} need one value per channel, std above 0")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise SettingError(f"interpolation={self.interpolation!r}; it can be nearest, bilinear or bicubic")
        if self.crop not in ("center", "squash"):
            raise SettingError(f"crop={self.crop!r}; it can be center or squash")

    def resized(self, size: int) -> Self:
        """Return the same preprocessing for another input size, keeping the crop's share of the picture.

        Args:
            size: New side in pixels, 1 or more.

        Raises:
            SettingError: ``size`` is below 1.
        """
        if size < 1:
            raise SettingError(f"image size must be 1 or more pixels, got {size}")
        return replace(self, size=size, resize_size=max(size, math.floor(self.resize_size * size / self.size)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; :meth:`from_dict` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from :meth:`to_dict`'s values.

        Args:
            values: One JSON value per field.

        Raises:
            ArtifactError: A key is missing, unknown, or has a value of the wrong kind.
        """
        try:
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (KeyError, TypeError, SettingError) as error:
            raise ArtifactError(f"preprocessing in the saved config cannot be used: {error}") from error
