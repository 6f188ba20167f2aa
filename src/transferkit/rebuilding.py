"""The network of a saved model, rebuilt from its config: compared with the saved tensors first, and only then built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from transferkit.artifact_config import ArtifactConfig
from transferkit.backbones import Backbone, build_network, change_channels, change_stem, model_info
from transferkit.exceptions import ArtifactError, TransferkitError, one_line
from transferkit.heads import Head, build_head, head_inputs, replace_module
from transferkit.model import TransferModel
from transferkit.transforms import eval_transform

__all__ = ["build_model", "build_native", "check_fit", "difference", "not_rebuilt", "unfit"]

_LARGEST_EXTRA = 2**30  # bytes that a network needs beside its weights: tables, and native heads that are replaced
_LARGEST_REAL_RUN = 1_024  # pixels; the side of a made picture on which a network may run for real to find its stages
_WIDEST = 8_192  # inputs of a head


def check_fit(config: ArtifactConfig, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Compare tensors with the network they are for while it has no values, so that nothing large is made in vain.

    Args:
        config: What the network is built from.
        tensors: By native key; their values are not looked at.
        file: Where they come from, for messages.

    Raises:
        ArtifactError: The network cannot be built, is not the one that the tensors are for, or needs much memory beside
            its weights.
    """
    folder = file.parent
    if config.backbone.startswith("module/"):
        raise ArtifactError(
            f"{folder} was made from a module of your own ({config.backbone.removeprefix('module/')}); "
            "build it again and pass it as network="
        )
    head, aux = config.head, Head(config.head.num_classes)
    try:
        with torch.device("meta"):
            network = build_native(config)
            if config.preprocessing.size > _LARGEST_REAL_RUN:
                build_model(config, build_native(config))  # it must find its stages without a real run
            inputs = sum(head_inputs(network.get_submodule(path)) for path in (*config.head_paths, *config.aux_paths))
            for path in (*config.head_paths, *config.aux_paths):
                new = build_head(network.get_submodule(path), head if path in config.head_paths else aux)
                replace_module(network, path, new)
    except TransferkitError as error:
        raise not_rebuilt(folder, error) from error
    except Exception:  # some builders read values, torchvision's RegNet those of its widths
        _check_size(config, tensors, file)
        return
    state = network.state_dict(keep_vars=True)
    if problem := difference(state, tensors):
        raise unfit(file, problem)
    stored = {id(tensor) for tensor in state.values()}
    buffers = sum(_bytes(buffer) for buffer in network.buffers() if id(buffer) not in stored)
    native_heads = 4 * inputs * head.num_classes  # built by the library, then replaced
    if buffers + native_heads > _LARGEST_EXTRA:
        raise ArtifactError(
            f"{folder} needs {buffers + native_heads:,} bytes beside its weights, {_LARGEST_EXTRA:,} at most"
        )


def _check_size(config: ArtifactConfig, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Make sure that a file is large enough for the network that will be built for it."""
    try:
        parameters = model_info(config.backbone).parameters or 0
    except TransferkitError as error:
        raise not_rebuilt(file.parent, error) from error
    stored = sum(map(_bytes, tensors.values()))
    if stored < parameters:  # a byte for each; there are two or four
        raise unfit(file, f"it has {stored:,} bytes of tensors, too few for {config.backbone}")
    if 4 * _WIDEST * max(config.head.num_classes, config.head.hidden_size or 0) > _LARGEST_EXTRA:
        raise not_rebuilt(file.parent, f"{config.backbone} with so large a head cannot be looked at before it is built")


def build_native(config: ArtifactConfig) -> nn.Module:
    """Build a network as its library does, with random weights, then change channels and stem; nothing is downloaded.

    Args:
        config: What it is built from.

    Raises:
        TransferkitError: The library has no such network, or it cannot be changed so; the libraries raise others.
    """
    network = build_network(config.backbone, num_classes=config.head.num_classes, arguments=config.arguments)
    if config.preprocessing.channels != 3 and "in_chans" not in config.arguments:
        change_channels(network, config.preprocessing.channels)
    change_stem(network, config.stem)
    return network


def build_model(config: ArtifactConfig, network: nn.Module) -> TransferModel:
    """Put the head on a native network.

    Args:
        config: What the model is built from.
        network: Of :func:`build_native`, or a module of the user's own; changed in place.

    Raises:
        SettingError: The two do not belong together; torch raises others.
    """
    eval_transform(config.eval_transform, config.preprocessing)  # raises where the two do not go together
    backbone = Backbone(
        config.backbone,
        network,
        config.head_paths,
        config.preprocessing,
        config.weights,
        config.arguments,
        small_images=config.small_images,
        stem=config.stem,
        aux_paths=config.aux_paths,
        aux_weight=config.aux_weight,
    )
    model = TransferModel(backbone, class_names=config.class_names, head=config.head)
    model.eval_preset = config.eval_transform
    model.temperature = config.temperature
    return model


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Name the first tensor in which a file differs from a network, by key, shape or kind of number.

    Args:
        ours: The network's.
        theirs: The file's; floating-point numbers of any precision are of one kind.

    Returns:
        A sentence about it, ``""`` where there is none.

    Example:
        >>> difference({"bias": torch.zeros(2)}, {"bias": torch.zeros(3)})
        "bias is (3,) of torch.float32, the network's is (2,) of torch.float32"
    """
    if lacking := [key for key in ours if key not in theirs]:
        return f"it lacks {lacking[0]}"
    for key, tensor in theirs.items():
        if key not in ours:
            return f"the network has no {key!r:.100}"
        own = ours[key]
        same_kind = tensor.dtype == own.dtype or (tensor.is_floating_point() and own.is_floating_point())
        if tensor.shape != own.shape or not same_kind:
            stated, built = (f"{tuple(each.shape)!s:.60} of {each.dtype}" for each in (tensor, own))
            return f"{key} is {stated}, the network's is {built}"
    return ""


def unfit(file: Path, reason: object) -> ArtifactError:
    """Return the error of a file of weights that is damaged or another's."""
    return ArtifactError(f"{file} does not hold the weights of this model: {one_line(reason)}")


def not_rebuilt(folder: Path, reason: object) -> ArtifactError:
    """Return the error of a config that no network can be built from."""
    return ArtifactError(f"the model in {folder} cannot be rebuilt: {one_line(reason)}")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
