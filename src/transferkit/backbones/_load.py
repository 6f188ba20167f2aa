"""From a backbone's name to a native network with its pretrained weights."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from transferkit.backbones import _timm, _torchvision
from transferkit.backbones._base import Backbone
from transferkit.backbones._state_dict import read_state_dict
from transferkit.backbones._weights import fit_state_dict
from transferkit.backbones.stem import change_stem, describe, plan_stem, stem_arguments
from transferkit.exceptions import SettingError, UnknownModelError
from transferkit.ranges import LARGEST_SIDE, MOST_CHANNELS, check_whole_number

__all__ = ["ModelInfo", "build_network", "list_models", "load_backbone", "model_info", "resolve_name"]

logger = logging.getLogger("transferkit")

WEIGHTS_FILES = (".pth", ".pt", ".th", ".bin", ".safetensors")
"""What tells a file's name in the working directory from a tag."""

_SMALL = 32
"""Side of the pictures of CIFAR, in pixels."""

_AUXILIARY = {("torchvision", architecture) for architecture in _torchvision.AUXILIARY}

_LIBRARIES: dict[str, Any] = {"torchvision": _torchvision, "timm": _timm}


class ModelInfo(NamedTuple):
    """One row of ``transferkit models``; ``licence`` is that of the default weights, where timm states it."""

    name: str
    parameters: int | None
    input_size: int
    licence: str | None


def list_models(pattern: str = "*") -> list[str]:
    """Return the full names that match a pattern, torchvision's first.

    Args:
        pattern: Shell-style, matched against ``library/name`` and the bare name; a plain word matches anywhere.

    Example:
        >>> list_models("torchvision/resnet1*")
        ['torchvision/resnet101', 'torchvision/resnet152', 'torchvision/resnet18']
    """
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [f"{library}/{name}" for library, adapter in _LIBRARIES.items() for name in adapter.list_names()]
    return [name for name in names if fnmatch.fnmatch(name, wanted) or fnmatch.fnmatch(name.split("/")[1], wanted)]


def model_info(name: str) -> ModelInfo:
    """Return size, input and licence of one model of :func:`list_models`.

    Args:
        name: ``"torchvision/resnet18"`` or ``"timm/convnext_atto"``; a bare name is torchvision's first.

    Raises:
        UnknownModelError: No such model.
    """
    library, architecture = resolve_name(name)
    return ModelInfo(f"{library}/{architecture}", *_LIBRARIES[library].model_info(architecture))


