"""Where a run keeps what it would go on from: ``state.json`` and two files of tensors, in a folder of their own.

Every file is written elsewhere, forced to the disk and moved to its place, ``state.json`` last; what it no longer names
is removed after that. So a process that is killed at any instant leaves the old state or the new one, whole. Nothing is
pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from transferkit.exceptions import ArtifactError, OutputError, SettingError, TransferkitError, one_line
from transferkit.plain_files import check_plain, check_safetensors, read_json

__all__ = ["ResumeStore", "check_fields", "refuses_odd_content"]

_STATE = "state.json"
_FORMAT = 1
_TENSORS = re.compile(r"(state|constant)-([1-9][0-9]*)\.safetensors")
_PARTIAL = ".partial"  # a folder, for safetensors makes temporary files of its own beside the one it writes
_LARGEST_JSON = 32 * 2**20  # bytes; the tensors are not in it
_FIELDS = {"format": int, "version": str, "state": dict, "constant": dict}
_PART_FIELDS = {"file": str, "size": int, "crc32": int, "tree": dict}
_DEEPEST = 100  # json goes three times as deep, and neither it nor Python goes much beyond that
_ANEW = "start anew with overwrite=True (--overwrite)"


class ResumeStore:
    """The resume state of one run, on disk.

    Args:
        directory: Folder for it alone, written by one process at a time; :meth:`write` makes it.

    Source: Pillai et al. 2014, "All File Systems Are Not Created Equal", for the order of write, fsync and rename.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     store = ResumeStore(Path(place) / "resume")
        ...     store.write({"epoch": 3, 0: (torch.ones(2), math.inf)}, constant={"stem": torch.zeros(1)}, version="a")
        ...     store.read()
        ({'epoch': 3, 0: (tensor([1., 1.]), inf)}, {'stem': tensor([0.])})
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Store the path; nothing is touched yet."""
        self.path = Path(directory)

    def exists(self) -> bool:
        """Tell whether a state was ever written; :meth:`read` tells whether it can be used."""
        try:
            (self.path / _STATE).lstat()
        except OSError as error:
            return not isinstance(error, FileNotFoundError | NotADirectoryError)
        return True

    def write(self, state: Mapping[str, Any], *, constant: Mapping[str, Tensor], version: str) -> None:
        """Replace the state on disk; the new one has reached the disk when this returns.

        Args:
            state: Nested dict, list, tuple, str, int, float, bool, None and dense tensors of any shape, device and
                dtype that safetensors knows. Keys are str or int; other mappings become dicts.
            constant: Tensors by name that do not change while ``version`` stays the same. They are written with the
                first state of a version; later states refer to that file, also those of another process.
            version: Says which constant tensors these are.

        Raises:
            SettingError: There is something else in the state; the message names the place, and nothing was written.
            OutputError: The folder cannot be written, or the disk is full; the state before is kept.
        """
        if not isinstance(state, Mapping) or type(version) is not str:
            raise SettingError(
                f"a resume state is a dict with a str for its version, got {_kind(state)} and {_kind(version)}"
            )
        for name, tensor in constant.items():
            if type(name) is not str or not isinstance(tensor, Tensor):
                raise SettingError(f"constant takes tensors by name, got {_kind(tensor)} under {name!r}")
        parts: dict[str, tuple[Any, list[Tensor]]] = {}
        for part, content in (("state", state), ("constant", constant)):
            tensors: list[Tensor] = []
            parts[part] = _encode(content, () if part == "state" else (part,), tensors), tensors
        size = len(_dump([version, *(tree for tree, _ in parts.values())]))
        if size > _LARGEST_JSON:
            raise SettingError(
                f"the resume state takes {size:,} bytes beside its tensors, {_LARGEST_JSON:,} at most; put what is "
                "long into tensors"
            )
        try:
            self._replace(parts, version)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"the resume state cannot be written in {self.path}: {_cause(error)}") from error

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Read the state that was written last.

        Returns:
            The state and the constant tensors that :meth:`write` was given, equal to the bit: tuples are tuples and int
            keys ints. Tensors are contiguous, on the CPU, and share no memory. ``None`` when nothing was ever written.

        Raises:
            ArtifactError: A file is missing, damaged, foreign or of a newer format.
        """
        document = self._document()
        if document is None:
            return None
        try:
            state, constant = (self._load(document[part]) for part in ("state", "constant"))
            if not all(type(name) is str and isinstance(tensor, Tensor) for name, tensor in constant.items()):
                raise ValueError("its constant part holds more than tensors by name")
        except Exception as error:  # whatever safetensors and torch raise for a file that is not ours
            raise self._unusable(error) from error
        return state, constant

    def clear(self) -> None:
        """Remove every file of the store, and the folder if nothing else is in it.

        Raises:
            OutputError: A file cannot be removed.
        """
        if not self.path.is_dir():
            return
        try:
            (self.path / _STATE).unlink(missing_ok=True)  # first: what a broken-off clear leaves is no state
            self._remove_all_but(set())
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            raise OutputError(f"the resume state in {self.path} cannot be removed: {_cause(error)}") from error

    def _replace(self, parts: Mapping[str, tuple[Any, list[Tensor]]], version: str) -> None:
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            _sync(self.path.parent)
        try:
            before = self._document()
            keep = _names(before) if before else set()
        except ArtifactError:  # a whole state will take its place; until then nothing of it is thrown away
            before, keep = None, set(self._files())
        try:
            self._remove_all_but(keep)
            (self.path / _PARTIAL).mkdir()
            number = 1 + max((int(match[2]) for name in keep if (match := _TENSORS.fullmatch(name))), default=0)
            document: dict[str, Any] = {"format": _FORMAT, "version": version}
            for part, (tree, tensors) in parts.items():
                if part == "constant" and before and before["version"] == version:
                    document[part] = before[part]
                else:
                    ready = _ready(tensors)
                    file = self._written(f"{part}-{number}.safetensors", partial(save_file, ready))
                    about = {"file": file.name, "size": file.stat().st_size, "crc32": _crc32(ready)}
                    document[part] = {**about, "tree": tree}
                    file.replace(self.path / file.name)
            text = _dump({**document, "crc32": zlib.crc32(_dump(document))})
            _sync(self.path)  # the tensors' names are on the disk before the state mentions them
            file = self._written(_STATE, lambda path: path.write_bytes(text))
            keep |= _names(document)
            file.replace(self.path / _STATE)
            _sync(self.path)
            self._remove_all_but(_names(document))
        except (OSError, SafetensorError):
            with suppress(OSError):
                self._remove_all_but(keep)
            raise

    def _written(self, name: str, write: Callable[[Path], object]) -> Path:
        file = self.path / _PARTIAL / name
        write(file)
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        return file

    def _files(self) -> list[str]:
        return [file.name for file in self.path.iterdir() if _TENSORS.fullmatch(file.name)]

    def _remove_all_but(self, keep: set[str]) -> None:
        if (self.path / _PARTIAL).exists():
            shutil.rmtree(self.path / _PARTIAL)
        for name in self._files():
            if name not in keep:
                (self.path / name).unlink(missing_ok=True)

    def _document(self) -> dict[str, Any] | None:
        """Read ``state.json``; check it, and that the files it names are there in their sizes."""
        if not self.exists():
            return None
        try:
            document = read_json(self.path / _STATE, largest=_LARGEST_JSON + 2**20)
            newer = type(document["format"]) is int and document["format"] > _FORMAT
            if not newer:
                self._check(document)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unusable(error) from error
        if newer:
            raise ArtifactError(
                f"the resume state in {self.path} has format {document['format']}; this version reads up to {_FORMAT}: "
                f"upgrade transferkit, or {_ANEW}"
            )
        return dict(document)

    def _check(self, document: dict[str, Any]) -> None:
        if document.pop("crc32") != zlib.crc32(_dump(document)) or document["format"] != _FORMAT:
            raise ValueError(f"{_STATE} is not as it was written")
        for part, kinds in ((None, _FIELDS), ("state", _PART_FIELDS), ("constant", _PART_FIELDS)):
            fields, place = (document[part], f"{part!r} of {_STATE}") if part else (document, _STATE)
            check_fields(fields, kinds, place)
            if odd := sorted(fields.keys() - kinds):
                raise ValueError(f"{place} has {', '.join(map(repr, odd[:3]))}, unlike a state of this format")
        for part in ("state", "constant"):
            name = document[part]["file"]
            match = _TENSORS.fullmatch(name)
            if not match or match[1] != part:
                raise ValueError(f"{_STATE} names {name!r:.80}, which is no file of its own")
            if check_plain(self.path / name) != document[part]["size"]:
                raise ValueError(f"{name} has not the size that was written")

    def _load(self, part: dict[str, Any]) -> dict[Any, Any]:
        check_safetensors(self.path / part["file"])
        # safetensors maps the file into memory; copies survive its removal by another machine on a network disk.
        tensors = {name: tensor.clone() for name, tensor in load_file(self.path / part["file"]).items()}
        if _crc32(tensors) != part["crc32"]:
            raise ValueError(f"{part['file']} is not as it was written")
        content = _decode(part["tree"], tensors)
        if not isinstance(content, dict):
            raise ValueError(f"{_STATE} holds no dict")
        return content

    def _unusable(self, error: Exception) -> ArtifactError:
        return ArtifactError(f"the resume state in {self.path} cannot be used ({_cause(error)}); {_ANEW}")


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Any], place: str) -> None:
    """Refuse content that lacks a field, or has one of another kind.

    Args:
        content: The fields by name.
        kinds: For each field that must be there, what ``isinstance`` asks it for.
        place: Where the content stands, for the message.

    Raises:
        ValueError: A field is missing or of another kind; one sentence says which.

    Example:
        >>> check_fields({"batch": "3"}, {"batch": int}, "the state")
        Traceback (most recent call last):
        ValueError: the state has a str as 'batch', unlike a run that was saved
    """
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"{place} lacks {name!r}")
        if not isinstance(content[name], kind):
            raise ValueError(f"{place} has {_kind(content[name])} as {name!r}, unlike a run that was saved")


