"""Pictures to network input: torchvision v2 pipelines, each a function of the backbone's preprocessing.

Every pipeline takes one upright RGB picture (PIL, or a uint8 tensor (3, H, W), or a float one in [0, 1]) and returns a
float32 tensor (C, size, size), normalised with the preprocessing's mean and std.

C is the number of values in ``mean``, which the pipeline tells as ``channels``, so that pictures are read in them. With
one the picture becomes greyscale first. With 4 it is RGBA (PIL, or a tensor), with any other number a tensor of exactly
these channels: what moves or resizes moves and resizes all of them, each on its own, and what changes colours changes
the first three, which count as RGB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from transferkit.exceptions import SettingError, closest
from transferkit.preprocessing import Preprocessing
from transferkit.ranges import check_number
from transferkit.transform_steps import OnColours, PadToSquare, ToTensor, TrivialAugment

__all__ = [
    "CIFAR10_PREPROCESSING",
    "EVAL_PRESETS",
    "TRAIN_PRESETS",
    "Transform",
    "cifar_eval",
    "cifar_train",
    "denormalize",
    "eval_transform",
    "imagenet_eval",
    "imagenet_train",
    "is_preset",
    "light",
    "none",
    "train_transform",
    "trivial_augment",
]

Transform = Callable[[Any], Tensor]

CIFAR10_PREPROCESSING = Preprocessing(
    size=32, resize_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)


class _Preset(v2.Compose):  # type: ignore[misc]  # torchvision has no types
    """A ``v2.Compose`` that prints its preset's name and one short line per step.

    It knows its channels, whether it draws random numbers, and the pixels that a picture's shorter side should have for
    it: at least twice as many as are made of them, since a picture that was decoded smaller is a little blurred.
    """

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        steps: Sequence[nn.Module],
        *,
        random: bool = True,
        least_side: int,
    ) -> None:
        channels = preprocessing.channels
        to_channels = {1: [v2.Grayscale(1)], 3: []}.get(channels, [ToTensor(channels)])
        super().__init__(
            [
                *to_channels,
                *steps,
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
            ]
        )
        self.name = name
        self.channels = channels
        self.random = random
        self.least_side = least_side

    def levels(self, picture: Any) -> Tensor:
        """Return a picture before normalisation, (C, size, size): uint8, or the numbers of one that is a tensor."""
        for step in self.transforms[:-2]:
            picture = step(picture)
        return picture.as_subclass(Tensor)  # type: ignore[no-any-return]

    def normalized(self, levels: Tensor) -> Tensor:
        """Return what the transform makes of pictures, float32, from their levels (B, C, size, size)."""
        normalize = self.transforms[-1]
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (normalize.mean, normalize.std))
        images = v2.functional.to_dtype(levels, torch.float32, scale=True)
        return (images - mean if images is levels else images.sub_(mean)).div_(std)

    def __repr__(self) -> str:
        text = "\n".join([f"{self.name}(", *(f"  {step}" for step in self.transforms), ")"])
        text = re.sub(r"InterpolationMode\.(\w+)", lambda mode: mode[1].lower(), text)
        return re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.4g}", text)


def imagenet_train(preprocessing: Preprocessing) -> v2.Compose:
    """Cut a random region, mirror it half of the time: the usual augmentation for photographs.

    Args:
        preprocessing: Size, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Source: Szegedy et al. 2015, "Going deeper with convolutions", §6; torchvision ``ClassificationPresetTrain``.

    Example:
        >>> from PIL import Image
        >>> imagenet_train(Preprocessing(size=24, resize_size=28))(Image.new("RGB", (40, 30))).shape
        torch.Size([3, 24, 24])
    """
    steps = _random_crop_and_flip(preprocessing)
    return _Preset("imagenet_train", preprocessing, steps, least_side=_side_for_crops(preprocessing))


def imagenet_eval(preprocessing: Preprocessing) -> v2.Compose:
    """Resize and cut the centre, or squeeze or border the picture, as the preprocessing says; nothing random.

    Args:
        preprocessing: Size, crop, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Source: equals torchvision's ``ImageClassification`` preset, ``weights.transforms()``.

    Example:
        >>> imagenet_eval(Preprocessing(size=224, resize_size=256))
        imagenet_eval(
          Resize(size=[256], interpolation=bilinear, antialias=True)
          CenterCrop(size=(224, 224))
          PILToTensor()
          ToDtype(scale=True)
          Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], inplace=False)
        )
    """
    return _Preset(
        "imagenet_eval", preprocessing, _resize(preprocessing), random=False, least_side=2 * preprocessing.resize_size
    )


def cifar_train(preprocessing: Preprocessing, *, jitter: float = 0.0, rotation: float = 0.0) -> v2.Compose:
    """Shift by up to 4 pixels and mirror, for 32-pixel pictures; enlarge afterwards when the network wants more.

    Normalisation is the preprocessing's own, so pretrained weights get what they were trained on; a network trained
    from scratch takes :data:`CIFAR10_PREPROCESSING`, which carries CIFAR-10's statistics.

    Args:
        preprocessing: Size, interpolation, mean and std of the network's weights.
        jitter: Largest relative change of brightness, contrast and saturation, 0 or more; 0 leaves colours alone.
        rotation: Largest angle in degrees, 0 to 180; 0 leaves pictures level.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Raises:
        SettingError: ``jitter`` or ``rotation`` is outside its range, or ``jitter`` is asked of 2 channels.

    Source: He et al. 2016, "Deep residual learning for image recognition", §4.2.

    Example:
        >>> from PIL import Image
        >>> cifar_train(CIFAR10_PREPROCESSING)(Image.new("RGB", (32, 32))).shape
        torch.Size([3, 32, 32])
    """
    check_number("jitter", jitter, at_least=0)
    check_number("rotation", rotation, at_least=0, at_most=180)
    steps = [
        *_to_32_pixels(preprocessing),
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        *([_on_colours(v2.ColorJitter(jitter, jitter, jitter), preprocessing)] if jitter else []),
        *([v2.RandomRotation(rotation, interpolation=InterpolationMode.BILINEAR)] if rotation else []),
        *_from_32_pixels(preprocessing),
    ]
    return _Preset("cifar_train", preprocessing, steps, least_side=2 * 32)


def cifar_eval(preprocessing: Preprocessing) -> v2.Compose:
    """Bring a picture to 32 pixels, then to the network's size as :func:`cifar_train` does; nothing random.

    Normalisation is the preprocessing's own; see :func:`cifar_train` and :data:`CIFAR10_PREPROCESSING`.

    Args:
        preprocessing: Size, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Source: He et al. 2016, "Deep residual learning for image recognition", §4.2.

    Example:
        >>> from PIL import Image
        >>> cifar_eval(Preprocessing(size=64, resize_size=64))(Image.new("RGB", (32, 32))).shape
        torch.Size([3, 64, 64])
    """
    steps = [*_to_32_pixels(preprocessing), *_from_32_pixels(preprocessing)]
    return _Preset("cifar_eval", preprocessing, steps, random=False, least_side=2 * 32)


def light(preprocessing: Preprocessing) -> v2.Compose:
    """Cut at least half of the picture, mirror it half of the time: gentle, for small data sets.

    Args:
        preprocessing: Size, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Source: :func:`imagenet_train` with ``scale=(0.5, 1)``, so that the object seldom leaves the picture.

    Example:
        >>> from PIL import Image
        >>> light(Preprocessing(size=24, resize_size=28))(Image.new("RGB", (40, 30))).shape
        torch.Size([3, 24, 24])
    """
    steps = _random_crop_and_flip(preprocessing, smallest=0.5)
    return _Preset("light", preprocessing, steps, least_side=_side_for_crops(preprocessing, smallest=0.5))


def trivial_augment(preprocessing: Preprocessing) -> v2.Compose:
    """Cut a random region, mirror, then apply one random change of colour or geometry: strong augmentation.

    Args:
        preprocessing: Size, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Raises:
        SettingError: The preprocessing has 2 channels, which have no colours to change.

    Source: Müller & Hutter 2021, "TrivialAugment"; torchvision ``TrivialAugmentWide``.

    Example:
        >>> from PIL import Image
        >>> trivial_augment(Preprocessing(size=24, resize_size=28))(Image.new("RGB", (40, 30))).shape
        torch.Size([3, 24, 24])
    """
    _check_colours(preprocessing)
    kind = v2.TrivialAugmentWide if preprocessing.channels in (1, 3) else TrivialAugment
    # Tensors cannot be turned or sheared bicubically.
    change = kind(interpolation=InterpolationMode.BILINEAR)
    steps = [*_random_crop_and_flip(preprocessing), change]
    return _Preset("trivial_augment", preprocessing, steps, least_side=_side_for_crops(preprocessing))


def none(preprocessing: Preprocessing) -> v2.Compose:
    """Train on what evaluation sees: :func:`imagenet_eval`, no augmentation.

    Args:
        preprocessing: Size, crop, interpolation, mean and std of the network's weights.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Source: torchvision's ``ImageClassification`` preset.

    Example:
        >>> none(Preprocessing()).name
        'imagenet_eval'
    """
    return imagenet_eval(preprocessing)


TRAIN_PRESETS: Mapping[str, Callable[[Preprocessing], Transform]] = {
    "imagenet": imagenet_train,
    "cifar": cifar_train,
    "light": light,
    "trivial_augment": trivial_augment,
    "none": none,
}
EVAL_PRESETS: Mapping[str, Callable[[Preprocessing], Transform]] = {"imagenet": imagenet_eval, "cifar": cifar_eval}


def train_transform(preset: str | Transform, preprocessing: Preprocessing) -> Transform:
    """Find the training transform of a name; a callable is returned as it is.

    Args:
        preset: A key of :data:`TRAIN_PRESETS`, or a callable from a picture to a tensor (C, size, size).
        preprocessing: What the network's weights expect; unused when ``preset`` is a callable.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised.

    Raises:
        SettingError: No preset has this name.

    Source: :data:`TRAIN_PRESETS`.

    Example:
        >>> train_transform("light", Preprocessing()).name
        'light'
    """
    return _preset("train", preset, TRAIN_PRESETS)(preprocessing) if isinstance(preset, str) else preset


def eval_transform(preset: str, preprocessing: Preprocessing) -> Transform:
    """Find the evaluation transform of a name; validation, prediction and a loaded model all use this one.

    Args:
        preset: A key of :data:`EVAL_PRESETS`, as a saved model's ``config.json`` stores it.
        preprocessing: What the network's weights expect.

    Returns:
        A transform from a picture to a float32 tensor (C, size, size), normalised; the two arguments alone decide it.

    Raises:
        SettingError: No preset has this name.

    Source: :data:`EVAL_PRESETS`.

    Example:
        >>> eval_transform("imagnet", Preprocessing())
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: no eval transform named 'imagnet'; there are imagenet, cifar — did you ...
    """
    return _preset("eval", preset, EVAL_PRESETS)(preprocessing)


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Undo the normalisation, to show network input as pictures again.

    Args:
        images: (C, H, W) or (B, C, H, W) float, normalised.
        preprocessing: The one the images were normalised with.

    Returns:
        The same shape, float32 in [0, 1], clamped.

    Raises:
        SettingError: The images do not have one channel per value of ``preprocessing.mean``.

    Source: the inverse of torchvision ``v2.Normalize``.

    Example:
        >>> denormalize(torch.zeros(3, 1, 1), Preprocessing()).flatten()
        tensor([0.4850, 0.4560, 0.4060])
    """
    channels = preprocessing.channels
    if images.ndim not in (3, 4) or images.shape[-3] != channels:
        raise SettingError(
            f"images have shape {tuple(images.shape)}; give ({channels}, H, W) or (B, {channels}, H, W), "
            "as the preprocessing's mean has one value per channel"
        )
    mean, std = (
        images.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std)
    )
    return (images.float() * std + mean).clamp(0, 1)


