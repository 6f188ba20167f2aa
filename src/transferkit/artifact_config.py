"""What the ``config.json`` of a saved model may say: every field with its kind and range.

It may come from strangers, so it is checked as a whole before anything is built from it. :data:`SCHEMA` is made of
rules: functions that take a value and its place in the file, and raise ``ValueError`` with a sentence about it.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from transferkit.backbones import StemChange
from transferkit.exceptions import ArtifactError
from transferkit.heads import Head
from transferkit.preprocessing import Preprocessing
from transferkit.ranges import LARGEST_SIDE, MOST_CHANNELS, MOST_UNITS
from transferkit.transforms import EVAL_PRESETS

__all__ = ["FORMAT", "SCHEMA", "ArtifactConfig", "sealed"]

FORMAT = 2
"""Format 1 lacks the two checksums."""

_SEALS = ("weights_sha256", "config_sha256")
_LONGEST_NAME = 10_000  # characters, of a class
_LARGEST_WINDOW = 1_000  # pixels
_MOST_LAYERS = 100
_LARGEST_STATISTIC = 1e6

Rule = Callable[[Any, str], None]


def _refuse(value: object, place: str, wanted: str) -> NoReturn:
    raise ValueError(f"{place} is {reprlib.repr(value)}, and must be {wanted}")


def _whole(low: int, high: int) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(value, place, f"a whole number from {low:,} to {high:,}")

    return check


def _number(low: float, high: float) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            _refuse(value, place, f"a number from {low:,} to {high:,}")

    return check


def _flag(value: Any, place: str) -> None:
    if type(value) is not bool:
        _refuse(value, place, "true or false")


def _text(longest: int) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not str or len(value) > longest:
            _refuse(value, place, f"a text of {longest:,} characters at most")

    return check


def _one_of(*known: str) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not str or value not in known:
            _refuse(value, place, " or ".join(map(repr, known)))

    return check


def _like(pattern: str, wanted: str) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not str or len(value) > 300 or not re.fullmatch(pattern, value):
            _refuse(value, place, wanted)

    return check


def _or_null(rule: Rule) -> Rule:
    def check(value: Any, place: str) -> None:
        if value is not None:
            rule(value, place)

    return check


def _list(rule: Rule, least: int, most: int) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not list or not least <= len(value) <= most:
            _refuse(value, place, f"a list of {least:,} to {most:,} values")
        for index, each in enumerate(value):
            rule(each, f"{place}[{index}]")

    return check


def _fields(required: Mapping[str, Rule], optional: Mapping[str, Rule]) -> Rule:
    def check(value: Any, place: str) -> None:
        if type(value) is not dict:
            _refuse(value, place or "it", "an object")
        if unknown := sorted(value.keys() - required.keys() - optional.keys()):
            raise ValueError(f"{place or 'it'} has fields that no saved model has: {_listed(unknown)}")
        if missing := sorted(required.keys() - value.keys()):
            raise ValueError(f"{place or 'it'} lacks {_listed(missing)}")
        for name, each in value.items():
            (required.get(name) or optional[name])(each, f"{place}.{name}".lstrip("."))

    return check


def _object(value: Any, place: str) -> None:
    if type(value) is not dict:
        _refuse(value, place, "an object")


def _listed(names: list[str]) -> str:
    return ", ".join(map(reprlib.repr, names[:3])) + (", …" if len(names) > 3 else "")


_LAYER = _like(r"[^\s./\\]+(\.[^\s./\\]+)*", "the dotted name of a layer")
_WINDOW = _or_null(_list(_whole(0, _LARGEST_WINDOW), 3, 3))
_STATISTICS = _list(_number(-_LARGEST_STATISTIC, _LARGEST_STATISTIC), 1, MOST_CHANNELS)
_DIGEST = _like("[0-9a-f]{64}", "64 hexadecimal digits")
_CLASS_NAMES = _list(_text(_LONGEST_NAME), 1, MOST_UNITS)

# What the adapters note down. timm takes more, some of which read files and reach for the network.
_ARGUMENTS: dict[str, Rule] = {
    "aux_logits": _flag,
    "image_size": _whole(1, LARGEST_SIDE),
    "img_size": _whole(1, LARGEST_SIDE),
    "in_chans": _whole(1, MOST_CHANNELS),
    "patch_size": _whole(1, _LARGEST_WINDOW),
    "transform_input": _flag,
    "window_size": _whole(1, _LARGEST_WINDOW),
}

_OWN: dict[str, Rule] = {
    "format": _whole(1, FORMAT),
    "backbone": _like(
        r"(torchvision|timm)/[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?|module/\w+",
        "torchvision/NAME, timm/NAME, timm/NAME.TAG or module/CLASS",
    ),
    "weights": _or_null(_text(_LONGEST_NAME)),
    "class_names": _CLASS_NAMES,
    "preprocessing": _fields(
        {
            "size": _whole(1, LARGEST_SIDE),
            "resize_size": _whole(1, 4 * LARGEST_SIDE),
            "mean": _STATISTICS,
            "std": _STATISTICS,
            "interpolation": _one_of("nearest", "bilinear", "bicubic"),
            "crop": _one_of("center", "squash", "border"),
        },
        {},
    ),
    "eval_transform": _one_of(*EVAL_PRESETS),
    "head": _fields(
        {
            "paths": _list(_LAYER, 1, _MOST_LAYERS),
            "dropout": _number(0, 1),
            "hidden_size": _or_null(_whole(1, MOST_UNITS)),
        },
        {"aux_paths": _list(_LAYER, 0, _MOST_LAYERS), "aux_weight": _number(0, 1_000)},
    ),
    "arguments": _fields({}, _ARGUMENTS),
}

SCHEMA: Rule = _fields(
    {
        "architecture": _text(_LONGEST_NAME),
        "num_classes": _whole(1, MOST_UNITS),
        "num_features": _whole(1, 2**24),
        "label_names": _CLASS_NAMES,
        "model_args": _object,
        "pretrained_cfg": _object,
        "transferkit": _fields(
            _OWN,
            {
                "native": _flag,
                "temperature": _number(1e-3, 1e3),
                "small_images": _one_of("upsample", "stem"),
                "stem": _list(_fields({"path": _LAYER, "before": _WINDOW, "after": _WINDOW}, {}), 0, _MOST_LAYERS),
                "versions": _object,
                **dict.fromkeys(_SEALS, _DIGEST),
            },
        ),
    },
    {"run": _object},
)
"""The rule for the whole file; timm reads ``model_args`` and ``pretrained_cfg``, people ``run`` and ``versions``."""


@dataclass(frozen=True)
class ArtifactConfig:
    """What a saved model is rebuilt from.

    Attributes:
        backbone: ``"torchvision/resnet18"``, ``"timm/convnext_atto"`` or ``"module/ClassName"``.
        weights: What the network was trained from, in words.
        class_names: One name per class.
        preprocessing: How pictures are prepared.
        eval_transform: Name of the transform that prepares them for evaluation.
        head: The shape of the head.
        head_paths: Dotted names of the classification layers.
        aux_paths: Dotted names of the auxiliary ones.
        aux_weight: Weight of each auxiliary loss.
        arguments: Keyword arguments beyond the class count that the native builder needs.
        small_images: ``"stem"`` where the network was adapted to small pictures, else ``"upsample"``.
        stem: The layers that were changed for them.
        temperature: What logits are divided by before they become confidences.
        weights_sha256: Checksum of the file of weights; ``None`` in format 1.

    Example:
        >>> ArtifactConfig.from_dict({"transferkit": {"format": 3}})
        Traceback (most recent call last):
        transferkit.exceptions.ArtifactError: it has format 3; this version reads up to 2: upgrade transferkit
    """

    backbone: str
    weights: str | None
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    eval_transform: str
    head: Head
    head_paths: tuple[str, ...]
    aux_paths: tuple[str, ...]
    aux_weight: float
    arguments: dict[str, Any]
    small_images: str
    stem: tuple[StemChange, ...]
    temperature: float
    weights_sha256: str | None

    @classmethod
    def from_dict(cls, config: Any) -> Self:
        """Check the content of a ``config.json``, and take from it what a model is rebuilt from.

        Args:
            config: What the file holds.

        Raises:
            ArtifactError: It is of a newer format, a field is missing, unknown or outside its range, fields contradict
                each other, or something was changed since it was written.
        """
        own = config.get("transferkit") if isinstance(config, dict) else None
        stated = own.get("format") if isinstance(own, dict) else None
        if type(stated) is int and stated > FORMAT:
            raise ArtifactError(f"it has format {stated:,}; this version reads up to {FORMAT}: upgrade transferkit")
        try:
            SCHEMA(config, "")
            _check_agreement(config)
            own, head = config["transferkit"], config["transferkit"]["head"]
            names = tuple(own["class_names"])
            return cls(
                backbone=own["backbone"],
                weights=own["weights"],
                class_names=names,
                preprocessing=Preprocessing.from_dict(own["preprocessing"]),
                eval_transform=own["eval_transform"],
                head=Head(len(names), dropout=head["dropout"], hidden_size=head["hidden_size"]),
                head_paths=tuple(head["paths"]),
                aux_paths=tuple(head.get("aux_paths", ())),
                aux_weight=head.get("aux_weight", 0.0),
                arguments=own["arguments"],
                small_images=own.get("small_images", "upsample"),
                stem=tuple(map(StemChange.from_dict, own.get("stem", ()))),
                temperature=own.get("temperature", 1.0),
                weights_sha256=own.get("weights_sha256"),
            )
        except (ValueError, RecursionError) as error:
            raise ArtifactError(str(error)) from error


def _check_agreement(config: Mapping[str, Any]) -> None:
    own = config["transferkit"]
    names = own["class_names"]
    if len(set(names)) < len(names):
        raise ValueError("transferkit.class_names has a name twice")
    if config["label_names"] != names or config["num_classes"] != len(names):
        raise ValueError("num_classes, label_names and transferkit.class_names disagree")
    sealing = [name for name in _SEALS if name in own]
    if own["format"] > 1 and len(sealing) < len(_SEALS):
        raise ValueError(f"transferkit lacks {_listed([name for name in _SEALS if name not in sealing])}")
    if own["format"] > 1 and own["config_sha256"] != _digest(config):
        raise ValueError("it is not as it was written: its checksum differs; copy the folder again")


def sealed(config: dict[str, Any], *, weights_sha256: str | None = None) -> dict[str, Any]:
    """Return a config with the checksums of the weights and of itself.

    Args:
        config: JSON values, as they come back from a file.
        weights_sha256: SHA-256 of the file of weights, in hexadecimal; ``None`` for the one that is in the config.

    Source: SHA-256 of the JSON with sorted keys and without spaces, the checksum left out.

    Example:
        >>> list(sealed({"transferkit": {"format": 2}}, weights_sha256=64 * "0")["transferkit"])
        ['format', 'weights_sha256', 'config_sha256']
    """
    own = dict(config["transferkit"])
    if weights_sha256 is not None:
        own["weights_sha256"] = weights_sha256
    return {**config, "transferkit": {**own, "config_sha256": _digest({**config, "transferkit": own})}}


def _digest(config: Mapping[str, Any]) -> str:
    own = {name: value for name, value in config["transferkit"].items() if name != "config_sha256"}
    text = json.dumps({**config, "transferkit": own}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
