"""Small pictures: a stem that keeps their resolution, with its pretrained weights.

A network made for 224 px halves a 32-px picture down to one position before its head. Here the earliest downsampling
steps are undone until the last feature map keeps 4 × 4 positions. There is no table of architectures: the network runs
on torch's ``meta`` device, and the run tells which layers lower the resolution. Networks of tokens are built with
smaller patches instead (:func:`stem_arguments`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from transferkit.backbones._stages import _twin
from transferkit.exceptions import ArtifactError, SettingError, closest

__all__ = ["StemChange", "Window", "change_stem", "describe", "plan_stem", "stem_arguments"]

logger = logging.getLogger("transferkit")

_MIN_SIDE = 4
_MIN_TOKENS = 8

# The families whose own loading resamples patch kernel, position embeddings and relative position tables.
_TOKEN_FAMILIES = ("vision_transformer", "deit", "beit", "eva")
_WINDOW_FAMILIES = ("swin_transformer", "swin_transformer_v2")


class Window(NamedTuple):
    """What a square convolution sees at a time, in pixels of its input."""

    kernel_size: int
    stride: int
    padding: int


@dataclass(frozen=True)
class StemChange:
    """One layer of a stem and what it becomes.

    Args:
        path: Dotted name of the layer in the network.
        before: The convolution's window as the network was built; ``None`` for a pooling layer.
        after: The window it gets; ``None`` for a pooling layer, which becomes ``nn.Identity``.

    Raises:
        SettingError: The path is empty, a window is outside its range, or only one of the two is given.

    Example:
        >>> StemChange("conv1", Window(7, 2, 3), Window(3, 1, 1)).to_dict()
        {'path': 'conv1', 'before': [7, 2, 3], 'after': [3, 1, 1]}
    """

    path: str
    before: Window | None = None
    after: Window | None = None

    def __post_init__(self) -> None:
        """Validate every value."""
        if not isinstance(self.path, str) or not self.path:
            raise SettingError(f"a stem change needs the dotted name of a layer, got path={self.path!r}")
        if (self.before is None) != (self.after is None):
            raise SettingError(f"{self.path}: give the windows before and after for a convolution, none for a pool")
        for window in (self.before, self.after):
            if window is not None and not (
                all(type(value) is int for value in window)
                and window.kernel_size > 0
                and window.stride > 0
                and window.padding >= 0
            ):
                raise SettingError(
                    f"{self.path}: a window needs integers kernel_size >= 1, stride >= 1, padding >= 0, "
                    f"got {tuple(window)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; :meth:`from_dict` reads them back."""
        windows = {"before": self.before, "after": self.after}
        return {"path": self.path, **{key: None if each is None else list(each) for key, each in windows.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from :meth:`to_dict`'s values.

        Args:
            values: One JSON value per field.

        Raises:
            ArtifactError: A key is missing, unknown, or has a value of the wrong kind.

        Example:
            >>> StemChange.from_dict({"path": "maxpool", "before": None, "after": None})
            StemChange(path='maxpool', before=None, after=None)
        """
        try:
            windows = {key: None if values[key] is None else Window(*values[key]) for key in ("before", "after")}
            return cls(**{**values, **windows})
        except (KeyError, TypeError, SettingError) as error:
            raise ArtifactError(f"a stem change in the saved config cannot be used: {error}") from error


def stem_arguments(name: str, *, size: int) -> dict[str, Any]:
    """Return the builder's arguments with which a network of tokens takes small pictures.

    ViT, DeiT, BEiT and EVA get the largest patch that leaves 8 × 8 tokens; Swin gets 32 × 32 tokens in windows of
    8 × 8, so that its last stage has 4 × 4. timm resamples patch kernel, position embeddings and relative position
    tables when it loads pretrained weights into the network so built. torchvision's ViT is built for a larger picture
    with as many tokens; :func:`plan_stem` then shrinks its patch.

    Args:
        name: Full name with its library, such as ``"timm/vit_tiny_patch16_224"``.
        size: Side of the pictures in pixels.

    Returns:
        Keyword arguments for the builder; empty where :func:`plan_stem` alone does the work.

    Raises:
        SettingError: ``size`` is too small for 8 × 8 tokens.

    Source: Beyer et al. 2023, FlexiViT, §3.4 (the resampled patch kernel).

    Example:
        >>> stem_arguments("timm/vit_tiny_patch16_224", size=32)
        {'img_size': 32, 'patch_size': 4}
        >>> stem_arguments("torchvision/vit_b_16", size=32), stem_arguments("timm/resnet18", size=32)
        ({'image_size': 128}, {})
    """
    library, _, architecture = name.partition("/")
    bare = architecture.partition(".")[0]
    if library == "torchvision" and bare.startswith("vit_"):
        with torch.device("meta"):
            patch = models.get_model(bare, weights=None).patch_size
        return {"image_size": size // _patch(name, size, patch, _MIN_TOKENS) * patch}
    if library != "timm":
        return {}
    import timm

    family = timm.model_entrypoint(bare).__module__.rpartition(".")[2]
    if family in (*_TOKEN_FAMILIES, *_WINDOW_FAMILIES):
        with torch.device("meta"):
            built = timm.create_model(bare, pretrained=False).patch_embed.patch_size[0]
        if family in _TOKEN_FAMILIES:
            return {"img_size": size, "patch_size": _patch(name, size, built, _MIN_TOKENS)}
        patch = _patch(name, size, built, 8 * _MIN_SIDE)  # three mergings halve the tokens' grid after it
        return {"img_size": size, "patch_size": patch, "window_size": size // patch // 4}
    return {}


def _patch(name: str, size: int, built: int, tokens: int) -> int:
    """Return the largest patch, up to the one it was built with, that divides the picture into enough tokens."""
    fitting = [patch for patch in range(1, built + 1) if size % patch == 0 and size // patch >= tokens]
    if not fitting:
        raise SettingError(
            f"a {size}-px picture is too small for {tokens}x{tokens} tokens of {name}; pass small_images='upsample'"
        )
    return fitting[-1]


def plan_stem(network: nn.Module, *, channels: int, size: int) -> tuple[StemChange, ...]:
    """Find the changes with which a small picture keeps at least 4 × 4 positions at the last stage.

    All layers that lead from one resolution to the next lower one form a step (a residual block's strided convolution
    and its shortcut change together). The earliest steps are undone: a convolution gets stride 1, and 3 × 3 in place
    of any kernel but 1 × 1 and 3 × 3; a pooling layer goes. A network of one resolution, such as a user's own ViT,
    gets smaller patches for 8 × 8 tokens. One that lowers the resolution by max-pooling alone (VGG) keeps its stem.

    Args:
        network: Any classifier; it is left as it is.
        channels: Channels of its input.
        size: Side of the pictures in pixels.

    Returns:
        The changes in the order of execution; empty where the network keeps its stem.

    Raises:
        SettingError: No change of convolutions and pooling layers lets it keep 4 × 4 positions.

    Source: He et al. 2016, Deep Residual Learning, §4.2 (CIFAR networks open with a 3 × 3 convolution and no pool).

    Example:
        >>> from torchvision.models import resnet18
        >>> describe(plan_stem(resnet18(), channels=3, size=32))
        'conv1 7x7/2 -> 3x3/1, maxpool removed'
    """
    if channels < 1 or size < _MIN_SIDE:
        raise SettingError(
            f"a stem needs pictures of 1 or more channels and {_MIN_SIDE} or more pixels, "
            f"got channels={channels}, size={size}"
        )
    if isinstance(network, VisionTransformer) and isinstance(network.conv_proj, nn.Conv2d):
        return _plan_patch(network, size)
    probe = _twin(network, "meta")
    changes: list[StemChange] = []
    while (seen := _look(probe, channels, size)).side < _MIN_SIDE:
        if not seen.steps:
            why = f"its last stage has {seen.side}x{seen.side} positions" if seen.side else "it shows no feature map"
            raise SettingError(
                f"the stem of {type(network).__name__} cannot be adapted to {size}-px pictures "
                f"({seen.failure or why}); pass small_images='upsample'"
            )
        steps = [{path: probe.get_submodule(path) for path in paths} for paths in seen.steps.values()]
        if not changes and all(isinstance(layer, nn.MaxPool2d) for layers in steps for layer in layers.values()):
            logger.info(
                "%s keeps its stem: its first convolution has stride 1 and max-pooling alone lowers the resolution",
                type(network).__name__,
            )
            return ()
        step = [_undo(layer, path) for path, layer in steps[0].items()]
        patch = step[0].before
        if len(step) == 1 and patch and patch.kernel_size == patch.stride and list(seen.steps) == [(size, seen.side)]:
            # One layer leads from the picture to the last map: the network works on tokens, and patches of 1 x 1
            # would make too many.
            smaller = _patch(type(network).__name__, size, patch.stride, _MIN_TOKENS)
            step = [replace(change, after=Window(smaller, smaller, 0)) for change in step]
        change_stem(probe, step)
        changes += step
    return tuple(changes)


def change_stem(network: nn.Module, changes: Iterable[StemChange]) -> None:
    """Carry out a plan in place; every parameter keeps its values' meaning, ``requires_grad``, dtype and device.

    A convolution that gets another kernel sees the small picture as the old kernel saw the enlarged one. Its weight
    is then a new parameter, so make the optimizer afterwards.

    Args:
        network: The network the plan was made for, or a freshly built one of its architecture.
        changes: What :func:`plan_stem` returned.

    Raises:
        ArtifactError: The network has no such layer, or one with another window (it may have been changed before).

    Source: Beyer et al. 2023, FlexiViT, §3.4, in timm's ``resample_patch_embed``.

    Example:
        >>> from torchvision.models import resnet18
        >>> network = resnet18()
        >>> change_stem(network, plan_stem(network, channels=3, size=32))
        >>> network.conv1.weight.shape, network.maxpool
        (torch.Size([64, 3, 3, 3]), Identity())
    """
    for change in changes:
        layer = _layer(network, change)
        if change.after is None or not isinstance(layer, nn.Conv2d):
            network.set_submodule(change.path, nn.Identity().train(layer.training))
            continue
        _set_window(layer, change.after)
        if isinstance(network, VisionTransformer) and change.path == "conv_proj":
            network.image_size = network.image_size // network.patch_size * change.after.stride
            network.patch_size = change.after.stride


def describe(changes: Iterable[StemChange]) -> str:
    """Say in one line what a plan does, for the log.

    Args:
        changes: What :func:`plan_stem` returned.

    Example:
        >>> describe([StemChange("features.0", Window(11, 4, 2), Window(3, 1, 1)), StemChange("features.2")])
        'features.0 11x11/4 -> 3x3/1, features.2 removed'
        >>> describe([])
        'stem unchanged'
    """
    return ", ".join(map(_phrase, changes)) or "stem unchanged"


def _phrase(change: StemChange) -> str:
    if change.before is None or change.after is None:
        return f"{change.path} removed"
    old, new = (f"{each.kernel_size}x{each.kernel_size}/{each.stride}" for each in (change.before, change.after))
    return f"{change.path} {old} -> {new}"


@dataclass
class _Look:
    """What one run showed.

    ``steps`` holds the layers that lower the resolution, in order of use, by their sides before and after; ``side`` is
    that of the last feature map, 0 where the run failed.
    """

    steps: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    side: int = 0
    failure: str = ""


def _look(probe: nn.Module, channels: int, size: int) -> _Look:
    """Run the probe on one made picture; a run that fails half-way still tells which layers ran."""
    seen = _Look()
    sides = set()

    def note(path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        picture = inputs[0] if inputs else None
        if not isinstance(picture, Tensor) or picture.ndim != 4 or not isinstance(output, Tensor):
            return
        if isinstance(module, nn.LayerNorm):
            # A map with its channels last (Swin); elsewhere such a norm is over tokens, or over heads of them.
            if picture.shape[1] == picture.shape[2] and picture.shape[3:] == module.normalized_shape:
                seen.side = output.shape[1]
            return
        before, after = picture.shape[2], output.shape[2]
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if not pointwise:
            sides.add(after)
        # 1 x 1 convolutions also work on globally pooled maps, inside blocks and heads.
        if isinstance(module, nn.Conv2d) and (not pointwise or after in sides):
            seen.side = after
        if before > after and _is_strided(module):
            step = seen.steps.setdefault((before, after), [])
            if path not in step:
                step.append(path)

    hooks = [
        module.register_forward_hook(partial(note, path))
        for path, module in probe.named_modules()
        if isinstance(module, (nn.Conv2d, nn.LayerNorm, _pools()))
    ]
    dtype = next((each.dtype for each in probe.parameters() if each.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            probe(torch.zeros(1, channels, size, size, device="meta", dtype=dtype))
    except Exception as error:  # whatever the network raises, the steps before it can be undone
        seen.side, seen.failure = 0, (str(error) or type(error).__name__).splitlines()[0][:200]
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _plan_patch(network: VisionTransformer, size: int) -> tuple[StemChange, ...]:
    """Shrink the patch of torchvision's ViT until a small picture has the tokens it was built for."""
    tokens = network.image_size // network.patch_size
    if tokens < _MIN_TOKENS or size % tokens:
        raise SettingError(
            f"a VisionTransformer built for {network.image_size} px has {tokens}x{tokens} tokens, which {size}-px "
            "pictures do not fill; build it with stem_arguments(...), or pass small_images='upsample'"
        )
    window, patch = _window(network.conv_proj), size // tokens
    if window is None or patch == network.patch_size:
        return ()
    return (StemChange("conv_proj", window, Window(patch, patch, 0)),)


def _window(module: nn.Module) -> Window | None:
    """Return what a square convolution sees, ``None`` for any other layer."""
    if not isinstance(module, nn.Conv2d):
        return None
    padding = (0, 0) if isinstance(module.padding, str) else module.padding
    pairs = (module.kernel_size, module.stride, padding)
    return Window(*(pair[0] for pair in pairs)) if all(pair[0] == pair[1] for pair in pairs) else None


@cache
def _pools() -> tuple[type[nn.Module], ...]:
    from timm.layers import BlurPool2d

    return nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, BlurPool2d


def _is_strided(module: nn.Module) -> bool:
    if isinstance(module, _pools()):
        return module.stride not in (1, (1, 1))
    window = _window(module)
    return window is not None and window.stride > 1


def _undo(layer: nn.Module, path: str) -> StemChange:
    """Plan the change with which a layer keeps its input's resolution."""
    before = _window(layer)
    if before is None or not isinstance(layer, nn.Conv2d):
        return StemChange(path)
    kernel = before.kernel_size if before.kernel_size in (1, 3) else 3
    # timm's "same" convolutions pad by themselves; a try tells.
    trial = copy.deepcopy(layer)
    _set_window(trial, Window(kernel, 1, 0))
    with torch.no_grad():
        kept = trial(torch.zeros(1, trial.in_channels, 16, 16, device="meta", dtype=trial.weight.dtype)).shape[2] == 16
    return StemChange(path, before, Window(kernel, 1, 0 if kept else kernel // 2 * trial.dilation[0]))


def _layer(network: nn.Module, change: StemChange) -> nn.Module:
    """Return the layer that a change means, of the kind and window that it expects."""
    modules = dict(network.named_modules())
    if change.path not in modules:
        raise ArtifactError(
            f"{type(network).__name__} has no layer {change.path!r} whose stem change could be made"
            f"{closest(change.path, modules)}"
        )
    layer: nn.Module = modules[change.path]
    fits = isinstance(layer, _pools()) if change.before is None else _window(layer) == change.before
    if not fits:
        raise ArtifactError(
            f"the stem change '{_phrase(change)}' does not fit {change.path}, which is {layer}; "
            "make it once, on a network as its library builds it"
        )
    return layer


def _set_window(convolution: nn.Conv2d, window: Window) -> None:
    """Give a convolution another window in place, so that subclasses stay what they are."""
    kernel, stride, padding = ((each, each) for each in window)
    weight = convolution.weight
    if weight.shape[-2:] != kernel:
        from timm.layers import resample_patch_embed

        with torch.no_grad():
            resampled = resample_patch_embed(weight, list(kernel))
        convolution.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
    convolution.kernel_size, convolution.stride, convolution.padding = kernel, stride, padding
    # torch pads by this copy where the padding is not of zeros
    convolution._reversed_padding_repeated_twice = [window.padding] * 4
