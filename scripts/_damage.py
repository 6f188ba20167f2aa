"""Ways to damage the files of a saved model, of weights and of a resume state; ``fuzz.py`` opens what comes out.

A mutation takes files by name, and a generator that it draws all of its choices from, and changes the files in place.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from transferkit.artifact_config import sealed
from transferkit.checkpoint import CONFIG, WEIGHTS

Files = dict[str, bytes]
Mutation = Callable[[Files, random.Random], None]


def bits(name: str, files: Files, chance: random.Random) -> None:
    content = bytearray(files[name])
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    files[name] = bytes(content)


def cut(name: str, files: Files, chance: random.Random) -> None:
    files[name] = files[name][: chance.randrange(len(files[name]))]


def appended(name: str, files: Files, chance: random.Random) -> None:
    files[name] += chance.choice((b"\0", b"{}", files[name], chance.randbytes(100)))


def noise(name: str, files: Files, chance: random.Random) -> None:
    size = chance.choice((0, 1, 8, 100, 10_000))
    beginnings = (b"", files[name][:8], b"PK\x03\x04", b"\x80\x02", b"{", b"[" * 50_000)
    files[name] = chance.choice(beginnings) + chance.randbytes(size)


ABSURD: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 1_000, 100_000, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(None, True, False, [], {}, [[]], [0] * 1_000, {"a": {"b": {}}}, "", "x" * 100_000, "\0", "a\nb", "\ud800", "𝛼"),
    *("../../etc/passwd", "/dev/zero", "hf-hub:a/b", "local-dir:/tmp", "timm/local-dir:/tmp", "timm/hf-hub:a/b"),
    *("timm/../x", "torchvision/resnet18", "timm/vit_giant_patch14_224", "timm/test_vit.x/y", "module/Evil", "I64"),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def inside(tree: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


def changed(tree: Any, chance: random.Random) -> None:
    """Change JSON in one or two places: another value, two that swap, one less, one more."""
    for _ in range(chance.choice((1, 1, 2))):
        ways = list(places(tree))
        if not ways:
            return
        first, second = chance.choice(ways), chance.choice(ways)
        holder, key = inside(tree, first)
        action = chance.randrange(6)
        if action < 3:
            holder[key] = chance.choice(ABSURD)
        elif action == 3 and first[: len(second)] != second and second[: len(first)] != first:
            other, place = inside(tree, second)
            holder[key], other[place] = other[place], holder[key]
        elif action == 4:
            del holder[key]
        elif isinstance(holder, dict):
            holder[chance.choice(("extra", "checkpoint_path", "../x", "", "a\nb"))] = chance.choice(ABSURD)


def config(files: Files, chance: random.Random, *, seal: bool) -> None:
    tree = json.loads(files[CONFIG])
    if seal and chance.random() < 0.3:
        tree["transferkit"]["format"] = 1
    changed(tree if chance.random() < 0.3 else tree["transferkit"], chance)
    if seal:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # it may be too far from a config
            tree = sealed(tree)
    files[CONFIG] = json.dumps(tree).encode()


def header(name: str, files: Files, chance: random.Random) -> None:
    """Edit the header of a safetensors file, or the length it states."""
    content = files[name]
    length = int.from_bytes(content[:8], "little")
    tree, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    action = chance.randrange(8)
    if action == 0:
        stated = chance.choice((0, 1, length - 1, length + 1, 2**24, 2**31, 2**63, 2**64 - 1))
        files[name] = stated.to_bytes(8, "little") + content[8:]
        return
    key = chance.choice([each for each in tree if each != "__metadata__"])
    about = tree[key]
    if action < 3:
        sizes = (0, 1, -1, 2**20, 2**40, 2**62, *about["shape"])
        about["shape"] = chance.choices(sizes, k=chance.randrange(7))
    elif action == 3:
        about["dtype"] = chance.choice(("F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "C64", "F8_E4M3", "F4", "X"))
    elif action == 4:
        about["data_offsets"] = chance.choices((0, 4, 2**62, len(rest), *about["data_offsets"]), k=2)
    elif action == 5:
        other = chance.choice(("../x", "a" * 100_000, "." * 1_000, "a\nb", "", "\x1b[31m", "conv.0.0.0.0"))
        tree[other] = tree.pop(key)
    else:
        changed(tree, chance)
    written = json.dumps(tree).encode()
    files[name] = len(written).to_bytes(8, "little") + written + rest


def resigned(files: Files, chance: random.Random, mutation: Mutation) -> None:
    """Change the weights of a saved model, and state the checksums that they have then."""
    mutation(files, chance)
    tree = sealed(json.loads(files[CONFIG]), weights_sha256=sha256(files[WEIGHTS]).hexdigest())
    files[CONFIG] = json.dumps(tree).encode()


def state(name: str, files: Files, chance: random.Random, *, sign: bool) -> None:
    tree = json.loads(files[name])
    changed(tree, chance)
    if sign and isinstance(tree, dict):
        tree.pop("crc32", None)
        with suppress(ValueError):  # a number that no JSON has
            text = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            tree["crc32"] = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    files[name] = json.dumps(tree).encode()


def records(name: str, files: Files, chance: random.Random) -> None:
    """Edit the zip archive around the records of a .pth file."""
    action = chance.randrange(6)
    content = bytearray(files[name])
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        known = {record.filename: archive.read(record) for record in archive.infolist()}
    if action < 3:  # what the directory says of one record: method, checksum, sizes, place
        entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
        at = chance.choice(entries) + chance.choice((10, 16, 20, 24, 42))
        content[at : at + 4] = struct.pack("<L", chance.choice((0, 1, 8, 2**20, 2**31, 2**32 - 1)))
        files[name] = bytes(content)
        return
    chosen = chance.choice(list(known))
    if action == 3:
        known[chosen] = bytes(32 * 2**20) if chance.random() < 0.05 else known[chosen] * 3
    elif action == 4:
        known[chance.choice(("../../x", "archive/DATA.PKL", "x/data.pkl", "archive/data/9"))] = known.pop(chosen)
    else:
        del known[chosen]
    files[name] = archived(known, zipfile.ZIP_DEFLATED if chance.random() < 0.5 else zipfile.ZIP_STORED)


def archived(known: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        for name, content in known.items():
            archive.writestr(name, content)
    return written.getvalue()


# What unpickles for ever or into all memory: tuples within tuples as a key, a bytearray, lists in lists.
BOMBS = (
    b"\x80\x02}K\x01\x85q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns.",
    b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    b"\x80\x02" + b"K\x01\x85" + b"\x85" * 300_000 + b".",
    b"\x80\x02(" + b"K\x01" * 2_000_000 + b"l.",
)


def pickled(name: str, files: Files, chance: random.Random) -> None:
    """Change the pickle inside a .pth file, and state the checksum that it has then."""
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        known = {record.filename: archive.read(record) for record in archive.infolist()}
    (place,) = (each for each in known if each.endswith("data.pkl"))
    if chance.random() < 0.1:
        known[place] = chance.choice(BOMBS)
    else:
        chance.choice((bits, bits, bits, cut))(place, known, chance)
    files[name] = archived(known)


@dataclass(frozen=True)
class Evil:
    """Makes the canary when it is unpickled."""

    canary: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def planted(name: str, files: Files, chance: random.Random, *, canary: Path) -> None:
    """Put a pickle that carries code in the place of a file."""
    content = {"state_dict": {"a": Evil(canary)}, "args": Evil(canary)} if chance.random() < 0.5 else Evil(canary)
    if chance.random() < 0.5:
        files[name] = pickle.dumps(content, protocol=chance.randrange(6))
        return
    written = io.BytesIO()
    torch.save(content, written, _use_new_zipfile_serialization=chance.random() < 0.5)
    files[name] = written.getvalue()


def beside(files: Files, chance: random.Random, *, canary: Path) -> None:
    """Put such a pickle beside the files, under a name that some library opens."""
    name = chance.choice(
        ("custom_checkpoint_0.pkl", "pytorch_model.bin", "optimizer.bin", "random_states_0.pkl", "best.pt", "data.pkl")
    )
    planted(name, files, chance, canary=canary)


def linked(name: str, files: Files, chance: random.Random) -> None:
    """A link, a pipe, a folder or nothing in the place of a file: see :func:`write`."""
    files[name] = chance.choice((b"LINK", b"LOOP", b"PIPE", b"FOLDER", b"NOTHING"))
