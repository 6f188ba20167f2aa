"""Networks for pictures with another number of channels than their weights were trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from transferkit.exceptions import SettingError

__all__ = ["adapt_channels", "change_channels", "input_convolutions"]


def input_convolutions(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the convolutions that see the picture: those timm states, else the first one declared."""
    stated = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv")
    if stated:
        return (stated,) if isinstance(stated, str) else tuple(stated)
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))[:1]


def adapt_channels(
    state: Mapping[str, Tensor], *, first_convs: Iterable[str], in_chans: int, base_chans: int | None = None
) -> dict[str, Tensor]:
    """Adapt the kernels that see the picture to another number of channels, by timm's rule for both libraries.

    One channel gets the sum of all kernels; more get them repeated in turn, scaled so that the response to a grey
    picture stays the same size.

    Args:
        state: Tensors by native key.
        first_convs: Dotted names of the convolutions that see the picture; those not in ``state`` are passed over.
        in_chans: Channels of the pictures to come, 1 or more.
        base_chans: Channels of the pictures so far; ``None`` for as many as a kernel takes. Less than a kernel takes
            where pixels are first folded into channels (TResNet).

    Returns:
        The state with its first kernels replaced; the given one is untouched.

    Raises:
        SettingError: ``in_chans`` is below 1.

    Source: timm ``adapt_input_conv``.

    Example:
        >>> state = {"conv1.weight": torch.ones(8, 3, 7, 7)}
        >>> adapt_channels(state, first_convs=["conv1"], in_chans=1)["conv1.weight"][0, :, 0, 0]
        tensor([3.])
    """
    if in_chans < 1:
        raise SettingError(f"in_chans={in_chans}; pictures have 1 or more channels")
    adapted = dict(state)
    for key in (f"{name}.weight".lstrip(".") for name in first_convs):
        weight = state.get(key)
        if weight is None or weight.ndim != 4:
            continue
        base = base_chans or weight.shape[1]
        if base == in_chans or weight.shape[1] % base:
            continue
        folds = weight.float().reshape(weight.shape[0], -1, base, *weight.shape[2:])
        if in_chans == 1:
            folds = folds.sum(2, keepdim=True)
        else:
            repeated = folds.repeat(1, 1, math.ceil(in_chans / base), 1, 1)[:, :, :in_chans]
            folds = repeated * (base / in_chans)
        adapted[key] = folds.flatten(1, 2).to(weight.dtype)
    return adapted


def change_channels(network: nn.Module, in_chans: int) -> None:
    """Let a network take pictures of ``in_chans`` channels; its first convolution keeps what its weights know.

    Args:
        network: Changed in place.
        in_chans: Channels of the pictures, 1 or more.

    Raises:
        SettingError: The network has no convolution that takes pictures of three channels.

    Source: :func:`adapt_channels`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> change_channels(network, 1)
        >>> network[0]
        Conv2d(1, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    convolution = network.get_submodule(next(iter(input_convolutions(network)), ""))
    if not isinstance(convolution, nn.Conv2d) or convolution.in_channels != 3:
        raise SettingError(
            f"{type(network).__name__} has no first convolution for pictures of 3 channels, so in_chans={in_chans} "
            "cannot be had; leave in_chans alone"
        )
    old = convolution.weight
    with torch.no_grad():
        weight = adapt_channels({"weight": old}, first_convs=[""], in_chans=in_chans)["weight"]
    convolution.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    # A kernel that saw one channel alone sees all of them from now on, as the adapted weight has it.
    convolution.in_channels, convolution.groups = in_chans, 1
