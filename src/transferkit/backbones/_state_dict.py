"""Reading a state dict out of a checkpoint of whatever making."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transferkit.backbones._torch_file import check_torch_file
from transferkit.exceptions import WeightsError, one_line
from transferkit.plain_files import check_safetensors

__all__ = ["UNREADABLE", "StateDict", "read_state_dict"]

logger = logging.getLogger("transferkit")

UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
"""What a failed download, a damaged file and a pickle that carries code raise."""

# Averaged weights first, as timm and the authors of DINO evaluate them; the last three are VISSL's.
_WRAPPERS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "student"),
    *("backbone", "encoder", "classy_state_dict", "base_model", "trunk"),
)
_DEEPEST = 5
_MOST_TENSORS, _LONGEST_NAME, _MOST_DOTS = 20_000, 300, 30
_MORE_THAN_STORED = 512 * 2**20  # bytes; a tensor may repeat what is stored once


class StateDict(dict[str, Tensor]):
    """Tensors by key, and where in its file they lay.

    Args:
        tensors: Tensors by key.
        wrapper: The keys that led to them, ``"state_dict_ema"`` or ``"model.state_dict"``; ``""`` at the file's top.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, wrapper: str = "") -> None:
        """Take the tensors over."""
        super().__init__(tensors)
        self.wrapper = wrapper


def read_state_dict(path: str | Path) -> StateDict:
    """Read the weights out of a local file without ever running a pickle's code.

    A training checkpoint may hold anything else beside them. Where it holds several sets, averaged weights
    (``state_dict_ema``, ``model_ema``, ``teacher``) come before plain ones, and the log says so.

    Args:
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote (``.pth``, ``.pt``, ``.th``, ``.bin`` …), with a
            state dict at its top or under ``state_dict``, ``model``, ``teacher``, ``ema`` and the like, also nested.

    Returns:
        Tensors by key, on the CPU, keys as in the file; ``wrapper`` says where they lay.

    Raises:
        WeightsError: The file is missing, unreadable, would run code or fill the memory, or holds no state dict.

    Source: timm ``load_state_dict`` for the order of preference.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": nn.Linear(2, 1).state_dict(), "epoch": 3}, f"{folder}/checkpoint.pth")
        ...     state = read_state_dict(f"{folder}/checkpoint.pth")
        >>> sorted(state), state.wrapper
        (['bias', 'weight'], 'model')
    """
    file = Path(path)
    found = _unwrap(content := _read(file), set())
    if found is None:
        what = type(content).__name__
        if isinstance(content, Mapping) and content:
            keys = [reprlib.repr(key) for key in content]
            what += f" with {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}"
        raise WeightsError(
            f"{file} holds a {what}, not a state dict of tensors by name, nor one under state_dict, model, teacher, "
            "ema or the like; save one with torch.save(network.state_dict(), path)"
        )
    _check(found.tensors, file)
    if found.passed_over:
        logger.info("%s: the weights under %r are taken, not %s", file, found.path[0], ", ".join(found.passed_over))
    return StateDict(found.tensors, wrapper=".".join(found.path))


def _read(file: Path) -> Any:
    """Return what a file holds."""
    if not file.is_file():
        what = "it is no plain file" if file.exists() else "check the path"
        what = "it is a folder, name the file in it" if file.is_dir() else what
        raise WeightsError(f"no weights file at {file}; {what}")
    if not file.stat().st_size:
        raise WeightsError(f"{file} cannot be read as a state dict (it is empty); copy or download it again")
    try:
        if file.suffix == ".safetensors":
            check_safetensors(file)
            return load_file(file)
        check_torch_file(file)
        # A training script's options, which many authors save along; a Namespace only stores attributes.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on files that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file or a pickle raises
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed:
            reason = f"it wants to run {one_line(needed[1], longest=100)}, and code from a file is never run"
            advice = "where you trust the file, save its tensors alone with torch.save(network.state_dict(), path)"
        else:
            reason = one_line((str(error).splitlines() or [""])[0], longest=160) or type(error).__name__
            advice = "if it is damaged or cut short, copy or download it again, else save one with "
            advice += "torch.save(network.state_dict(), path) or safetensors"
        raise WeightsError(f"{file} cannot be read as a state dict ({reason}); {advice}") from error


def _check(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse what no network's state dict has, and what would take much more memory than the file."""
    if len(tensors) > _MOST_TENSORS:
        raise WeightsError(f"{file} holds {len(tensors):,} tensors; a state dict has {_MOST_TENSORS:,} at most")
    for key, value in tensors.items():
        if len(key) > _LONGEST_NAME or key.count(".") > _MOST_DOTS or not key.isprintable():
            raise WeightsError(
                f"{file} holds {reprlib.repr(key)}, which names no tensor of a network: a name has {_LONGEST_NAME} "
                f"characters at most, {_MOST_DOTS} dots at most, and no control characters"
            )
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise WeightsError(f"{file} holds {key} as something else than a dense tensor; save it as one")
    size = file.stat().st_size
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if sum(stored.values()) > size or claimed > 2 * size + _MORE_THAN_STORED:
        raise WeightsError(f"{file} has {size:,} bytes, and its tensors claim {claimed:,}; copy or download it again")


class _Found(NamedTuple):
    path: tuple[str, ...]
    passed_over: tuple[str, ...]
    tensors: dict[str, Tensor]


def _unwrap(content: Any, seen: set[int], depth: int = 0) -> _Found | None:
    """Return the preferred state dict inside a checkpoint; ``None`` where there is none."""
    if not isinstance(content, Mapping) or depth > _DEEPEST or id(content) in seen:
        return None
    seen.add(id(content))  # one that is reached on many ways is looked at on the first
    wrapped = {name: _unwrap(content.get(name), seen, depth + 1) for name in _WRAPPERS}
    found = {name: each for name, each in wrapped.items() if each is not None}
    if found:
        # An averaging helper's own few numbers are no weights.
        most = max(len(each.tensors) for each in found.values())
        name = next(name for name, each in found.items() if 2 * len(each.tensors) >= most)
        passed_over = (*(other for other in found if other != name), *found[name].passed_over)
        return _Found((name, *found[name].path), passed_over, found[name].tensors)
    if any(isinstance(value, Mapping) for value in content.values()):
        return None
    tensors = {
        str(key): value.detach()
        for key, value in content.items()
        if isinstance(value, Tensor) and isinstance(key, str | int)
    }
    return _Found((), (), tensors) if tensors else None
