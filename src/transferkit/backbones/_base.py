"""What every adapter hands over: a native network, where its head is, and how its pictures are prepared."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from transferkit.exceptions import WeightsError
from transferkit.preprocessing import Preprocessing

__all__ = ["UNREADABLE", "Backbone", "fit_state_dict", "read_state_dict"]

UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
"""What a failed download, a damaged file and a pickle that carries code raise."""


@dataclass(frozen=True)
class Backbone:
    """A native network before its head is replaced.

    Attributes:
        name: ``"torchvision/resnet18"``, ``"timm/convnext_atto"`` or ``"module/ClassName"``.
        network: The untouched native class, still with its own head.
        head_paths: Dotted names of its classification layers; more than one for distilled networks.
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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth``/``.pt`` state dict without ever running a pickle's code.

    Args:
        path: A file holding a state dict, or a dict with one under ``state_dict`` or ``model``.

    Returns:
        Tensors by key, on the CPU.

    Raises:
        WeightsError: The file is missing, unreadable, or holds anything but tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"no weights file at {file}")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{file} cannot be read as a state dict ({reason[:160]}); "
            "save one with torch.save(network.state_dict(), path) or safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(each, Tensor) for each in content.values()):
        raise WeightsError(f"{file} holds a {type(content).__name__}, not a state dict of tensors by name")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def fit_state_dict(
    network: nn.Module, state: Mapping[str, Tensor], *, head_paths: tuple[str, ...], source: str
) -> None:
    """Load a state dict into a network; only the head, which is replaced anyway, may differ or be missing.

    Args:
        network: The native network.
        state: Tensors by native key.
        head_paths: Dotted names of the classification layers.
        source: Where the state came from, for messages.

    Raises:
        WeightsError: A key is missing, unexpected, or of another shape; nothing has been loaded then.
    """
    own = network.state_dict()

    def in_head(key: str) -> bool:
        return any(key.startswith(f"{path}.") for path in head_paths)

    body = {key: value for key, value in state.items() if not in_head(key)}
    missing = [key for key in own if key not in body and not in_head(key) and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in body if key not in own]
    shapes = [
        f"{key} is {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the network"
        for key, value in body.items()
        if key in own and own[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {label}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"{source} does not fit {type(network).__name__}: {'; '.join(problems)}")
    network.load_state_dict(body, strict=False)
