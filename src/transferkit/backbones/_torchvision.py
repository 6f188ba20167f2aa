"""torchvision's classification models: names, weights, head position, preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models import GoogLeNet, Inception3

from transferkit.backbones._base import Backbone
from transferkit.backbones._channels import change_channels
from transferkit.backbones._state_dict import UNREADABLE, read_state_dict
from transferkit.backbones._weights import fit_state_dict
from transferkit.exceptions import SettingError, WeightsError, closest
from transferkit.preprocessing import Preprocessing

__all__ = ["AUXILIARY", "auxiliary", "build", "find_head_paths", "list_names", "load", "model_info"]

_IMAGENET_CLASSES = 1000
_VIT_SIZE = 224

# Szegedy et al. 2015 §5 state the weight of the first, torchvision's fine-tuning tutorials that of the other.
AUXILIARY = {"googlenet": (("aux1", "aux2"), 0.3), "inception_v3": (("AuxLogits",), 0.4)}
"""By architecture the names of its auxiliary classifiers and the weight of each one's loss."""


@cache
def list_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification models."""
    return tuple(models.list_models(module=models))


def _preset(architecture: str, entry: Any | None) -> Preprocessing:
    """Read the preprocessing of one weights entry; without one, of the architecture's default entry."""
    entry = entry if entry is not None else models.get_model_weights(architecture).DEFAULT
    preset = entry.transforms()
    size = preset.crop_size[0]
    return Preprocessing(
        size=size,
        resize_size=max(size, preset.resize_size[0]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _entry(architecture: str, weights: str) -> Any:
    """Return the weights enum member that a tag names."""
    known = models.get_model_weights(architecture)
    if weights == "default":
        return known.DEFAULT
    names = [member.name for member in known]
    if weights not in names:
        raise WeightsError(
            f"no weights {weights!r} for torchvision/{architecture}; it has {', '.join(names)}, "
            f"or a path to a local state dict, or None{closest(weights, names)}"
        )
    return known[weights]


def find_head_paths(network: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the dotted names of the classification layers and of the auxiliary ones.

    They are the layers with as many outputs as ImageNet has classes.
    """
    paths = [
        path
        for path, module in network.named_modules()
        if _IMAGENET_CLASSES in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    ]
    auxiliary = tuple(path for path in paths if _is_auxiliary(path))
    return tuple(path for path in paths if path not in auxiliary), auxiliary


def auxiliary(network: nn.Module) -> tuple[tuple[str, ...], float]:
    """Return the auxiliary classification layers of a network that is there already, and the weight of their losses."""
    for kind, architecture, layer in ((GoogLeNet, "googlenet", "fc2"), (Inception3, "inception_v3", "fc")):
        if isinstance(network, kind) and network.aux_logits:
            modules, weight = AUXILIARY[architecture]
            return tuple(f"{module}.{layer}" for module in modules), weight
    return (), 0.0


def _is_auxiliary(key: str) -> bool:
    return any(key.partition(".")[0] in modules for modules, _ in AUXILIARY.values())


def build(architecture: str, *, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the native network with random weights and ``num_classes`` outputs; downloads nothing."""
    extra = {"init_weights": False} if architecture in AUXILIARY else {}
    network: nn.Module = models.get_model(architecture, weights=None, num_classes=num_classes, **arguments, **extra)
    return network


def load(
    architecture: str,
    *,
    weights: str | Path | None,
    image_size: int | None = None,
    in_chans: int = 3,
    aux: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build ``architecture`` with pretrained weights; its own head is there to be replaced.

    Args:
        architecture: One of :func:`list_names`.
        weights: ``"default"``, an enum member's name such as ``"IMAGENET1K_V2"``, a path, or ``None``.
        image_size: Input side in pixels where it differs from the weights', or ``None``.
        in_chans: Channels of the pictures.
        aux: Whether auxiliary classifiers are kept, where the architecture has any.
        options: More keyword arguments for the native builder.

    Raises:
        WeightsError: The weights do not exist, cannot be downloaded, or do not fit.
        SettingError: The network cannot take pictures of ``image_size``.
    """
    entry = None if weights is None or isinstance(weights, Path) else _entry(architecture, weights)
    # A file is read before the network is built, which may take long.
    held = read_state_dict(weights) if isinstance(weights, Path) else None
    preprocessing = _preset(architecture, entry)
    if image_size is not None:
        preprocessing = preprocessing.resized(image_size)
    arguments: dict[str, Any] = {}
    aux_weight = 0.0
    if architecture in AUXILIARY:
        # Their pretrained weights expect pixels from -1 to 1: the network turns ImageNet's normalisation into that,
        # which it can do for three channels only.
        arguments = {"aux_logits": aux, "transform_input": in_chans == 3}
        aux_weight = AUXILIARY[architecture][1] if aux else 0.0
        if in_chans != 3:
            preprocessing = replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3)
    if architecture.startswith("vit_") and preprocessing.size != _VIT_SIZE:
        arguments["image_size"] = preprocessing.size
    arguments |= options or {}
    try:
        network = build(architecture, num_classes=_IMAGENET_CLASSES, arguments=arguments)
    except AssertionError as error:  # torchvision asserts that the size is a multiple of the patch
        raise SettingError(f"torchvision/{architecture} cannot take {image_size}-px pictures: {error}") from error
    head_paths, aux_paths = find_head_paths(network)
    if in_chans != 3:
        change_channels(network, in_chans)
    described = None
    if weights is not None:
        described = str(weights) if entry is None else str(entry)
        state = _download(architecture, entry) if held is None else held
        if not aux:
            state = {key: value for key, value in state.items() if not _is_auxiliary(key)}
        fit_state_dict(network, state, head_paths=(*head_paths, *aux_paths), source=described)
    return Backbone(
        f"torchvision/{architecture}",
        network,
        head_paths,
        preprocessing.with_channels(in_chans),
        described,
        arguments,
        aux_paths=aux_paths,
        aux_weight=aux_weight,
    )


def _download(architecture: str, entry: Any) -> dict[str, Tensor]:
    """Fetch a weights entry, or find it in torch's cache."""
    try:
        return dict(entry.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"the weights {entry} of torchvision/{architecture} could not be downloaded or read ({reason[:200]}); "
            "pass weights=PATH to a local state dict, or weights=None for random weights"
        ) from error


def model_info(architecture: str) -> tuple[int | None, int, str | None]:
    """Return (parameters, input side in pixels, licence of the weights) from metadata, without building anything.

    torchvision states no licence for its weights.
    """
    entry = models.get_model_weights(architecture).DEFAULT
    return entry.meta.get("num_params"), _preset(architecture, entry).size, None