def resolve_name(name: str) -> tuple[str, str]:
    """Split a backbone name into library and architecture; a bare name is torchvision's first, then timm's.

    Raises:
        UnknownModelError: No such model; the message offers the closest names.

    Example:
        >>> resolve_name("resnet18"), resolve_name("timm/resnet18.a1_in1k")
        (('torchvision', 'resnet18'), ('timm', 'resnet18.a1_in1k'))
    """
    library, slash, architecture = name.partition("/")
    candidates = [library] if slash else list(_LIBRARIES)
    architecture = architecture if slash else name
    for candidate in candidates:
        if candidate in _LIBRARIES and architecture.partition(".")[0] in _LIBRARIES[candidate].list_names():
            if not slash:
                logger.info("%s is taken as %s/%s", name, candidate, architecture)
            return candidate, architecture
    everything = {full.split("/")[1]: full for full in reversed(list_models())}
    near = difflib.get_close_matches(architecture.partition(".")[0], list(everything), n=3, cutoff=0.5)
    hint = f" — did you mean {' or '.join(repr(everything[each]) for each in near)}?" if near else ""
    raise UnknownModelError(
        f"no torchvision or timm classifier named {name!r}{hint}; `transferkit models PATTERN` lists them"
    )


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = "default",
    image_size: int | None = None,
    in_chans: int = 3,
    aux: str = "drop",
    small_images: str = "upsample",
) -> Backbone:
    """Build a network by name, with its own head still on.

    Args:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto.d2_in1k"``, or a bare name.
        weights: ``"default"``; a tag or enum name; ``"bundled"`` for ``timm/mobilenetv2_050``; a path to a local
            state dict (``.pth`` or ``.safetensors``); ``None`` for random weights.
        image_size: Input side in pixels, or ``None`` for the size the weights were trained at.
        in_chans: Channels of the pictures; pretrained kernels are summed for 1 and repeated for more than 3.
        aux: What becomes of auxiliary classifiers (GoogLeNet, Inception v3): ``"drop"``, or ``"train"``, which
            other networks do not take.
        small_images: ``"upsample"`` leaves the network alone and enlarges small pictures to its size; ``"stem"`` adapts
            its stem, with its weights, so that they keep their resolution (32 px unless ``image_size`` says otherwise).

    Raises:
        UnknownModelError: No such model.
        WeightsError: The weights do not exist, cannot be read, or do not fit.
        SettingError: A value is outside its range, or the network cannot take such pictures.
    """
    check_whole_number("image_size", image_size, at_least=1, at_most=LARGEST_SIDE, or_none=True)
    check_whole_number("in_chans", in_chans, at_least=1, at_most=MOST_CHANNELS, hint="photographs have 3, greys 1")
    if aux not in ("train", "drop"):
        raise SettingError(f"aux={aux!r}; it can be 'train' or 'drop'")
    if small_images not in ("upsample", "stem"):
        raise SettingError(f"small_images={small_images!r}; it can be 'upsample' or 'stem'")
    library, architecture = resolve_name(name)
    if aux == "train" and (library, architecture) not in _AUXILIARY:
        raise SettingError(f"{library}/{architecture} has no auxiliary classifiers to train; leave aux alone")
    options: dict[str, Any] = {}
    if small_images == "stem":
        image_size = _SMALL if image_size is None else image_size
        options = stem_arguments(f"{library}/{architecture}", size=image_size)
    chosen = Path(weights) if weights is not None and _is_path(weights) else weights
    # A file may hold a stem that was adapted already, so it is read into the adapted network.
    late = chosen if small_images == "stem" and isinstance(chosen, Path) else None
    state = None if late is None else read_state_dict(late)
    backbone: Backbone = _LIBRARIES[library].load(
        architecture,
        weights=None if late else chosen,
        image_size=image_size,
        in_chans=in_chans,
        options=options,
        **({"aux": True} if aux == "train" else {}),
    )
    if small_images == "stem":
        backbone = _with_small_stem(backbone, options)
    if state is not None:
        heads = (*backbone.head_paths, *backbone.aux_paths)
        kernels = [change.path for change in backbone.stem]
        fit_state_dict(backbone.network, state, head_paths=heads, source=str(late), resampled=kernels)
        backbone = replace(backbone, weights=str(late))
    logger.debug("%s with %s", backbone.name, backbone.weights or "random weights")
    return backbone


def _with_small_stem(backbone: Backbone, options: dict[str, Any]) -> Backbone:
    """Adapt the stem of a network that was built with ``options``, and say what was done."""
    preprocessing = backbone.preprocessing
    changes = plan_stem(backbone.network, channels=preprocessing.channels, size=preprocessing.size)
    change_stem(backbone.network, changes)
    done = [f"{key}={value}" for key, value in options.items()] + ([describe(changes)] if changes else [])
    logger.info(
        "%s for %d-px pictures: %s", backbone.name, preprocessing.size, ", ".join(done) or "its stem stays as it is"
    )
    # Small pictures are seen whole: there are no margins to cut away.
    whole = replace(preprocessing, resize_size=preprocessing.size)
    return replace(backbone, preprocessing=whole, small_images="stem", stem=changes)


def _is_path(weights: str | os.PathLike[str]) -> bool:
    text = os.fspath(weights)
    return not isinstance(weights, str) or "/" in text or os.sep in text or text.endswith(WEIGHTS_FILES)


def build_network(name: str, *, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """Rebuild the native network of a saved model with random weights; downloads nothing.

    Raises:
        UnknownModelError: The installed torchvision or timm has no such model.
    """
    library, architecture = resolve_name(name)
    network: nn.Module = _LIBRARIES[library].build(architecture, num_classes=num_classes, arguments=arguments)
    return network
