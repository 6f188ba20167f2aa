"""The steps of a transform that torchvision lacks: other channels than red, green and blue, and borders."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from transferkit.exceptions import DataError

__all__ = ["OnColours", "PadToSquare", "ToTensor", "TrivialAugment"]

# TrivialAugment's names of the changes that move pixels, or do nothing.
_GEOMETRY = frozenset({"Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})


class ToTensor(nn.Module):
    """An RGBA picture as a tensor: Pillow weights colours by the fourth channel, which need not be transparency.

    Args:
        channels: What a picture must have, 4 or more.

    Example:
        >>> ToTensor(4)(Image.new("RGBA", (6, 2))).shape
        torch.Size([4, 2, 6])
    """

    def __init__(self, channels: int) -> None:
        """Store the settings."""
        super().__init__()
        self.channels = channels

    def forward(self, picture: Image.Image | Tensor) -> Tensor:
        """Return the picture as a tensor (channels, H, W); one with other channels raises ``DataError``."""
        if isinstance(picture, Tensor):
            if picture.shape[-3] == self.channels:
                return picture
            kind = f"of shape {tuple(picture.shape)}"
        else:
            if picture.mode == "RGBA" and self.channels == 4:
                tensor: Tensor = v2.functional.pil_to_tensor(picture)
                return tensor
            kind = f"of mode {picture.mode}"
        raise DataError(
            f"a picture {kind} came to a transform for {self.channels} channels; "
            f"read it with channels={self.channels}, or from source.with_channels({self.channels})"
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"channels={self.channels}"


class OnColours(nn.Module):
    """A change of colours for the first three channels alone.

    Args:
        change: What is done to them.

    Example:
        >>> OnColours(v2.RandomInvert(p=1.0))(torch.zeros(4, 1, 1)).flatten()
        tensor([1., 1., 1., 0.])
    """

    def __init__(self, change: nn.Module) -> None:
        """Store the settings."""
        super().__init__()
        self.change = change

    def forward(self, image: Tensor) -> Tensor:
        """Return the image (…, C, H, W) with its first three channels changed."""
        return torch.cat([self.change(image[..., :3, :, :]), image[..., 3:, :, :]], dim=-3)

    def __repr__(self) -> str:
        """Show what is done."""
        return f"{self.change} of the first 3 channels"


class TrivialAugment(v2.TrivialAugmentWide):  # type: ignore[misc]  # torchvision has no types
    """TrivialAugment whose geometry is for all channels and whose changes of colours for the first three alone."""

    def _apply_image_or_video_transform(self, image: Tensor, transform_id: str, *values: Any, **options: Any) -> Any:
        apply = super()._apply_image_or_video_transform
        if transform_id in _GEOMETRY:
            return apply(image, transform_id, *values, **options)
        colours = apply(image[..., :3, :, :], transform_id, *values, **options)
        return torch.cat([colours, image[..., 3:, :, :]], dim=-3)


class PadToSquare(nn.Module):
    """Lay a picture on the middle of a square of one colour; nothing is cut away that fits in.

    Args:
        size: Side of the square in pixels.
        fill: Value of each channel of the border, in [0, 1].

    Source: timm ``CenterCropOrPad``.

    Example:
        >>> PadToSquare(8, (0.5, 0.5, 0.5))(Image.new("RGB", (8, 4))).size
        (8, 8)
    """

    def __init__(self, size: int, fill: tuple[float, ...]) -> None:
        """Store the settings."""
        super().__init__()
        self.size = size
        self.fill = fill

    def forward(self, picture: Image.Image | Tensor) -> Any:
        """Return the square, of the same type."""
        height, width = v2.functional.get_size(picture)
        missing = [max(0, self.size - side) for side in (width, height)]
        before = [each // 2 for each in missing]
        after = [each - first for each, first in zip(missing, before, strict=True)]
        in_floats = isinstance(picture, Tensor) and picture.is_floating_point()
        fill = [value if in_floats else round(255 * value) for value in self.fill]
        padded = v2.functional.pad(picture, [*before, *after], fill=fill)
        return v2.functional.center_crop(padded, [self.size])

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"size={self.size}"