@contextmanager
def refuses_odd_content() -> Iterator[None]:
    """Refuse in one sentence what no run has saved, wherever it is met: whoever changes a state can sign it anew.

    Raises:
        ArtifactError: The block raised what is no error of transferkit, nor a lack of memory or of a file.

    Example:
        >>> with refuses_odd_content():
        ...     {"epoch": 3}["batch"]
        Traceback (most recent call last):
        transferkit.exceptions.ArtifactError: the saved run cannot be used (there is no 'batch'); start anew with ...
    """
    try:
        yield
    except (TransferkitError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever torch raises for values that are not its own
        raise ArtifactError(f"the saved run cannot be used ({_cause(error)}); {_ANEW}") from error


def _names(document: Mapping[str, Any]) -> set[str]:
    return {document[part]["file"] for part in ("state", "constant")}


def _encode(value: Any, path: Sequence[object], tensors: list[Tensor]) -> Any:
    """Turn a value into JSON, where each object has one key that says what it is; tensors go to the list."""
    kind = type(value)  # exactly: a numpy.float64 is a float too, and would not come back as one
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}  # json limits the digits of an int
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor) and _is_storable(value.detach()):
        tensors.append(value.detach())
        return {"tensor": str(len(tensors) - 1)}
    if len(path) > _DEEPEST:
        raise SettingError(
            f"the resume state is nested more than {_DEEPEST} deep at {_place(path[:5])}/…; make it flatter"
        )
    if kind in (list, tuple):
        items = [_encode(item, (*path, index), tensors) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if not isinstance(value, Mapping):
        raise SettingError(
            f"{_place(path)} is {_kind(value)}; a resume state holds dict, list, tuple, str, int, float, bool, None "
            "and dense tensors: turn it into these"
        )
    for key in value:
        if type(key) not in (str, int):
            raise SettingError(
                f"{_place(path)} has the key {key!r}, {_kind(key)}; keys of a resume state are str or int"
            )
    return {"dict": [[key, _encode(item, (*path, key), tensors)] for key, item in value.items()]}


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "dict":
        pairs = {key: _decode(item, tensors) for key, item in content}
        if len(pairs) == len(content) and all(type(key) in (str, int) for key in pairs):
            return pairs
    elif kind == "tuple" and isinstance(content, list):
        return tuple(_decode(content, tensors))
    elif kind == "tensor":
        return tensors[content]
    elif kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    elif kind == "int":
        return int(content, 16)
    raise ValueError(f"{_STATE} holds a {kind!r:.80} that cannot be understood")


def _is_storable(tensor: Tensor) -> bool:
    # A subclass, a shard of FSDP for one, keeps its numbers elsewhere.
    dense = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return dense and _is_known(tensor.dtype)


@cache
def _is_known(dtype: torch.dtype) -> bool:
    """Ask the safetensors that is installed."""
    try:
        save({"none": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def _ready(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Make tensors such that safetensors takes them: contiguous and, tied ones too, each with memory of its own."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, tensor in enumerate(tensors):
        whole = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        ready[str(index)] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return ready


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Return a checksum of names, dtypes, shapes and values, from memory: several times as fast as a disk writes."""
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _dump(document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # a file name that is no UTF-8 is a str with surrogates


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(path: Sequence[object]) -> str:
    return "/".join(map(str, path)) or "the resume state"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} {type(value).__name__} of {value.dtype} on {value.device}"
    name = type(value).__qualname__
    module = type(value).__module__
    name = name if module == "builtins" else f"{module}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _cause(error: Exception) -> str:
    if type(error) is KeyError:
        return f"there is no {one_line(error)}"
    return one_line(error) or type(error).__name__
