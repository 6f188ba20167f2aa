"""The classification head: what replaces the last layer of a pretrained network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from transferkit.exceptions import SettingError
from transferkit.ranges import MOST_UNITS, check_number, check_whole_number

__all__ = ["Head", "build_head", "head_inputs", "replace_module"]


@dataclass(frozen=True)
class Head:
    """What the new head looks like.

    Args:
        num_classes: Number of logits, 1 or more.
        dropout: Probability of zeroing an input of the last layer while training, in [0, 1). It comes on top of
            whatever dropout the network already has.
        hidden_size: Width of one hidden layer (an MLP head), or ``None`` for a plain linear head.

    Raises:
        SettingError: A value is outside its range.
    """

    num_classes: int
    dropout: float = 0.0
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        """Validate every value."""
        check_whole_number("num_classes", self.num_classes, at_least=1, at_most=MOST_UNITS)
        check_number("dropout", self.dropout, at_least=0, below=1)
        check_whole_number("hidden_size", self.hidden_size, at_least=1, at_most=MOST_UNITS, or_none=True)

    @property
    def plain(self) -> bool:
        """Whether the native library can build this head itself, so that its state dict opens there."""
        return self.hidden_size is None


class _DropoutLinear(nn.Linear):
    """A linear layer that drops inputs while training; its keys are those of ``nn.Linear``."""

    dropout: float = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(input, self.dropout, self.training))


class _DropoutConv2d(nn.Conv2d):
    """A convolution that drops whole input channels while training; its keys are those of ``nn.Conv2d``."""

    dropout: float = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout2d(input, self.dropout, self.training))


def head_inputs(layer: nn.Module) -> int:
    """Return how many features a classification layer receives.

    Raises:
        SettingError: The layer is neither ``nn.Linear`` nor ``nn.Conv2d``.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    raise SettingError(
        f"the head is a {type(layer).__name__}; only nn.Linear and nn.Conv2d heads can be replaced — "
        "name the classification layer with head="
    )


def build_head(old: nn.Module, head: Head) -> nn.Module:
    """Make the layer that takes the place of ``old``: convolutions stay convolutions.

    The last layer starts small (normal, standard deviation 0.01; bias 0), so that the first logits are near zero and
    the first gradients do not tear the pretrained features; drawn from torch's global generator.

    Args:
        old: The classification layer of the pretrained network, ``nn.Linear`` or ``nn.Conv2d``.
        head: What to build.

    Returns:
        A layer for the same inputs, giving ``head.num_classes`` outputs.

    Raises:
        SettingError: ``old`` is of another kind.

    Source: torchvision's MobileNetV2 initialises its classifier so.

    Example:
        >>> build_head(nn.Linear(512, 1000), Head(num_classes=3))
        Linear(in_features=512, out_features=3, bias=True)
    """
    inputs = head_inputs(old)
    biased = getattr(old, "bias", None) is not None
    width = inputs if head.hidden_size is None else head.hidden_size
    last: nn.Linear | nn.Conv2d
    if isinstance(old, nn.Conv2d):
        dropped_conv = _DropoutConv2d if head.dropout and head.plain else nn.Conv2d
        last = dropped_conv(width, head.num_classes, kernel_size=1, bias=biased)
    else:
        dropped_linear = _DropoutLinear if head.dropout and head.plain else nn.Linear
        last = dropped_linear(width, head.num_classes, bias=biased)
    if isinstance(last, _DropoutLinear | _DropoutConv2d):
        last.dropout = head.dropout
    nn.init.normal_(last.weight, std=0.01)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    if head.hidden_size is None:
        return last
    convolutional = isinstance(old, nn.Conv2d)
    first = nn.Conv2d(inputs, width, kernel_size=1) if convolutional else nn.Linear(inputs, width)
    dropout = nn.Dropout2d(head.dropout) if convolutional else nn.Dropout(head.dropout)
    return nn.Sequential(first, nn.GELU(), dropout, last)


def replace_module(network: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` where ``network.get_submodule(path)`` is, in the same training mode and on the same device."""
    old = network.get_submodule(path)
    reference = next(old.parameters(), None)
    if reference is not None:
        new.to(reference.device, reference.dtype)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new.train(old.training))
