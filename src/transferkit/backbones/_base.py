"""What every adapter hands over: a native network, where its head is, and how its pictures are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from transferkit.backbones.stem import StemChange
from transferkit.preprocessing import Preprocessing

__all__ = ["Backbone"]


@dataclass(frozen=True)
class Backbone:
    """A native network before its head is replaced.

    Attributes:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto"`` or ``"module/ClassName"``.
        network: The untouched native class, still with its own head.
        head_paths: Dotted names of its classification layers; more than one for distilled networks.
        small_images: ``"stem"`` where the network was adapted to small pictures, else ``"upsample"``.
        stem: The layers that were changed for them, beyond what ``arguments`` say.
        aux_paths: Dotted names of auxiliary classification layers, whose logits the network returns while it trains.
        aux_weight: Weight of each auxiliary loss beside the main one.
        preprocessing: How the weights' pictures were prepared.
        weights: What was loaded, in words, or ``None`` for random weights.
        arguments: Keyword arguments beyond the class count that the native builder needs to rebuild it.
    """

    name: str
    network: nn.Module
    head_paths: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    small_images: str = "upsample"
    stem: tuple[StemChange, ...] = ()
    aux_paths: tuple[str, ...] = ()
    aux_weight: float = 0.0
