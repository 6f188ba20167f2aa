"""A module the user built: where its head is, found by running one made picture through it."""

from __future__ import annotations

import difflib
import logging

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from transferkit.backbones import _timm, _torchvision
from transferkit.backbones._base import Backbone
from transferkit.backbones._channels import input_convolutions
from transferkit.backbones._stages import run_twin
from transferkit.exceptions import SettingError, one_line
from transferkit.preprocessing import Preprocessing

__all__ = ["adapt_module"]

logger = logging.getLogger("transferkit")


def adapt_module(network: nn.Module, *, head: str | None, preprocessing: Preprocessing | None) -> Backbone:
    """Take a classifier that the user built, with whatever weights it has.

    Args:
        network: Any classifier; torchvision and timm instances bring their own metadata.
        head: Dotted name of the classification layer; ``None`` for the ones timm states, else the last ``nn.Linear``
            or ``nn.Conv2d`` that runs and gives as many outputs as there are logits.
        preprocessing: How pictures are prepared; ``None`` for timm's metadata, else ImageNet's, for as many channels as
            the first convolution takes.

    Raises:
        SettingError: No such layer, or none that can be found; the message says which argument settles it.
    """
    stated = hasattr(network, "pretrained_cfg") and hasattr(network, "get_classifier")
    if preprocessing is None:
        preprocessing = _timm.preprocessing_of(network) if stated else _assumed(network)
    aux_paths, aux_weight = _torchvision.auxiliary(network)
    if head is not None:
        _check_layer(network, head)
        paths: tuple[str, ...] = (head,)
    elif stated:
        paths = _timm.find_head_paths(network)
    else:
        paths = (_last_to_give_logits(network, preprocessing),)
    return Backbone(
        f"module/{type(network).__name__}",
        network,
        paths,
        preprocessing,
        "the module's own",
        aux_paths=aux_paths,
        aux_weight=aux_weight,
    )


def _assumed(network: nn.Module) -> Preprocessing:
    first = [network.get_submodule(path) for path in input_convolutions(network)]
    channels = next((layer.in_channels for layer in first if isinstance(layer, nn.Conv2d)), 3)
    assumed = Preprocessing().with_channels(channels)
    logger.warning(
        "%s does not say how its pictures are prepared; ImageNet's statistics at %d px (channels: %d) are used — "
        "pass preprocessing=Preprocessing(...) if its weights expect others",
        type(network).__name__,
        assumed.size,
        channels,
    )
    return assumed


def _check_layer(network: nn.Module, head: str) -> None:
    modules = dict(network.named_modules())
    if not isinstance(modules.get(head), nn.Linear | nn.Conv2d):
        layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
        near = difflib.get_close_matches(head, layers, n=2) or layers[-2:]
        raise SettingError(
            f"head={head!r} is no nn.Linear or nn.Conv2d of {type(network).__name__} — "
            f"did you mean {' or '.join(map(repr, near))}?"
        )


def _last_to_give_logits(network: nn.Module, preprocessing: Preprocessing) -> str:
    """Run the network; the head is the last layer called whose outputs are as many as the logits."""
    called: list[tuple[str, int]] = []

    def watch(probe: nn.Module) -> None:
        for path, module in probe.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(
                    lambda layer, inputs, output, path=path: called.append((path, _outputs(layer)))
                )

    size, name = preprocessing.size, type(network).__name__
    output, reason = run_twin(network, watch, channels=len(preprocessing.mean), size=size)
    if reason is not None:
        raise SettingError(
            f"the head of {name} could not be found by running a made {size}-px picture "
            f"({one_line(reason, longest=200)}); name its classification layer with head=, or the pictures it takes "
            "with preprocessing=Preprocessing(size=…)"
        )
    logits = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), torch.empty(0))
    width = logits.shape[1] if logits.ndim > 1 else 0
    found = [path for path, outputs in called if outputs == width]
    if not found:
        raise SettingError(
            f"{name} gives an output of shape {tuple(logits.shape)}, and no nn.Linear or nn.Conv2d in it has {width} "
            "outputs; name its classification layer with head="
        )
    return found[-1]


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
