"""Files from strangers, looked at before a library opens them: plain ones only, of a stated size."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

__all__ = ["LARGEST_HEADER", "check_plain", "check_safetensors", "read_json"]

LARGEST_HEADER = 16 * 2**20
"""Bytes that the header of a safetensors file may take; 100,000 tensors fit."""


def check_plain(file: Path) -> int:
    """Return the size of a plain file in bytes.

    Raises:
        ValueError: It is a link, which may lead elsewhere, a pipe, which would block, a device or a folder.
        OSError: There is no such file.

    Example:
        >>> check_plain(Path("/dev/null"))
        Traceback (most recent call last):
        ValueError: 'null' is no plain file; put the file itself there
    """
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file.name!r} is no plain file; put the file itself there")
    return found.st_size


def read_json(file: Path, *, largest: int) -> Any:
    """Read a plain file of JSON.

    Args:
        file: The file; text that is no UTF-8 may be in it as surrogates.
        largest: Bytes it may have at most; it is not opened when it has more.

    Raises:
        ValueError: It is no plain file, too large, nested too deep, or no JSON.
        OSError: It cannot be read.
    """
    size = check_plain(file)
    if size > largest:
        raise ValueError(f"{file.name} has {size:,} bytes, {largest:,} at most")
    try:
        return json.loads(file.read_bytes().decode("utf-8", "surrogatepass"))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deep") from error


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose header is too large to be parsed; safetensors itself checks the rest.

    Args:
        file: The file; not a pipe.

    Raises:
        ValueError: The header claims more than :data:`LARGEST_HEADER` bytes.
        OSError: It cannot be read.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, {LARGEST_HEADER:,} at most")
