"""Where in a picture the evidence for a class is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from transferkit.evaluation import keeps_mode
from transferkit.exceptions import SettingError
from transferkit.model import TransferModel

__all__ = ["heat_map"]


def heat_map(model: TransferModel, images: Tensor, *, class_index: int | Sequence[int] | None = None) -> Tensor:
    """Say which places of each picture speak for a class (Grad-CAM).

    The last feature map on which the class depends is taken: of a convolutional network the one that is pooled, of a
    ViT that pools its patches what its last norm gives, of one with a class token what its last block's first norm
    gives. Channels are weighed by their mean gradient, and what speaks against the class is left out.

    The map is as coarse as that feature map, 7 × 7 for most networks at 224 px. It shows where the evidence is, and
    not what is seen there. The whole batch is kept in memory as in training, so give some dozens of pictures at a time.

    Args:
        model: Any model; what is frozen, its gradients, modes and statistics stay as they are.
        images: (B, C, H, W) float, normalised as ``model.preprocessing`` says.
        class_index: The class, counted from 0, or one for each picture; ``None`` for the likeliest of each.

    Returns:
        (B, H, W) float32 in [0, 1] on the device of ``images``. The hottest place of a picture is 1; where nothing in
        it speaks for the class, its map is 0 everywhere.

    Raises:
        SettingError: The images have another shape, there is no such class, or the network has no map of places before
            its head.

    Source: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization";
    for tokens after Gildenblat's ``pytorch-grad-cam``, which takes the last block's first norm.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("torchvision/resnet18", weights=None, num_classes=2)
        >>> heat_map(model, torch.randn(3, 3, 64, 96), class_index=1).shape
        torch.Size([3, 64, 96])
    """
    channels = model.preprocessing.channels
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise SettingError(
            f"images of shape {tuple(images.shape)} and {images.dtype} cannot be looked at; give (B, {channels}, H, W) "
            "floats, normalised"
        )
    device = next(model.parameters()).device
    with keeps_mode(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        # the pictures' own gradient leads to every map, also where all parameters are frozen
        logits, maps = _forward(model, images.detach().to(device, copy=True).requires_grad_())
        wanted = _classes(model, logits, class_index)
        evidence = _evidence(logits.gather(1, wanted[:, None]).sum(), maps)
    whole = F.interpolate(evidence[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    peaks = whole.amax((1, 2), keepdim=True)
    return (whole / peaks.where(peaks > 0, 1.0)).to(images.device)


@dataclass(frozen=True)
class _Layout:
    """How a tensor holds a map of ``height`` × ``width`` places."""

    kind: str  # "BCHW", "BHWC" or "BNC", whose further tokens come first
    height: int
    width: int

    def as_map(self, values: Tensor) -> Tensor:
        """Return (B, C, height, width)."""
        if self.kind == "BNC":
            places = values[:, values.shape[1] - self.height * self.width :]
            return places.transpose(1, 2).reshape(len(values), -1, self.height, self.width)
        return values.movedim(3, 1) if self.kind == "BHWC" else values


_Maps = list[tuple[_Layout, Tensor]]


def _forward(model: TransferModel, images: Tensor) -> tuple[Tensor, _Maps]:
    """Run a model, and keep what its blocks give before the head wherever that is a map, in the order of execution."""
    blocks, with_first_layers = _blocks(model)
    heads = {id(model.network.get_submodule(path)) for path in model.head_paths}
    size = images.shape[2], images.shape[3]
    grids: list[tuple[int, int]] = []
    maps: _Maps = []
    classified = False

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal classified
        classified = classified or id(module) in heads
        for leaf in tree_leaves(output):
            if classified or not isinstance(leaf, Tensor) or leaf.shape[:1] != images.shape[:1]:
                continue
            layout = _layout_of(tuple(leaf.shape[1:]), size, grids)
            if layout is None:
                continue
            if leaf.ndim == 4:
                grids.append((layout.height, layout.width))
            if leaf.requires_grad and id(module) in (with_first_layers if layout.kind == "BNC" else blocks):
                maps.append((layout, leaf))

    handles = [module.register_forward_hook(note) for module in model.network.modules()]
    try:
        logits = cast(Tensor, model(images))  # in eval mode no auxiliary classifier answers
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise SettingError(
            f"{model.name} has no feature map of more than one place before its head, so there is no place to point "
            f"at in pictures of {size[1]} × {size[0]} px"
        )
    return logits, maps


def _blocks(model: TransferModel) -> tuple[set[int], set[int]]:
    """Identify what gives maps worth looking at: blocks and what strings them together, without and with first layers.

    The first layer of a ViT's block is a norm. Behind it, places are exchanged: a class token learns of them there.
    """
    modules = [module for stage in model.stages for module in stage.modules]
    inner = {id(inside) for module in modules for inside in module.modules() if inside is not module}
    blocks = {id(module) for module in model.network.modules()} - inner
    first = {id(child) for module in modules if id(module) in blocks for child in islice(module.children(), 1)}
    return blocks, blocks | first


def _layout_of(shape: tuple[int, ...], size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> _Layout | None:
    """Find the axes of a tensor, without its first, that are the places of a picture.

    Args:
        shape: Of one picture's part.
        size: The picture's, (height, width).
        grids: Heights and widths of the maps that came before; tokens lie as one of them did.
    """
    if len(shape) == 3:
        kinds = (("BCHW", shape[1:]), ("BHWC", shape[:2]))
        return next((_Layout(kind, *grid) for kind, grid in kinds if _fits(grid, size)), None)
    if len(shape) != 2:
        return None
    tokens = shape[0]
    known = [grid for grid in grids if prod(grid) <= tokens]
    # some networks make tokens of a picture, or fewer of them, without a layer that shows their places
    scaled = [(height, max(1, round(height * size[1] / size[0]))) for height in range(1, size[0] + 1)]
    possible = known or [grid for grid in scaled if prod(grid) <= tokens and _fits(grid, size)]
    return _Layout("BNC", *max(possible, key=prod)) if possible else None


def _fits(grid: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a grid has more than one place and the picture's proportions, but for what rounding does to its sides."""
    (height, width), (rows, columns) = grid, size
    shaped = abs(height * columns - width * rows) < max(rows, columns)
    return shaped and height * width > 1 and height <= rows and width <= columns


