"""What a trained model is saved as: ``model.safetensors``, ``config.json`` and, after a run, ``history.csv``.

The tensors have the native library's keys, and ``config.json`` is one that ``timm.create_model("local-dir:…")`` reads.
Loading takes both for a stranger's: it checks them as a whole, builds the network with random weights, and fills them
in. It downloads nothing and unpickles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transferkit.artifact_config import FORMAT, ArtifactConfig, sealed
from transferkit.exceptions import ArtifactError, OutputError, one_line
from transferkit.model import TransferModel
from transferkit.plain_files import check_plain, check_safetensors, read_json
from transferkit.rebuilding import build_model, build_native, check_fit, difference, not_rebuilt, unfit

__all__ = [
    "CONFIG",
    "HISTORY",
    "WEIGHTS",
    "load_artifact",
    "load_weights",
    "read_config",
    "read_weights",
    "save_artifact",
    "save_temperature",
]

WEIGHTS, CONFIG, HISTORY = "model.safetensors", "config.json", "history.csv"
_PARTIAL = ".partial"  # a folder, for safetensors makes temporary files of its own beside the one it writes
_LARGEST_CONFIG = 16 * 2**20  # bytes


def save_artifact(
    model: TransferModel,
    directory: str | os.PathLike[str],
    *,
    extra: dict[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model so that transferkit, and where it is native its own library, can open it.

    Both files are written beside their places and moved there when they are whole. A process that is killed at any
    instant leaves the model before or this one, and :func:`load_artifact` opens it.

    Args:
        model: What to save.
        directory: Folder to write into; made if missing.
        extra: More JSON values to keep under ``"run"`` in ``config.json``.
        weights: The network's tensors by native key, where the model does not hold them whole; ``None`` for its own.

    Returns:
        The folder.

    Raises:
        OutputError: The folder cannot be written, or the model has what no saved one may have.

    Source: timm ``save_for_hf`` for the layout of ``config.json``.
    """
    folder = Path(directory)
    config = json.loads(json.dumps(_config(model, extra)))  # as it will be read: lists for tuples, texts for keys
    partial = folder / _PARTIAL
    tensors, text = partial / WEIGHTS, partial / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target in (folder / WEIGHTS, folder / CONFIG):
            if target.is_dir():
                raise IsADirectoryError(f"there is a folder named {target.name} in it")
        _settle(folder)
        partial.mkdir()
        try:
            save_file(_separate(weights or model.network.state_dict()), tensors, metadata={"format": "pt"})
            text.write_bytes(_checked(sealed(config, weights_sha256=_sha256(tensors))))
            shutil.copymode(text, tensors)  # safetensors lets nobody else read its files
            for file in (tensors, text):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())  # a power cut must not leave the name without what it names
            tensors.replace(folder / WEIGHTS)
            text.replace(folder / CONFIG)
        finally:
            if tensors.exists() or not text.exists():  # else the weights were moved, and the config belongs to them
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError, ArtifactError) as error:
        raise OutputError(f"the model cannot be saved in {folder}: {error}") from error
    return folder


def _checked(config: dict[str, Any]) -> bytes:
    """Return the text of a config, which must be one that can be read again."""
    ArtifactConfig.from_dict(config)
    # A file name that is no UTF-8 has surrogates in it; so escaped, JSON reads them back.
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if len(content) > _LARGEST_CONFIG:
        raise ArtifactError(f"{CONFIG} would have {len(content):,} bytes, {_LARGEST_CONFIG:,} at most")
    return content


def _settle(folder: Path) -> None:
    """Finish a save that was killed after its weights were in their place; clear away one that was killed before."""
    partial = folder / _PARTIAL
    with suppress(ArtifactError, OSError):  # there may be nothing, or nothing whole
        if _read(partial / CONFIG)[1].weights_sha256 == _sha256(folder / WEIGHTS):
            (partial / CONFIG).replace(folder / CONFIG)
    if partial.exists():
        shutil.rmtree(partial)


