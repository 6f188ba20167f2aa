"""timm's classification models: names, tags, head position, preprocessing.

timm is imported where it is used, since a run of a torchvision network does without.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transferkit.backbones._base import Backbone
from transferkit.backbones._state_dict import UNREADABLE, read_state_dict
from transferkit.backbones._weights import fit_state_dict
from transferkit.exceptions import SettingError, WeightsError, closest
from transferkit.preprocessing import Preprocessing

__all__ = [
    "BUNDLED",
    "build",
    "find_head_paths",
    "list_names",
    "load",
    "model_info",
    "preprocessing_from",
    "preprocessing_of",
    "timm_layers",
]

BUNDLED = "mobilenetv2_050"
"""The architecture whose own pretrained weights ship inside transferkit (``weights="bundled"``)."""

_BUNDLED_FILE = Path(__file__).with_name("bundled") / "model.safetensors"
_BUNDLED_PREPROCESSING = Preprocessing(size=112, resize_size=128)


def timm_layers() -> Any:
    """Return ``timm.layers``; ``None`` where nobody has imported timm, so that no network can have a layer of it.

    Example:
        >>> import timm
        >>> timm_layers().__name__
        'timm.layers'
    """
    return sys.modules.get("timm.layers")


@cache
def list_names() -> tuple[str, ...]:
    """Return the names of timm's architectures, without weight tags."""
    import timm

    return tuple(timm.list_models())


def find_head_paths(network: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the classification layers, as timm's metadata and ``get_classifier`` state them.

    Raises:
        SettingError: The network has no classification layer that can be replaced.
    """
    stated = getattr(network, "pretrained_cfg", {}).get("classifier")
    paths = (stated,) if isinstance(stated, str) else tuple(stated or ())
    modules = dict(network.named_modules())
    if not paths or not all(isinstance(modules.get(path), nn.Linear | nn.Conv2d) for path in paths):
        raise SettingError(
            f"timm's {type(network).__name__} has no linear or convolutional classifier (it states {stated!r}), so it "
            "is an encoder without a head to replace; choose another with `transferkit models PATTERN`"
        )
    # The metadata of some distilled networks (LeViT's stride-8 ones) names one head of the two that are there.
    classes = _outputs(modules[paths[0]])
    get_classifier: Callable[[], Any] = network.get_classifier  # type: ignore[assignment]
    classifiers = get_classifier()
    inner = {
        id(layer)
        for classifier in (classifiers if isinstance(classifiers, tuple) else (classifiers,))
        for layer in classifier.modules()
        if _outputs(layer) == classes
    }
    return (*paths, *(path for path, module in modules.items() if id(module) in inner and path not in paths))


def _outputs(layer: nn.Module) -> int | None:
    size: int | None = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    return size


def preprocessing_of(network: nn.Module) -> Preprocessing:
    """Read the preprocessing that timm resolves for the network's weights."""
    return preprocessing_from(network.pretrained_cfg)  # type: ignore[arg-type]  # a dict on every timm network


def preprocessing_from(config: Mapping[str, Any]) -> Preprocessing:
    """Read the preprocessing that timm resolves from the metadata of weights; of an oblong input the width counts."""
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=config)
    size = int(resolved["input_size"][-1])
    interpolation, crop = resolved["interpolation"], resolved["crop_mode"]
    return Preprocessing(
        size=size,
        resize_size=max(size, math.floor(size / resolved["crop_pct"])),
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=interpolation if interpolation in ("nearest", "bilinear") else "bicubic",
        crop=crop if crop in ("squash", "border") else "center",
    )


