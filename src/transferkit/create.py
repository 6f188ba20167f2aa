"""Making a :class:`TransferModel`: from a backbone's name, or from a module that is there already."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from transferkit.backbones import Backbone, adapt_module, load_backbone
from transferkit.exceptions import SettingError, TransferkitError
from transferkit.heads import Head
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.ranges import check_seed

__all__ = ["adapt", "agreed", "create_model", "outline"]

logger = logging.getLogger("transferkit")


def create_model(
    name: str,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = "default",
    dropout: float = 0.0,
    hidden_size: int | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
    aux: str = "drop",
    small_images: str = "upsample",
    preprocessing: Preprocessing | None = None,
    seed: int | None = None,
) -> TransferModel:
    """Make a classifier for your classes from any torchvision or timm backbone; :func:`adapt` takes a module.

    Args:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto.d2_in1k"``, or a bare name (torchvision first, then
            timm).
        class_names: One name per class; or give ``num_classes`` and they are called ``"0"``, ``"1"``, …
        num_classes: Number of classes, where they have no names.
        weights: ``"default"``; a tag (timm) or enum name (torchvision); ``"bundled"``, the small weights that ship
            with transferkit, for ``timm/mobilenetv2_050``; a path to a local state dict; ``None`` for random weights.
        dropout: Probability of dropping each of the head's inputs while training, in [0, 1).
        hidden_size: Width of a hidden layer in the head, or ``None`` for a linear head.
        image_size: Input side in pixels, or ``None`` for the size of the weights.
        in_chans: Channels of the pictures; ``None`` for 3, or as many as ``preprocessing`` has. Pretrained kernels are
            summed for 1 and repeated for more than 3, and the preprocessing follows.
        aux: Auxiliary classifiers (GoogLeNet, Inception v3): ``"drop"`` leaves them out, ``"train"`` trains them along.
        small_images: ``"upsample"`` leaves the network alone, and its transform enlarges small pictures to its size;
            ``"stem"`` adapts the stem, with its weights, so that pictures of 32 px (or ``image_size``) keep 4 × 4
            positions or 8 × 8 tokens at the last stage.
        preprocessing: Overrides that of the weights, with a warning where they expect another.
        seed: Decides the weights that are drawn, those of the new head at least; ``None`` draws them from torch's
            global generator.

    Returns:
        A :class:`TransferModel` with nothing frozen.

    Raises:
        UnknownModelError: No such model; the message offers the closest names.
        WeightsError: The weights do not exist, cannot be read, or do not fit.
        SettingError: A value is outside its range, or does not go with the others.

    Example:
        >>> create_model("torchvision/squeezenet1_1", weights=None, num_classes=5).num_features
        512
    """
    names = _class_names(class_names, num_classes)
    shape = Head(len(names), dropout=dropout, hidden_size=hidden_size)
    if preprocessing is not None:
        image_size = agreed("image_size", image_size, preprocessing.size)
        in_chans = agreed("in_chans", in_chans, preprocessing.channels)
    if seed is not None:
        check_seed(seed)
    with nullcontext() if seed is None else seeded(seed, 3):
        backbone = load_backbone(
            name,
            weights=weights,
            image_size=image_size,
            in_chans=3 if in_chans is None else in_chans,
            aux=aux,
            small_images=small_images,
        )
        if preprocessing is not None:
            _warn_of_override(backbone, preprocessing)
            backbone = replace(backbone, preprocessing=preprocessing)
        return TransferModel(backbone, class_names=names, head=shape)


def adapt(
    module: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    head: str | None = None,
    preprocessing: Preprocessing | None = None,
    dropout: float = 0.0,
    hidden_size: int | None = None,
    seed: int | None = None,
) -> TransferModel:
    """Make a classifier for your classes from a module you built; it keeps its weights and gets a new head in place.

    Args:
        module: Any classifier of pictures, of torchvision, timm, or your own.
        class_names: One name per class; or give ``num_classes`` and they are called ``"0"``, ``"1"``, …
        num_classes: Number of classes, where they have no names.
        head: Dotted name of its classification layer; ``None`` finds it by running one made picture: the last linear
            or convolutional layer with as many outputs as there are logits.
        preprocessing: What its weights expect; ``None`` for timm's metadata, else ImageNet's at 224 px, with a warning.
        dropout: Probability of dropping each of the head's inputs while training, in [0, 1).
        hidden_size: Width of a hidden layer in the head, or ``None`` for a linear head.
        seed: Decides the weights of the new head; ``None`` draws them from torch's global generator.

    Returns:
        A :class:`TransferModel` with nothing frozen, its stages in the order in which the module runs.

    Raises:
        SettingError: A value is outside its range, or the head cannot be found or replaced; the message says which
            argument settles it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> adapt(network, num_classes=3, preprocessing=Preprocessing(28, 28, (0.5,), (0.5,))).head_paths
        ('3',)
    """
    names = _class_names(class_names, num_classes)
    shape = Head(len(names), dropout=dropout, hidden_size=hidden_size)
    if seed is not None:
        check_seed(seed)
    with nullcontext() if seed is None else seeded(seed, 3):
        backbone = adapt_module(module, head=head, preprocessing=preprocessing)
        return TransferModel(backbone, class_names=names, head=shape)


def outline(name: str, *, num_classes: int = 1000, image_size: int | None = None) -> TransferModel:
    """Build a model without its values, to look at its stages: large networks take a second and no memory.

    Args:
        name: As for :func:`create_model`.
        num_classes: Number of classes.
        image_size: Input side in pixels, or ``None`` for the size of the weights.

    Returns:
        A :class:`TransferModel` on torch's ``meta`` device where the network can be built there.

    Raises:
        UnknownModelError: No such model.
        SettingError: A value is outside its range.

    Example:
        >>> outline("torchvision/resnet18").stages[1].paths
        ('layer1.0', 'layer1.1')
    """
    settings: dict[str, Any] = {"weights": None, "num_classes": num_classes, "image_size": image_size}
    try:
        with torch.device("meta"):
            return create_model(name, **settings)
    except TransferkitError:
        raise
    except Exception:  # some builders read values, torchvision's RegNet those of its widths
        return create_model(name, **settings)


def _class_names(class_names: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    if (class_names is None) == (num_classes is None):
        raise SettingError("give either class_names or num_classes")
    if class_names is not None:
        return tuple(class_names)
    Head(num_classes or 0)
    return tuple(str(index) for index in range(num_classes or 0))


def agreed(argument: str, given: int | None, stated: int) -> int:
    """Return what a preprocessing states, unless an argument of the same meaning says something else.

    Args:
        argument: Its name.
        given: Its value, or ``None``.
        stated: What the preprocessing has.

    Raises:
        SettingError: They contradict each other.

    Example:
        >>> agreed("image_size", None, 224)
        224
    """
    if given not in (None, stated):
        raise SettingError(f"{argument}={given} and preprocessing for {stated} contradict each other; give one of them")
    return stated


def _warn_of_override(backbone: Backbone, preprocessing: Preprocessing) -> None:
    differing = [
        f"{name} {given} instead of {expected}"
        for name, (given, expected) in preprocessing.differences(backbone.preprocessing).items()
        if name in ("mean", "std", "interpolation", "crop")  # another size is no mistake
    ]
    if backbone.weights is not None and differing:
        logger.warning(
            "the preprocessing of %s's weights (%s) is overridden: %s; leave preprocessing alone unless they were "
            "trained so",
            backbone.name,
            backbone.weights,
            ", ".join(differing),
        )