def _classes(model: TransferModel, logits: Tensor, class_index: int | Sequence[int] | None) -> Tensor:
    if class_index is None:
        return logits.argmax(1)
    given = [class_index] * len(logits) if isinstance(class_index, int) else list(class_index)
    if len(given) != len(logits):
        raise SettingError(f"{len(given)} class indices for {len(logits)} pictures; give one, or one for each picture")
    if wrong := [each for each in given if not 0 <= each < logits.shape[1]]:
        raise SettingError(
            f"no class with index {wrong[0]} in {model.name}; its {logits.shape[1]} classes are counted from 0"
        )
    return torch.tensor(given, dtype=torch.int64, device=logits.device)


def _evidence(score: Tensor, maps: _Maps) -> Tensor:
    """Weigh the last map on which the score depends; returns (B, height, width) float32, 0 or more."""
    for layout, values in reversed(maps):
        (gradient,) = torch.autograd.grad(score, [values], retain_graph=True, allow_unused=True)
        if gradient is None:
            continue
        slopes = layout.as_map(gradient).float()
        # behind the last exchange between places, a class token alone leads to the head
        if slopes.any():
            break
    else:
        layout, values = maps[-1]
        slopes = torch.zeros_like(layout.as_map(values), dtype=torch.float32)
    features = layout.as_map(values.detach()).float()
    return torch.relu((slopes.mean((2, 3), keepdim=True) * features).sum(1))
