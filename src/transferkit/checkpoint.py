"""What a trained model is saved as: ``model.safetensors``, ``config.json`` and, after a run, ``history.csv``.

The tensors have the native library's keys, and ``config.json`` is one that ``timm.create_model("local-dir:…")`` reads.
Loading builds the network with random weights and fills them in: it downloads nothing and unpickles nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transferkit.backbones import Backbone, StemChange, build_network, change_channels, change_stem
from transferkit.exceptions import ArtifactError, OutputError
from transferkit.heads import Head
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import eval_transform

__all__ = [
    "CONFIG",
    "HISTORY",
    "WEIGHTS",
    "load_artifact",
    "load_weights",
    "read_config",
    "read_weights",
    "save_artifact",
]

WEIGHTS, CONFIG, HISTORY = "model.safetensors", "config.json", "history.csv"
_FORMAT = 1
_KEYS = ("arguments", "backbone", "eval_transform", "head", "preprocessing", "weights")
# What the adapters note down. Others are refused: timm takes ones that read files and reach for the network.
_ARGUMENTS = {"aux_logits", "image_size", "img_size", "in_chans", "patch_size", "transform_input", "window_size"}


def save_artifact(
    model: TransferModel,
    directory: str | os.PathLike[str],
    *,
    extra: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model so that transferkit, and where it is native its own library, can open it.

    Both files are written beside their places and moved there when they are whole.

    Args:
        model: What to save.
        directory: Folder to write into; made if missing.
        extra: More JSON values to keep under ``"run"`` in ``config.json``.
        weights: The network's tensors by native key, where the model does not hold them whole; ``None`` for its own.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written.

    Source: timm ``save_for_hf`` for the layout of ``config.json``.
    """
    folder = Path(directory)
    text = json.dumps(_config(model, extra), indent=2, ensure_ascii=False) + "\n"
    partials = {folder / f".{name}.partial": folder / name for name in (WEIGHTS, CONFIG)}
    tensors, config = partials
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(_separate(weights or model.network.state_dict()), tensors, metadata={"format": "pt"})
            config.write_text(text, encoding="utf-8")
            shutil.copymode(config, tensors)  # safetensors lets nobody else read its files
            for partial, target in partials.items():
                with partial.open("rb") as file:
                    os.fsync(file.fileno())  # a power cut must not leave the name without what it names
                partial.replace(target)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the model cannot be saved in {folder}: {error}") from error
    return folder


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, so tied weights are written twice.
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _config(model: TransferModel, extra: dict[str, Any] | None) -> dict[str, Any]:
    library, _, architecture = model.name.partition("/")
    preprocessing = model.preprocessing
    # timm builds for any number of channels by itself; torchvision's networks take three.
    buildable = library == "timm" or (library == "torchvision" and preprocessing.channels == 3)
    native = buildable and model.head.plain and not model.stem
    return {
        "architecture": architecture,
        "num_classes": len(model.class_names),
        "num_features": model.num_features,
        "label_names": list(model.class_names),
        "model_args": model.arguments,
        "pretrained_cfg": {
            "num_classes": len(model.class_names),
            "input_size": [len(preprocessing.mean), preprocessing.size, preprocessing.size],
            "fixed_input_size": "img_size" in model.arguments,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.size / preprocessing.resize_size,
            "crop_mode": preprocessing.crop,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "classifier": model.head_paths[0] if len(model.head_paths) == 1 else list(model.head_paths),
        },
        "transferkit": {
            "format": _FORMAT,
            "backbone": model.name,
            "weights": model.weights,
            "native": native,
            "class_names": list(model.class_names),
            "preprocessing": preprocessing.to_dict(),
            "eval_transform": model.eval_preset,
            "head": {
                "paths": list(model.head_paths),
                "dropout": model.head.dropout,
                "hidden_size": model.head.hidden_size,
                "aux_paths": list(model.aux_paths),
                "aux_weight": model.aux_weight,
            },
            "arguments": model.arguments,
            "small_images": model.small_images,
            "stem": [change.to_dict() for change in model.stem],
            "versions": {name: version(name) for name in ("transferkit", "torch", "torchvision", "timm")},
        },
        **({"run": extra} if extra else {}),
    }


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the ``config.json`` of a saved model.

    Raises:
        ArtifactError: The folder holds no saved model, or one that this version cannot read.
    """
    file = Path(directory) / CONFIG
    if not file.is_file():
        raise ArtifactError(f"{directory} holds no saved model: there is no {CONFIG} in it")
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        own = config["transferkit"]
        newer = own["format"] > _FORMAT
        names = own["class_names"]
        complete = isinstance(names, list) and all(isinstance(name, str) for name in names) and bool(names)
        missing = [key for key in _KEYS if key not in own]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no config of a model saved by transferkit ({error!r})") from error
    if newer:
        raise ArtifactError(
            f"{file} has format {own['format']}; this version reads up to {_FORMAT}: upgrade transferkit"
        )
    if not complete:
        raise ArtifactError(f"{file} names no classes")
    if missing:
        raise ArtifactError(f"{file} is damaged: it lacks {', '.join(missing)}")
    return dict(config)


def load_artifact(directory: str | os.PathLike[str], *, network: nn.Module | None = None) -> TransferModel:
    """Open a saved model, in eval mode.

    Args:
        directory: Folder that :func:`save_artifact` wrote.
        network: For a model made from a module of your own: that module, built again, with its original head.

    Raises:
        ArtifactError: The folder holds no saved model, its files do not belong together, or ``network`` is missing.
    """
    config = read_config(directory)["transferkit"]
    names = tuple(config["class_names"])
    try:
        name, head_paths = config["backbone"], tuple(config["head"]["paths"])
        head = Head(len(names), dropout=config["head"]["dropout"], hidden_size=config["head"]["hidden_size"])
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        eval_transform(config["eval_transform"], preprocessing)
        arguments = dict(config["arguments"])
        stem = tuple(map(StemChange.from_dict, config.get("stem", ())))
        if unknown := sorted(arguments.keys() - _ARGUMENTS):
            raise ArtifactError(f"{directory} has arguments that no saved model has ({', '.join(unknown)})")
        if network is None and name.startswith("module/"):
            raise ArtifactError(
                f"{directory} was made from a module of your own ({name.removeprefix('module/')}); "
                "build it again and pass it as network="
            )
        with torch.random.fork_rng(devices=[]):
            if network is None:
                network = build_network(name, num_classes=len(names), arguments=arguments)
                if preprocessing.channels != 3 and "in_chans" not in arguments:
                    change_channels(network, preprocessing.channels)
                change_stem(network, stem)
            backbone = Backbone(
                name,
                network,
                head_paths,
                preprocessing,
                config["weights"],
                arguments,
                small_images=config.get("small_images", "upsample"),
                stem=stem,
                aux_paths=tuple(config["head"].get("aux_paths", ())),
                aux_weight=config["head"].get("aux_weight", 0.0),
            )
            model = TransferModel(backbone, class_names=names, head=head)
        model.eval_preset = config["eval_transform"]
    except ArtifactError:
        raise
    except Exception as error:  # whatever two libraries raise when they are built from a damaged config
        raise ArtifactError(f"the model in {directory} cannot be rebuilt: {_one_line(error)}") from error
    load_weights(model, directory)
    return model.eval()


def load_weights(model: TransferModel, directory: str | os.PathLike[str]) -> None:
    """Fill a model of the same architecture with the weights of a saved one.

    Raises:
        ArtifactError: The file is missing, damaged, or does not fit.
    """
    tensors = read_weights(directory)
    try:
        model.network.load_state_dict(tensors)
    except RuntimeError as error:
        raise _unfit(directory, error) from error


def read_weights(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a saved model by native key.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        return load_file(Path(directory) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unfit(directory, error) from error


def _unfit(directory: str | os.PathLike[str], error: Exception) -> ArtifactError:
    return ArtifactError(f"{Path(directory) / WEIGHTS} does not hold the weights of this model: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