def save_temperature(directory: str | os.PathLike[str], temperature: float) -> None:
    """Keep another temperature with a saved model; its weights and all else stay as they are.

    Args:
        directory: Folder that :func:`save_artifact` wrote.
        temperature: What its logits are divided by before they become confidences.

    Raises:
        ArtifactError: The folder holds no saved model.
        OutputError: The folder cannot be written, or no saved model may have such a temperature.
    """
    folder = Path(directory)
    partial = folder / _PARTIAL
    try:
        _settle(folder)
    except OSError as error:
        raise OutputError(f"the temperature cannot be saved in {folder}: {error}") from error
    config, found = _read(folder / CONFIG)  # not before: it may have been another's
    config["transferkit"] |= {"format": FORMAT, "temperature": temperature}
    try:
        partial.mkdir()
        try:
            digest = found.weights_sha256 or _sha256(folder / WEIGHTS)
            with (partial / CONFIG).open("wb") as file:
                file.write(_checked(sealed(config, weights_sha256=digest)))
                os.fsync(file.fileno())
            (partial / CONFIG).replace(folder / CONFIG)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, ArtifactError) as error:
        raise OutputError(f"the temperature cannot be saved in {folder}: {error}") from error


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
            "format": FORMAT,
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
            "temperature": model.temperature,
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
    return _read(Path(directory) / CONFIG)[0]


def _read(file: Path) -> tuple[dict[str, Any], ArtifactConfig]:
    if not os.path.lexists(file):
        raise ArtifactError(f"{file.parent} holds no saved model: there is no {CONFIG} in it")
    try:
        config: dict[str, Any] = read_json(file, largest=_LARGEST_CONFIG)
        return config, ArtifactConfig.from_dict(config)
    except (OSError, ValueError, ArtifactError) as error:
        raise ArtifactError(f"{file} is no config of a saved model: {one_line(error)}") from error


def load_artifact(directory: str | os.PathLike[str], *, network: nn.Module | None = None) -> TransferModel:
    """Open a saved model, in eval mode.

    Its files may come from strangers. The config is checked against a schema; the tensors' names, shapes and kinds
    against a network without values; then the checksums of both. Only then is the network built. A link, pipe or
    device in the place of a file is refused.

    Args:
        directory: Folder that :func:`save_artifact` wrote.
        network: For a model made from a module of your own: that module, built again, with its original head.

    Raises:
        ArtifactError: The folder holds no saved model, its files do not belong together, or ``network`` is missing.
    """
    folder = Path(directory)
    config, tensors = _opened(folder, is_rebuilt=network is None)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(config, build_native(config) if network is None else network)
    except Exception as error:  # whatever two libraries raise when they are built from a stranger's config
        raise not_rebuilt(folder, error) from error
    _fill(model, tensors, folder / WEIGHTS)
    return model.eval()


def load_weights(model: TransferModel, directory: str | os.PathLike[str]) -> None:
    """Fill a model of the same architecture with the weights of a saved one.

    Raises:
        ArtifactError: The file is missing, damaged, or does not fit.
    """
    _fill(model, read_weights(directory), Path(directory) / WEIGHTS)


def read_weights(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a saved model by native key.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    return _opened(Path(directory), is_rebuilt=False)[1]


def _opened(folder: Path, *, is_rebuilt: bool) -> tuple[ArtifactConfig, dict[str, Tensor]]:
    """Return the config and tensors that belong together."""
    try:
        return _pair(folder, CONFIG, is_rebuilt=is_rebuilt)
    except ArtifactError:
        if os.path.lexists(folder / _PARTIAL / CONFIG):  # a save may have been killed between its two moves
            with suppress(ArtifactError):
                return _pair(folder, f"{_PARTIAL}/{CONFIG}", is_rebuilt=is_rebuilt)
        raise


def _pair(folder: Path, name: str, *, is_rebuilt: bool) -> tuple[ArtifactConfig, dict[str, Tensor]]:
    config = _read(folder / name)[1]
    file = folder / WEIGHTS
    try:
        check_plain(file)
        check_safetensors(file)
        tensors = load_file(file)  # maps the file: nothing is read from the disk before it is used
    except Exception as error:  # whatever safetensors and torch raise for a file that is not ours
        raise unfit(file, error) from error
    if is_rebuilt:
        check_fit(config, tensors, file)
    if config.weights_sha256 is not None and config.weights_sha256 != _sha256(file):
        raise unfit(file, f"it is not the one that {name} was saved with, for its checksum differs; copy both again")
    return config, tensors


def _fill(model: TransferModel, tensors: Mapping[str, Tensor], file: Path) -> None:
    state = model.network.state_dict()  # with the versions of its modules, which torchvision's MNASNet asks for
    if problem := difference(state, tensors):
        raise unfit(file, problem)
    state.update(tensors)
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        raise unfit(file, error) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
