"""What a frozen part gave for pictures, one row per picture: in memory, or in plain ``.npy`` files that are mapped."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from transferkit.exceptions import OutputError

__all__ = ["ABOUT", "ActivationStore"]

ABOUT = "activations.json"
"""File that says what kept activations were made from."""
_FORMAT = 1
_RELEASE = 64 * 2**20  # bytes that may be mapped in before they are handed back to the system
_AROUND = 64 * 2**10  # bytes that the system maps in where one is asked for
# numpy has no bfloat16; its bits are kept as whole numbers.
_BITS = {torch.bfloat16: torch.int16}


class ActivationStore:
    """Rows of several tensors; :meth:`create` makes one, :meth:`open` finds one that was kept.

    Pages of mapped files are handed back to the system as it goes, so that a store of any size costs little memory.

    Args:
        tensors: One per kept tensor, each (rows, …).
        dtypes: The types in which they are read.
        folder: Where their files are, or ``None`` in memory.
        maps: The mapped files, if they are.
        written: Whether the rows are there already.

    Attributes:
        written: (rows,) bool, which rows were ever written.

    Example:
        >>> store = ActivationStore.create(3, [torch.zeros(1, 2)])
        >>> store.write(torch.tensor([0, 2]), [torch.ones(2, 2)])
        >>> store.read(torch.tensor([2]))
        (tensor([[1., 1.]]),)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        *,
        folder: Path | None = None,
        maps: Sequence[Any] = (),
        written: bool = False,
    ) -> None:
        """Hold them."""
        self.tensors, self.dtypes, self.folder = tuple(tensors), tuple(dtypes), folder
        self.written = torch.full((len(self.tensors[0]),), written)
        self._maps = list(maps)
        self._touched = 0
        self._stays = False

    @classmethod
    def create(
        cls, rows: int, like: Sequence[Tensor], *, dtype: torch.dtype | None = None, folder: Path | None = None
    ) -> Self:
        """Make room.

        Args:
            rows: How many.
            like: Tensors (B, …) whose shapes, but for the number of rows, and types are those to keep.
            dtype: Type in which floating point numbers are kept; ``None`` for their own, which loses nothing.
            folder: A new folder for the files; ``None`` for memory.

        Raises:
            OutputError: The folder cannot be written, or the disk has no room for them.
        """
        shapes = [(rows, *each.shape[1:]) for each in like]
        dtypes = [each.dtype for each in like]
        kept = [dtype if dtype is not None and own.is_floating_point else own for own in dtypes]
        if folder is None:
            return cls([torch.empty(shape, dtype=own) for shape, own in zip(shapes, kept, strict=True)], dtypes)
        try:
            folder.mkdir(parents=True)
            arrays = []
            for number, (shape, own) in enumerate(zip(shapes, kept, strict=True)):
                file = folder / f"{number}.npy"
                bits = torch.empty(0, dtype=_BITS.get(own, own)).numpy()
                arrays.append(np.lib.format.open_memmap(file, mode="w+", dtype=bits.dtype, shape=shape))
                # A page that the disk has no room for when it is written to would kill the process.
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(f"activations cannot be kept in {folder.parent}: {error.strerror or error}") from error
        return cls(_as_tensors(arrays, kept), dtypes, folder=folder, maps=arrays)

    @classmethod
    def open(cls, folder: Path, *, facts: Mapping[str, Any], rows: int, in_memory: bool) -> Self | None:
        """Return what :meth:`keep` kept under these facts, or ``None`` where there is nothing that can be used.

        Args:
            folder: Where.
            facts: What it must have been made from.
            rows: How many there must be.
            in_memory: Whether to read the files now instead of mapping them.
        """
        try:
            about = json.loads((folder / ABOUT).read_text())
            if about["format"] != _FORMAT or about["facts"] != facts:
                return None
            kept, dtypes = ([getattr(torch, str(name)) for name in about[part]] for part in ("kept", "dtypes"))
            mode: Any = None if in_memory else "c"
            arrays = [np.load(folder / f"{number}.npy", mmap_mode=mode) for number in range(len(kept))]
            tensors = _as_tensors(arrays, kept)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whatever a damaged file holds
            return None
        if any(len(each) != rows for each in tensors):
            return None
        store = cls(tensors, dtypes, folder=folder, maps=() if in_memory else arrays, written=True)
        store._stays = True
        return store

    def keep(self, folder: Path, *, facts: Mapping[str, Any]) -> None:
        """Move the files to a place of their own, complete, for :meth:`open`.

        Args:
            folder: Where to; on the same file system as the files.
            facts: What they were made from, JSON values.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self.folder is None:
            raise OutputError("a store in memory has no files to keep; create it with a folder")
        try:
            about = {
                "format": _FORMAT,
                "kept": [_word(each.dtype) for each in self.tensors],
                "dtypes": [_word(each) for each in self.dtypes],
                "facts": dict(facts),
            }
            (self.folder / ABOUT).write_text(json.dumps(about, indent=1))
            if folder.exists():  # it could not be opened
                shutil.rmtree(folder)
            self.folder.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise OutputError(
                    f"activations cannot be kept in {folder.parent}: {error.strerror or error}"
                ) from error
            return  # another run was faster; its files are the same
        self.folder, self._stays = folder, True

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(each.nbytes for each in self.tensors)

    def write(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        """Set rows.

        Args:
            rows: (B,) int64, which ones.
            tensors: One (B, …) per kept tensor, on any device.
        """
        for kept, each in zip(self.tensors, tensors, strict=True):
            kept[rows] = each.detach().to("cpu", kept.dtype)
        self.written[rows] = True
        self._release(len(rows))

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return rows.

        Args:
            rows: (B,) int64, which ones, in this order.

        Returns:
            A copy (B, …) of each kept tensor's rows.
        """
        read = tuple(each[rows].to(dtype) for each, dtype in zip(self.tensors, self.dtypes, strict=True))
        self._release(len(rows))
        return read

    def close(self) -> None:
        """Let go of the rows, and delete files that :meth:`keep` did not keep."""
        self.tensors, self._maps = (), []
        if self.folder is not None and not self._stays:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _release(self, rows: int) -> None:
        if not self._maps:
            return
        self._touched += rows * sum(max(each[:1].nbytes, _AROUND) for each in self.tensors)
        if self._touched >= _RELEASE:
            self._touched = 0
            for array in self._maps:
                array.base.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file


def _as_tensors(arrays: Sequence[np.ndarray[Any, Any]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    pairs = zip(arrays, dtypes, strict=True)
    tensors = [torch.from_numpy(array).view(dtype) for array, dtype in pairs]
    if any(each.ndim == 0 for each in tensors):
        raise ValueError("a file holds no rows")
    return tensors


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