def build(architecture: str, *, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the native network with random weights and ``num_classes`` outputs; downloads nothing."""
    return _create(architecture, pretrained=False, num_classes=num_classes, arguments=arguments)


def _create(name: str, *, pretrained: bool, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    except (AssertionError, ValueError) as error:
        raise SettingError(f"timm/{name} cannot be built with {dict(arguments)}: {error}") from error
    return network


def load(
    architecture: str,
    *,
    weights: str | Path | None,
    image_size: int | None = None,
    in_chans: int = 3,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build ``architecture`` with pretrained weights; its own head is there to be replaced.

    Args:
        architecture: A timm name, with a tag or without: ``"convnext_atto"`` or ``"convnext_atto.d2_in1k"``.
        weights: ``"default"`` (the name's tag, or timm's first), ``"bundled"``, another tag, a path, or ``None``.
        image_size: Input side in pixels where it differs from the weights', or ``None``.
        in_chans: Channels of the pictures.
        options: More keyword arguments for the native builder.

    Raises:
        WeightsError: The weights do not exist, cannot be downloaded, or do not fit.
        SettingError: The network has no classifier, or cannot take pictures of ``image_size`` or ``in_chans``.
    """
    bare, _, tag = architecture.partition(".")
    arguments: dict[str, Any] = {}
    if weights == "bundled" and bare != BUNDLED:
        raise WeightsError(f"no bundled weights for timm/{bare}; they belong to timm/{BUNDLED}")
    # A file is read before the network is built, which may take long.
    state = read_state_dict(weights) if isinstance(weights, Path) else None
    if isinstance(weights, str) and weights not in ("default", "bundled"):
        tag, weights = weights, "default"
    config = _config(bare, tag)
    if image_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = image_size
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    arguments |= options or {}
    name = f"{bare}.{tag}" if tag else bare
    described: str | None = None
    if weights == "default":
        described = f"timm {bare}.{config.tag}" if config is not None and config.tag else f"timm {bare}"
        network = _download(name, config, arguments)
    else:
        network = _create(name, pretrained=False, num_classes=_own_classes(config), arguments=arguments)
    head_paths = find_head_paths(network)
    preprocessing = preprocessing_of(network)
    if weights == "bundled":
        described, preprocessing = "transferkit bundled", _BUNDLED_PREPROCESSING
        fit_state_dict(network, read_state_dict(_BUNDLED_FILE), head_paths=head_paths, source=described)
    elif state is not None:
        described = str(weights)
        fit_state_dict(network, state, head_paths=head_paths, source=described)
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    return Backbone(f"timm/{name}", network, head_paths, preprocessing.with_channels(in_chans), described, arguments)


def _config(bare: str, tag: str) -> Any:
    """Return timm's metadata of one tag (the default one for ``""``)."""
    import timm

    if not tag:
        return timm.get_pretrained_cfg(bare)
    known = [each.partition(".")[2] for each in timm.list_pretrained(f"{bare}.*")]
    if tag not in known:
        offered = f"it has {', '.join(known)}" if known else "timm has no pretrained weights for it"
        raise WeightsError(
            f"no weights {tag!r} for timm/{bare}; {offered}; a path to a local state dict or None also works"
            f"{closest(tag, known)}"
        )
    return timm.get_pretrained_cfg(f"{bare}.{tag}")


def _download(name: str, config: Any, arguments: Mapping[str, Any]) -> nn.Module:
    """Let timm fetch the weights, or find them in the hub's cache."""
    if config is None or not config.has_weights:
        raise WeightsError(f"timm has no pretrained weights for {name}; pass weights=PATH or weights=None")
    try:
        return _create(name, pretrained=True, num_classes=_own_classes(config), arguments=arguments)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"the weights of timm/{name} could not be downloaded or read ({reason[:200]}); "
            "pass weights=PATH to a local state dict, or weights=None for random weights"
        ) from error


def _own_classes(config: Any) -> int:
    """Return how many classes the weights know; encoders without any get a head as wide as ImageNet's."""
    return (config.num_classes if config is not None else 0) or 1000


@cache
def _known_parameters() -> dict[str, int]:
    """Read the counts that scripts/count_timm_parameters.py made, since timm states none."""
    counts: dict[str, int] = json.loads(Path(__file__).with_name("timm_parameters.json").read_text(encoding="utf-8"))
    return counts


def model_info(architecture: str) -> tuple[int | None, int, str | None]:
    """Return (parameters, input side in pixels, licence of the weights) of an architecture with its default weights."""
    bare, _, tag = architecture.partition(".")
    config = _config(bare, tag)
    parameters = _known_parameters().get(bare)
    if parameters is None:  # an architecture that is newer than the table
        import timm

        with torch.device("meta"):
            parameters = sum(each.numel() for each in timm.create_model(bare, pretrained=False).parameters())
    size = config.input_size[-1] if config is not None else 224
    return parameters, size, getattr(config, "license", None)
