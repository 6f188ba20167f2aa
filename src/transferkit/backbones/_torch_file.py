"""What ``torch.save`` wrote, looked at before torch unpickles it.

With ``weights_only=True`` torch runs none of a file's code. A file may still be made to fill the memory or to keep
torch busy for ever: records that unpack to a thousand times their size, tuples within tuples that double at every
level. torch never writes those.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

__all__ = ["check_torch_file"]

_LARGEST_PICKLE = 16 * 2**20  # bytes, without the tensors; each takes about 120
_LARGEST_DIRECTORY = 8 * 2**20  # bytes; a tensor takes about 100
_MOST_VALUES = 500_000  # a tensor takes about 30
_LARGEST_TUPLE = 10_000
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OLD_PICKLES = 5  # torch before 1.6: a magic number, a version, the system, the values, the names of the tensors
_END, _END64 = 22, 56 + 20  # bytes of a zip archive's last records


def check_torch_file(file: Path) -> None:
    """Refuse a file that torch.save did not write, or that would take much more memory than its own size.

    Args:
        file: A file that ends on ``.pth`` or the like; not a pipe.

    Raises:
        ValueError: It is something else, damaged, compressed, or holds a pickle that is too long or nested too deep.
        OSError: It cannot be read.

    Source: miniz, torch's reader of zip archives, for where it looks for what.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(_ZIP))
        opened.seek(0)
        if start == _ZIP:
            _check_pickle(_zipped_pickle(opened, size))
        elif start.startswith(_PICKLE):
            pickles = io.BytesIO(opened.read(_LARGEST_PICKLE))
            for _ in range(_OLD_PICKLES):
                _check_pickle(pickles)
                if pickles.tell() == size:
                    break  # one pickle alone: torch says what it wants
        else:
            raise ValueError("it is neither a zip archive nor a pickle, as torch.save writes them")


def _zipped_pickle(opened: BinaryIO, size: int) -> io.BytesIO:
    """Return the pickle of an archive, after a look at all of its records."""
    _check_directory(opened, size)
    with zipfile.ZipFile(opened) as archive:
        records = archive.infolist()
    names = [record.filename.lower() for record in records]  # torch's reader takes upper for lower case
    pickles = [record for record, name in zip(records, names, strict=True) if name.endswith("/data.pkl")]
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save never does")
    if sum(max(record.file_size, record.compress_size) for record in records) > size:
        raise ValueError("its records claim more bytes than the file has")
    if len(set(names)) < len(names) or len(pickles) != 1:
        raise ValueError("it holds no pickle of torch.save, or more than one")
    if pickles[0].file_size > _LARGEST_PICKLE:
        raise ValueError(f"its pickle has {pickles[0].file_size:,} bytes, {_LARGEST_PICKLE:,} at most")
    damaged = [record.filename for record in records if _checksum(opened, record) != record.CRC]
    if 0 < len(damaged) < len(records):  # all of them: torch was told to write without checksums
        raise ValueError(f"{damaged[0]!r} in it is not as it was written")
    _to_content(opened, pickles[0])
    return io.BytesIO(opened.read(pickles[0].file_size))


def _check_directory(opened: BinaryIO, size: int) -> None:
    """Make sure that Python's reader and torch's find the same directory: one only, right before the end."""
    opened.seek(max(0, size - _END64 - _END))
    last = opened.read().rjust(_END64 + _END, b"\0")
    if last[-_END:-18] != b"PK\x05\x06" or last[-2:] != b"\0\0":
        raise ValueError("it is cut short, or no zip archive of torch.save")
    if last[56:60] == b"PK\x06\x07":
        end = size - _END64 - _END
        (stated,) = struct.unpack("<Q", last[64:72])
        length, offset = struct.unpack("<QQ", last[40:56])
        if stated != end or last[:4] != b"PK\x06\x06":
            raise ValueError("it is a damaged zip archive")
    else:
        end = size - _END
        length, offset = struct.unpack("<LL", last[-10:-2])
    if length + offset != end:
        raise ValueError("it is a damaged zip archive")
    if length > _LARGEST_DIRECTORY:
        raise ValueError(f"its directory has {length:,} bytes, {_LARGEST_DIRECTORY:,} at most")


def _to_content(opened: BinaryIO, record: zipfile.ZipInfo) -> None:
    opened.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", opened.read(4))
    opened.seek(name + extra, io.SEEK_CUR)


def _checksum(opened: BinaryIO, record: zipfile.ZipInfo) -> int:
    _to_content(opened, record)
    left, checksum = record.file_size, 0
    while left and (part := opened.read(min(left, 2**20))):
        left, checksum = left - len(part), zlib.crc32(part, checksum)
    return checksum


def _check_pickle(stream: io.BytesIO) -> None:
    """Walk through one pickle without making anything of it.

    A tuple's hash goes through all that is inside, shared or not, and is computed wherever it is a key.
    """
    stack: list[int] = []  # of each value, how many it is made of, written out in full
    marks: list[int] = []
    memo: dict[int, int] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values beside its tensors")
        name, taken = operation.name, operation.stack_before
        if name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise ValueError("it makes a bytearray, which may be of any size")
        if name.endswith("PUT") and stack:
            memo[int(argument or 0)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo.get(int(argument or 0), 1))
        elif name == "MARK":
            marks.append(len(stack))
        else:
            count = len(taken)
            if pickletools.markobject in taken:
                count = len(stack) - (marks.pop() if marks else 0) + taken.index(pickletools.markobject)
            inside = stack[max(0, len(stack) - count) :]
            del stack[len(stack) - len(inside) :]
            made = 1 + sum(inside) if name.startswith("TUPLE") else 1
            if made > _LARGEST_TUPLE:
                raise ValueError(f"it holds a tuple of more than {_LARGEST_TUPLE:,} values")
            stack += [made] * len(operation.stack_after)