def is_preset(transform: Transform) -> bool:
    """Whether a transform is one of this module's, so that its text says all that it does.

    Example:
        >>> is_preset(light(Preprocessing())), is_preset(v2.PILToTensor())
        (True, False)
    """
    return isinstance(transform, _Preset)


def _preset(
    kind: str, name: str, presets: Mapping[str, Callable[[Preprocessing], Transform]]
) -> Callable[[Preprocessing], Transform]:
    if name not in presets:
        raise SettingError(
            f"no {kind} transform named {name!r}; there are {', '.join(presets)}{closest(name, presets)}"
        )
    return presets[name]


def _random_crop_and_flip(preprocessing: Preprocessing, *, smallest: float = 0.08) -> list[nn.Module]:
    interpolation = InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(preprocessing.size, scale=(smallest, 1.0), interpolation=interpolation, antialias=True)
    return [crop, v2.RandomHorizontalFlip()]


def _side_for_crops(preprocessing: Preprocessing, *, smallest: float = 0.08) -> int:
    """Return twice the side that makes the smallest and narrowest crop (3:4) as large as the network's input."""
    return math.ceil(2 * preprocessing.size / math.sqrt(smallest * 3 / 4))


def _on_colours(change: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    _check_colours(preprocessing)
    return change if preprocessing.channels in (1, 3) else OnColours(change)


def _check_colours(preprocessing: Preprocessing) -> None:
    if preprocessing.channels == 2:
        raise SettingError("2 channels have no colours to change; choose the transform light, which changes none")


def _resize(preprocessing: Preprocessing) -> list[nn.Module]:
    size, resize_size = preprocessing.size, preprocessing.resize_size
    if preprocessing.crop == "squash":
        squeeze = _resize_to((resize_size, resize_size), preprocessing)
        return [squeeze, *([] if size == resize_size else [v2.CenterCrop(size)])]
    if preprocessing.crop == "border":
        interpolation = InterpolationMode(preprocessing.interpolation)
        longest = v2.Resize(None, max_size=resize_size, interpolation=interpolation, antialias=True)
        return [longest, PadToSquare(size, preprocessing.mean)]
    return [_resize_to(resize_size, preprocessing), v2.CenterCrop(size)]


def _to_32_pixels(preprocessing: Preprocessing) -> list[nn.Module]:
    return [_resize_to(32, preprocessing), v2.CenterCrop(32)]


def _from_32_pixels(preprocessing: Preprocessing) -> list[nn.Module]:
    size = preprocessing.size
    return [] if size == 32 else [_resize_to((size, size), preprocessing)]


def _resize_to(size: int | tuple[int, int], preprocessing: Preprocessing) -> nn.Module:
    """A number is the shorter side, a pair is height and width."""
    interpolation = InterpolationMode(preprocessing.interpolation)
    resize: nn.Module = v2.Resize(size, interpolation=interpolation, antialias=True)
    return resize
