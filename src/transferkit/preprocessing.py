"""What a picture must look like before a network sees it, as its weights were trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from transferkit.exceptions import ArtifactError, SettingError
from transferkit.ranges import LARGEST_SIDE, MOST_CHANNELS, check_number, check_whole_number

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Size, cropping and normalisation that belong to a set of weights.

    Evaluation resizes the shorter side to ``resize_size`` and cuts the centre ``size`` × ``size`` square
    (``crop="center"``); or squeezes the whole picture into a ``resize_size`` square first (``crop="squash"``); or
    resizes the longer side and fills the rest of the square with the mean (``crop="border"``). Then pixels in [0, 1]
    become ``(pixel - mean) / std``.

    Args:
        size: Side of the square the network receives, in pixels.
        resize_size: Shorter side before the crop (longer, with a border), in pixels; at least ``size``.
        mean: One value per channel, of pixels in [0, 1].
        std: One positive value per channel.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
        crop: ``"center"``, ``"squash"`` or ``"border"``.

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
        check_whole_number("size", self.size, at_least=1, at_most=LARGEST_SIDE)
        check_whole_number("resize_size", self.resize_size, at_least=1, at_most=64 * LARGEST_SIDE)
        if self.resize_size < self.size:
            raise SettingError(
                f"preprocessing needs 1 <= size <= resize_size, got size={self.size}, resize_size={self.resize_size}"
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise SettingError(f"mean={self.mean} and std={self.std} need one value per channel")
        for mean, std in zip(self.mean, self.std, strict=True):
            check_number("mean", mean)
            check_number("std", std, above=0)
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise SettingError(f"interpolation={self.interpolation!r}; it can be nearest, bilinear or bicubic")
        if self.crop not in ("center", "squash", "border"):
            raise SettingError(f"crop={self.crop!r}; it can be center, squash or border")

    @property
    def channels(self) -> int:
        """Number of channels the network takes: 1 is grey, 3 RGB, 4 RGBA or RGB and one more."""
        return len(self.mean)

    def with_channels(self, channels: int) -> Self:
        """Return the same preprocessing for another number of channels.

        The first channels keep their values, and every further one has the mean of those there are. A single channel is
        grey and has that mean alone. It fits the kernels that timm's rule gives a network: those of RGB repeated for
        further channels, and their sum for one.

        Args:
            channels: New number of channels, 1 or more.

        Raises:
            SettingError: ``channels`` is outside its range.

        Source: timm ``adapt_input_conv`` is the rule for the kernels.

        Example:
            >>> Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.25, 0.25, 0.25)).with_channels(4).mean
            (0.25, 0.5, 0.75, 0.5)
        """
        check_whole_number("channels", channels, at_least=1, at_most=MOST_CHANNELS)
        if channels == self.channels:
            return self
        return replace(self, mean=_for_channels(self.mean, channels), std=_for_channels(self.std, channels))

    def differences(self, other: Preprocessing) -> dict[str, tuple[Any, Any]]:
        """Name the values in which two preprocessings differ, to warn of one that overrides the weights' own.

        Args:
            other: The one to compare with.

        Returns:
            ``(own value, other's value)`` by field name, in the order of the fields; empty when they are equal.

        Example:
            >>> Preprocessing().differences(Preprocessing(resize_size=232))
            {'resize_size': (256, 232)}
        """
        mine, theirs = asdict(self), asdict(other)
        return {name: (value, theirs[name]) for name, value in mine.items() if value != theirs[name]}

    def resized(self, size: int) -> Self:
        """Return the same preprocessing for another input size, keeping the crop's share of the picture.

        Args:
            size: New side in pixels, 1 or more.

        Raises:
            SettingError: ``size`` is outside its range.
        """
        check_whole_number("image_size", size, at_least=1, at_most=LARGEST_SIDE)
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


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    mean = math.fsum(values) / len(values)
    return (mean,) if channels == 1 else (*values, *[mean] * channels)[:channels]
