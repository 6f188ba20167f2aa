"""From a backbone's name to a native network with its pretrained weights."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from transferkit.backbones import _timm, _torchvision
from transferkit.backbones._base import Backbone
from transferkit.exceptions import SettingError, TransferkitError, UnknownModelError
from transferkit.preprocessing import Preprocessing

__all__ = ["ModelInfo", "adopt_module", "build_network", "list_models", "load_backbone", "model_info", "resolve_name"]

logger = logging.getLogger("transferkit")

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
    name: str, *, weights: str | os.PathLike[str] | None = "default", image_size: int | None = None
) -> Backbone:
    """Build a network by name, with its own head still on.

    Args:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto.d2_in1k"``, or a bare name.
        weights: ``"default"``; a tag or enum name; ``"bundled"`` for ``timm/mobilenetv2_050``; a path to a local
            state dict (``.pth`` or ``.safetensors``); ``None`` for random weights.
        image_size: Input side in pixels, or ``None`` for the size the weights were trained at.

    Raises:
        UnknownModelError: No such model.
        WeightsError: The weights do not exist, cannot be read, or do not fit.
        SettingError: The network cannot take pictures of ``image_size``.
    """
    library, architecture = resolve_name(name)
    chosen = Path(weights) if weights is not None and _is_path(weights) else weights
    backbone: Backbone = _LIBRARIES[library].load(architecture, weights=chosen, image_size=image_size)
    logger.debug("%s with %s", backbone.name, backbone.weights or "random weights")
    return backbone


def _is_path(weights: str | os.PathLike[str]) -> bool:
    text = os.fspath(weights)
    return not isinstance(weights, str) or "/" in text or os.sep in text or text.endswith((".pth", ".safetensors"))


def build_network(name: str, *, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """Rebuild the native network of a saved model with random weights; downloads nothing.

    Raises:
        UnknownModelError: The installed torchvision or timm has no such model.
    """
    library, architecture = resolve_name(name)
    network: nn.Module = _LIBRARIES[library].build(architecture, num_classes=num_classes, arguments=arguments)
    return network


def adopt_module(network: nn.Module, *, head: str | None, preprocessing: Preprocessing | None) -> Backbone:
    """Take a classifier that the user built, with whatever weights it has.

    Args:
        network: Any classifier; torchvision and timm instances bring their own metadata.
        head: Dotted name of the classification layer; ``None`` for the one timm states, else the last
            ``nn.Linear`` (or ``nn.Conv2d``, where there is no linear layer).
        preprocessing: How pictures are prepared; ``None`` for timm's metadata, else ImageNet's.

    Raises:
        SettingError: No such layer, or none that can be replaced.
    """
    modules = dict(network.named_modules())
    paths: tuple[str, ...]
    if head is not None:
        if not isinstance(modules.get(head), nn.Linear | nn.Conv2d):
            raise SettingError(
                f"head={head!r} is no nn.Linear or nn.Conv2d of {type(network).__name__}{_nearest_layer(head, network)}"
            )
        paths = (head,)
    else:
        try:
            paths = _timm.find_head_paths(network)
        except TransferkitError:
            paths = _last_layer(network)
    if preprocessing is None:
        if hasattr(network, "pretrained_cfg"):
            preprocessing = _timm.preprocessing_of(network)
        else:
            preprocessing = Preprocessing()
            logger.warning(
                "%s does not say how its pictures are prepared; ImageNet's statistics at 224 px are used — "
                "pass preprocessing=Preprocessing(...) if its weights expect others",
                type(network).__name__,
            )
    return Backbone(f"module/{type(network).__name__}", network, paths, preprocessing, "the module's own")


def _last_layer(network: nn.Module) -> tuple[str, ...]:
    for kind in (nn.Linear, nn.Conv2d):
        found = [path for path, module in network.named_modules() if isinstance(module, kind) and path]
        if found:
            return (found[-1],)
    raise SettingError(f"{type(network).__name__} has no nn.Linear or nn.Conv2d that could be its head")


def _nearest_layer(path: str, network: nn.Module) -> str:
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    near = difflib.get_close_matches(path, layers, n=2)
    return f" — did you mean {' or '.join(map(repr, near or layers[-2:]))}?"
