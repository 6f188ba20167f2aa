"""A resume state comes back equal to the bit, and is whole whatever happens while it is written."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from transferkit import resume
from transferkit.exceptions import ArtifactError, OutputError, SettingError
from transferkit.resume import ResumeStore

ROUND = {"epoch": 3, "shape": (1, 2), 0: [torch.arange(4.0), None, True], "loss": 0.1}
ANEW = r"start anew with overwrite=True \(--overwrite\)"


def same(left: Any, right: Any) -> bool:
    """Equal in structure, types, order of keys and bits."""
    if isinstance(left, Tensor):
        equal = isinstance(right, Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return equal and bits(left) == bits(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def state_number(number: int) -> dict[str, Any]:
    return {"step": number, "tensors": (torch.full((300,), float(number)), torch.tensor(number))}


def constants(version: int) -> dict[str, Tensor]:
    return {"stem.weight": torch.full((50,), float(version)), "empty": torch.empty(0, 3)}


def write(store: ResumeStore, number: int, version: int = 0) -> None:
    store.write(state_number(number), constant=constants(version), version=str(version))


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> ResumeStore:
    return ResumeStore(tmp_path / "run" / "resume")


# --- what goes in comes out


def test_nothing_written_reads_as_none_and_touches_nothing(store):
    assert store.read() is None
    assert not store.exists()
    store.clear()
    assert not store.path.parent.exists()


def test_a_state_comes_back_with_its_types(store):
    store.write(ROUND, constant={"stem": torch.ones(2)}, version="a")
    assert store.exists()
    state, constant = store.read()
    assert same(state, ROUND)
    assert same(constant, {"stem": torch.ones(2)})


def test_optimizer_schedule_and_generators_come_back(store):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    store.write(state, constant={}, version="")
    assert same(store.read(), (state, {}))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    whole = torch.frombuffer(bytearray(random.Random(0).randbytes(count) or b"\0"), dtype=torch.uint8)[:count]
    return (whole % 2 == 1).view(shape) if dtype is torch.bool else whole.view(dtype).view(shape)


# Those that safetensors 0.4.3 lacks come at the end.
DTYPES = (
    "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("name", [*DTYPES.split(), "complex64"])
def test_every_dtype_and_shape_comes_back_to_the_bit(store, name, shape):
    tensor = random_tensor(getattr(torch, name), shape)
    store.write({"x": tensor}, constant={"x": tensor}, version="a")
    assert same(store.read(), ({"x": tensor}, {"x": tensor}))


def test_views_of_one_memory_and_odd_layouts_come_back_apart(store):
    base = torch.randn(2, 3, 4, 4)
    complex_base = torch.randn(3, dtype=torch.complex64)
    state = {
        "tied": [base, base, base[:1], base.view(-1)[5:]],
        "layouts": [base.mT, base.to(memory_format=torch.channels_last), base[0, 0, 0, 0].expand(3)],
        "lazy": [complex_base.conj(), complex_base.conj().imag],
        "parameter": nn.Parameter(base),
    }
    store.write(state, constant={"a": base, "b": base}, version="a")
    read, constant = store.read()
    assert same(read, {**state, "parameter": base})
    tensors = [*read["tied"], *read["layouts"], *read["lazy"], read["parameter"], *constant.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_tensors_of_a_gpu_come_back_on_the_cpu(store):
    tensor = torch.randn(3, device="cuda")
    store.write({"x": tensor, "y": tensor}, constant={}, version="")
    assert same(store.read(), ({"x": tensor.cpu(), "y": tensor.cpu()}, {}))


def test_mappings_become_dicts_and_keys_keep_their_types_and_order(store):
    state = OrderedDict([("1", 0), (1, 1), (-1, 2), ("", OrderedDict(b=1, a=2))])
    store.write(state, constant={"__metadata__": torch.ones(1)}, version="")
    expected = {"1": 0, 1: 1, -1: 2, "": {"b": 1, "a": 2}}
    assert same(store.read(), (expected, {"__metadata__": torch.ones(1)}))


def test_an_int_of_any_length_comes_back(store):
    state = {"long": [10**5000, -(10**5000)], "edges": (2**63 - 1, 2**63, -(2**63), -(2**63) - 1)}
    store.write(state, constant={}, version="")
    assert store.read() == (state, {})


odd_nan = struct.unpack(">d", bytes.fromhex("fff0000000000001"))[0]
text = st.text(st.characters(), max_size=5) | st.just("\ud83d\ude00\udc80")
numbers = st.integers() | st.floats() | st.just(odd_nan)
arrays = st.sampled_from(DTYPES.split()).map(lambda name: random_tensor(getattr(torch, name), (2, 3)).mT)
leaves = st.none() | st.booleans() | numbers | text | arrays
keys = text | st.integers()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(keys, trees, max_size=4), version=text)
def test_any_nested_state_comes_back_equal(state, version):
    with tempfile.TemporaryDirectory() as place:
        store = ResumeStore(place)
        store.write(state, constant={}, version=version)
        assert same(store.read(), (state, {}))


# --- what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: None, r"^callbacks/2/hook is a function; a resume state holds dict, "),
        (np.float64(1.0), r"^callbacks/2/hook is a numpy.float64; "),
        (np.ones(2), r"^callbacks/2/hook is a numpy.ndarray; "),
        (object(), r"^callbacks/2/hook is an object; "),
        (torch.Size([2]), r"^callbacks/2/hook is a torch.Size; "),
        ({1, 2}, r"^callbacks/2/hook is a set; "),
        (b"bytes", r"^callbacks/2/hook is a bytes; "),
        ({1.5: 0}, r"^callbacks/2/hook has the key 1.5, a float; keys of a resume state are str or int$"),
        ({True: 0}, r"^callbacks/2/hook has the key True, a bool; "),
        (torch.ones(2).to_sparse(), r"^callbacks/2/hook is a torch.sparse_coo Tensor of torch.float32 on cpu; "),
        (torch.ones(2, device="meta"), r"^callbacks/2/hook is a torch.strided Tensor of torch.float32 on meta; "),
        (torch.ones(2, dtype=torch.complex128), r"^callbacks/2/hook is a .* of torch.complex128 on cpu; "),
    ],
)
def test_anything_else_is_refused_by_its_place_before_anything_is_written(store, value, message):
    with pytest.raises(SettingError, match=message):
        store.write({"callbacks": [0, 1, {"hook": value}]}, constant={}, version="")
    assert not store.path.parent.exists()


@pytest.mark.parametrize(
    ("state", "constant", "version", "message"),
    [
        ([1], {}, "", "is a dict with a str for its version, got a list and a str"),
        ({}, {}, None, "got a dict and a NoneType"),
        ({}, {"stem": 1}, "", "constant takes tensors by name, got an int under 'stem'"),
        ({}, {1: torch.ones(1)}, "", "under 1"),
        ({}, {"stem": torch.ones(2).to_sparse()}, "", "^constant/stem is a torch.sparse_coo Tensor"),
    ],
)
def test_the_parts_must_be_what_they_are_for(store, state, constant, version, message):
    with pytest.raises(SettingError, match=message):
        store.write(state, constant=constant, version=version)
    assert not store.path.parent.exists()


def test_a_state_that_contains_itself_or_is_too_long_is_refused(store, monkeypatch):
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(SettingError, match="nested more than 100 deep at again/again/again/again/again/…; make it"):
        store.write(endless, constant={}, version="")
    monkeypatch.setattr(resume, "_LARGEST_JSON", 1000)
    with pytest.raises(SettingError, match=r"takes .* bytes beside its tensors, 1,000 at most; put what is long into"):
        store.write({"long": list(range(1000))}, constant={}, version="")
    assert not store.path.parent.exists()


def test_a_state_as_deep_as_allowed_comes_back(store):
    deep: Any = 1
    for level in range(100):
        deep = [deep] if level % 2 else {"a": deep}
    store.write({"deep": deep}, constant={}, version="")
    assert same(store.read(), ({"deep": deep}, {}))


# --- what lies on the disk


def test_only_the_files_of_the_last_state_stay(store):
    for number in range(3):
        write(store, number)
    assert files(store.path) == ["constant-1.safetensors", "state-3.safetensors", "state.json"]


def test_constants_are_written_once_per_version_even_by_another_process(store):
    write(store, 1)
    file = store.path / "constant-1.safetensors"
    before = file.stat()
    store.write(state_number(2), constant={"never": torch.ones(1)}, version="0")
    again = ResumeStore(store.path)
    write(again, 3)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert same(again.read(), (state_number(3), constants(0)))
    write(again, 4, version=1)
    assert files(store.path) == ["constant-4.safetensors", "state-4.safetensors", "state.json"]
    assert same(store.read(), (state_number(4), constants(1)))


def test_what_was_read_outlives_the_next_write(store):
    write(store, 1)
    state, constant = store.read()
    write(store, 2, version=1)
    store.clear()
    assert same((state, constant), (state_number(1), constants(0)))


def test_what_was_read_can_be_written_again(store):
    write(store, 1)
    state, constant = store.read()
    store.write(state, constant=constant, version="other")
    assert same(store.read(), (state_number(1), constants(0)))


def test_leftovers_of_killed_writers_are_removed_and_other_files_are_not(store):
    write(store, 1)
    (store.path / ".partial").mkdir()
    for name in (".partial/state.json", ".partial/.tmp2x", "state-7.safetensors", "notes.txt"):
        (store.path / name).write_text("x")
    write(store, 2)
    assert files(store.path) == ["constant-1.safetensors", "notes.txt", "state-2.safetensors", "state.json"]


def test_clear_removes_the_store_and_nothing_else(store):
    write(store, 1)
    (store.path / ".partial").mkdir()
    (store.path / ".partial" / "state-2.safetensors").touch()
    store.clear()
    assert not store.path.exists()
    write(store, 1)
    (store.path / "notes.txt").touch()
    store.clear()
    assert files(store.path) == ["notes.txt"]
    assert store.read() is None


def test_a_store_that_cannot_be_cleared_says_so(store):
    (store.path / "state.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"resume cannot be removed: "):
        store.clear()


# --- killed while writing


class Crash(BaseException):
    """What no code of ours catches."""


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def crashing(patch: pytest.MonkeyPatch, at: int, moment: str) -> None:
    """Raise at the so many-th file operation: before it, after it, or with half of its bytes written."""
    done = 0

    def wrapped(function: Callable[..., Any], written: Callable[..., Path] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == at and moment == "before":
                raise Crash
            result = function(*args, **options)
            if done == at:
                if moment == "half" and written is not None:
                    halve(written(*args))
                raise Crash
            return result

        return call

    for name in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
        patch.setattr(os, name, wrapped(getattr(os, name)))
    patch.setattr(resume, "save_file", wrapped(save_file, lambda tensors, path: path))
    patch.setattr(Path, "write_bytes", wrapped(Path.write_bytes, lambda path, data: path))


def crashes(prepare: Callable[[Path], None], version: int, moment: str) -> Iterator[Path]:
    """Yield the folder after a crash at each operation of writing state 2, until a write runs through."""
    for at in range(1, 100):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "resume"
            prepare(folder)
            with pytest.MonkeyPatch.context() as patch:
                crashing(patch, at, moment)
                try:
                    write(ResumeStore(folder), 2, version)
                except Crash:
                    pass
                else:
                    assert at > 8  # it did count
                    return
            yield folder
    raise AssertionError("the write never ran through")


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("version", [0, 1])
def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_state(version, moment):
    seen = set()
    for folder in crashes(lambda folder: write(ResumeStore(folder), 1), version, moment):
        state, constant = ResumeStore(folder).read()
        seen.add(state["step"])
        assert same(state, state_number(state["step"]))
        assert same(constant, constants(version if state["step"] == 2 else 0))
        write(ResumeStore(folder), 3, version)
        assert same(ResumeStore(folder).read(), (state_number(3), constants(version)))
        assert len(files(folder)) == 3
    assert seen == {1, 2}


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_crash_in_the_first_write_leaves_nothing_or_the_state(moment):
    seen = set()
    for folder in crashes(lambda folder: None, 0, moment):
        found = ResumeStore(folder).read()
        seen.add(found is None)
        assert found is None or same(found, (state_number(2), constants(0)))
        write(ResumeStore(folder), 3)
        assert len(files(folder)) == 3
    assert seen == {True, False}


def test_a_crash_while_clearing_leaves_a_state_or_none(tmp_path):
    for at in range(1, 4):
        store = ResumeStore(tmp_path / str(at))
        write(store, 1)
        with pytest.MonkeyPatch.context() as patch:
            crashing(patch, at, "after")
            with pytest.raises(Crash):
                store.clear()
        assert store.read() is None
        write(store, 2)
        assert same(store.read(), (state_number(2), constants(0)))


# One process without threads, so that it may fork: importing torch for each kill would take most of the time.
KILLED = """
import os, random, signal, sys, time, torch
from transferkit.resume import ResumeStore

folder, kills = sys.argv[1], int(sys.argv[2])
chance, store, least, steps = random.Random(0), ResumeStore(folder), 0, set()

def state(number):
    return {"step": number, "tensors": [torch.full((20_000,), float(number + index)) for index in range(4)]}

def constant(number):
    return {"stem": torch.full((5_000,), float(number // 3))}

for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            for number in range(least + 1, least + 10_000):
                store.write(state(number), constant=constant(number), version=str(number // 3))
                os.write(writer, number.to_bytes(4, "big"))
        finally:
            os._exit(1)
    os.close(writer)
    if kill % 2:  # on a busy machine some writers are killed before they have begun
        least = int.from_bytes(os.read(reader, 4), "big")
    time.sleep(chance.uniform(0.0, 0.04))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    while told := os.read(reader, 4):
        least = int.from_bytes(told, "big")
    os.close(reader)
    found = ResumeStore(folder).read()
    if found is None:
        assert least == 0
        continue
    number = found[0]["step"]
    assert number in (least, least + 1), (number, least)
    assert all(map(torch.equal, found[0]["tensors"], state(number)["tensors"]))
    assert torch.equal(found[1]["stem"], constant(number)["stem"])
    least = number
    steps.add(number)
    if chance.random() < 0.3:
        store.write(state(number), constant=constant(number), version=str(number // 3))
        assert len(os.listdir(folder)) == 3, os.listdir(folder)
print(len(steps))
"""


def run(script: str, *arguments: object, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*within, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.parametrize("kills", [25, pytest.param(150, marks=pytest.mark.long)])
def test_a_killed_process_leaves_the_last_state_or_the_one_being_written(tmp_path, kills):
    done = run(KILLED, tmp_path / "resume", kills)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > kills // 3  # different states: writers got somewhere before they were killed


# --- a full disk


def check_intact(store: ResumeStore, error: pytest.ExceptionInfo[OutputError], reason: str) -> None:
    assert str(error.value).startswith(f"the resume state cannot be written in {store.path}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert same(store.read(), (state_number(1), constants(0)))
    assert files(store.path) == ["constant-1.safetensors", "state-1.safetensors", "state.json"]


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_disk_that_fills_up_leaves_the_old_state(store, small_files, size):
    write(store, 1)
    with small_files(size), pytest.raises(OutputError) as error:
        write(store, 2, version=1)
    check_intact(store, error, "File too large")
    write(store, 2, version=1)
    assert same(store.read(), (state_number(2), constants(1)))


def test_a_disk_that_fills_up_with_the_structure_leaves_the_old_state(store, small_files):
    write(store, 1)
    with small_files(3000), pytest.raises(OutputError) as error:
        store.write({"long": list(range(2000))}, constant={}, version="1")
    check_intact(store, error, "File too large")


def test_a_disk_that_is_full_at_once_leaves_no_files(store, small_files):
    with small_files(100), pytest.raises(OutputError, match="cannot be written in"):
        write(store, 1)
    assert files(store.path) == []
    assert store.read() is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "resume"):
        assert ResumeStore(folder).read() is None
        ResumeStore(folder).clear()
        with pytest.raises(OutputError, match=f"the resume state cannot be written in {folder}: "):
            write(ResumeStore(folder), 1)


FULL = """
import os, sys, torch
from transferkit.exceptions import OutputError
from transferkit.resume import ResumeStore

store = ResumeStore(sys.argv[1] + "/run/resume")
small = {"x": torch.ones(30_000)}
store.write(small, constant={"stem": torch.ones(10)}, version="0")
before = sorted(os.listdir(store.path))
large = torch.ones(600_000)
for state, constant in (({"x": large}, {}), ({}, {"stem": large}), ({"x": [0] * 999_999}, {})):
    try:
        store.write(state, constant=constant, version="1")
    except OutputError as error:
        assert str(store.path) in str(error) and "No space left" in str(error), error
    else:
        raise AssertionError("the disk is not full")
    assert sorted(os.listdir(store.path)) == before
    assert torch.equal(store.read()[0]["x"], small["x"])
for number in range(20):
    store.write({"x": torch.full((30_000,), float(number))}, constant={}, version=str(number))
assert store.read()[0]["x"][0] == 19
print("done")
"""


def test_a_small_real_disk_fills_up_and_keeps_the_old_state(tmp_path):
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"', str(tmp_path))
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs of their own")
    done = run(FULL, tmp_path, within=mount)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


# --- damaged, foreign and hostile files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "resume"
    ResumeStore(folder).write(ROUND, constant=constants(0), version="0")
    return folder


NAMES = ("state.json", "state-1.safetensors", "constant-1.safetensors")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_an_artifact_error_or_an_equal_state(written, name, data):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "resume"
        shutil.copytree(written, folder)
        content = bytearray((folder / name).read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.sampled_from([start, start + 1, start + 8, len(content)]))
        content[start:stop] = data.draw(st.binary(max_size=4) | st.sampled_from([b"9", b"[", b'"', b" ", b"\xff" * 8]))
        (folder / name).write_bytes(content)
        with suppress(ArtifactError):
            assert same(ResumeStore(folder).read(), (ROUND, constants(0)))
        write(ResumeStore(folder), 5, version=1)  # a damaged state does not stop a run from writing the next
        assert same(ResumeStore(folder).read(), (state_number(5), constants(1)))


@pytest.mark.parametrize("name", NAMES)
def test_each_single_changed_byte_is_found(written, tmp_path, name):
    folder = tmp_path / "resume"
    shutil.copytree(written, folder)
    content = (folder / name).read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / name).write_bytes(changed)
        with pytest.raises(ArtifactError):
            ResumeStore(folder).read()


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: halve(folder / name)


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def piped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [cut, linked, piped])
def test_a_file_that_is_cut_off_or_no_plain_file_is_an_artifact_error(written, tmp_path, name, damage):
    shutil.copytree(written, tmp_path / "resume")
    damage(name)(tmp_path / "resume")
    assert ResumeStore(tmp_path / "resume").exists()
    with pytest.raises(ArtifactError, match=rf"^the resume state in .*resume cannot be used \(.*\); {ANEW}$"):
        ResumeStore(tmp_path / "resume").read()


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_missing_file_of_tensors_is_named_and_written_anew(written, tmp_path, name):
    store = ResumeStore(tmp_path / "resume")
    shutil.copytree(written, store.path)
    without(name)(store.path)
    with pytest.raises(ArtifactError, match=rf"No such file or directory: .*{name}.*; {ANEW}$"):
        store.read()
    write(store, 2)
    assert same(store.read(), (state_number(2), constants(0)))


def test_a_folder_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert ResumeStore(tmp_path / "loop").exists()
    with pytest.raises(ArtifactError, match=ANEW):
        ResumeStore(tmp_path / "loop").read()


def forge(folder: Path, document: dict[str, Any] | None = None, **changes: Any) -> None:
    """Change ``state.json`` as somebody would who knows how the checksum is made."""
    file = folder / "state.json"
    document = {**(document or json.loads(file.read_bytes())), **changes}
    document.pop("crc32")
    own = json.dumps(document, separators=(",", ":")).encode()
    file.write_text(json.dumps({**document, "crc32": zlib.crc32(own)}))


def test_a_newer_format_asks_for_an_upgrade(written, tmp_path):
    shutil.copytree(written, tmp_path / "resume")
    forge(tmp_path / "resume", format=2)
    with pytest.raises(
        ArtifactError, match=rf"has format 2; this version reads up to 1: upgrade transferkit, or {ANEW}$"
    ):
        ResumeStore(tmp_path / "resume").read()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": "1"},
        {"state": None},
        {"state": []},
        {"constant": {"file": "constant-1.safetensors"}},
    ],
)
def test_a_document_of_another_make_is_an_artifact_error(written, tmp_path, changes):
    shutil.copytree(written, tmp_path / "resume")
    forge(tmp_path / "resume", **changes)
    with pytest.raises(ArtifactError, match=ANEW):
        ResumeStore(tmp_path / "resume").read()


@pytest.mark.parametrize(
    ("part", "name"), [(None, "code"), ("state", "path"), ("constant", "url")], ids=["document", "state", "constant"]
)
def test_a_field_that_no_state_has_is_named(written, tmp_path, part, name):
    shutil.copytree(written, tmp_path / "resume")
    document = json.loads((written / "state.json").read_bytes())
    forge(tmp_path / "resume", **({name: 1} if part is None else {part: {**document[part], name: 1}}))
    with pytest.raises(ArtifactError, match=rf"state.json has '{name}', unlike a state of this format.*{ANEW}$"):
        ResumeStore(tmp_path / "resume").read()


KINDS = {"version": str, "state": dict, "file": str, "size": int, "crc32": int, "tree": dict}
ODD = [
    (name, odd) for name in KINDS for odd in (None, [], 0.5, {"a": 1}, "text", 7, ...) if type(odd) is not KINDS[name]
]


@pytest.mark.parametrize(("name", "value"), ODD, ids=repr)
def test_a_field_that_every_state_has_is_missed_and_has_its_kind(written, tmp_path, name, value):
    shutil.copytree(written, tmp_path / "resume")
    document = json.loads((written / "state.json").read_bytes())
    holder = document if name in ("version", "state") else document["state"]
    holder[name] = value
    if value is ...:
        del holder[name]
    forge(tmp_path / "resume", document)
    wanted = f"lacks '{name}'" if value is ... else rf"has an? \w+ as '{name}', unlike a run that was saved"
    with pytest.raises(ArtifactError, match=rf"\(('state' of )?state.json {wanted}\); {ANEW}$"):
        ResumeStore(tmp_path / "resume").read()


@pytest.mark.parametrize(
    "name",
    [
        "../state-1.safetensors",
        "/etc/passwd",
        "constant-1.safetensors",
        "state-1.safetensors\n",
        "state-01.safetensors",
        "state-١.safetensors",
        "x" * 5000,
        7,
        None,
    ],
)
def test_a_state_leads_to_no_file_but_its_own(written, tmp_path, name):
    shutil.copytree(written, tmp_path / "resume")
    shutil.copy(written / "state-1.safetensors", tmp_path)
    document = json.loads((written / "state.json").read_bytes())
    forge(tmp_path / "resume", state={**document["state"], "file": name})
    with pytest.raises(ArtifactError, match=ANEW) as error:
        ResumeStore(tmp_path / "resume").read()
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "tree",
    [
        {"dict": [["x", {"tensor": "5"}]]},
        {"dict": [["x", {"tensor": ["0"]}]]},
        {"dict": [["x", {"object": "os.system"}]]},
        {"dict": [["x", {"dict": [], "tuple": []}]]},
        {"dict": [["x", {}]]},
        {"dict": [["x", {"tuple": "ab"}]]},
        {"dict": [["x", {"float": "zz"}]]},
        {"dict": [["x", {"float": "00"}]]},
        {"dict": [["x", {"int": "0xg"}]]},
        {"dict": [["x", 1], ["x", 2]]},
        {"dict": [["x"]]},
        {"dict": [[True, 1]]},
        {"dict": [[["x"], 1]]},
        {"dict": None},
        [],
        None,
        "text",
    ],
)
def test_a_structure_of_another_make_is_an_artifact_error(written, tmp_path, tree):
    shutil.copytree(written, tmp_path / "resume")
    document = json.loads((written / "state.json").read_bytes())
    forge(tmp_path / "resume", state={**document["state"], "tree": tree})
    with pytest.raises(ArtifactError, match=ANEW):
        ResumeStore(tmp_path / "resume").read()


def test_constants_that_are_no_tensors_by_name_are_an_artifact_error(written, tmp_path):
    shutil.copytree(written, tmp_path / "resume")
    document = json.loads((written / "state.json").read_bytes())
    for pair in (["stem", 1], [1, {"tensor": "0"}]):
        forge(tmp_path / "resume", constant={**document["constant"], "tree": {"dict": [pair]}})
        with pytest.raises(ArtifactError, match="more than tensors by name"):
            ResumeStore(tmp_path / "resume").read()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"1",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1',
        b'{"format": ' + b"9" * 9999 + b"}",
    ],
)
def test_a_foreign_state_file_is_an_artifact_error(store, content):
    store.path.mkdir(parents=True)
    (store.path / "state.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=ANEW):
        store.read()


def test_a_huge_state_file_is_refused_unread(store):
    store.path.mkdir(parents=True)
    with (store.path / "state.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match="1,099,511,627,776 bytes"):
        store.read()


def test_a_header_that_claims_more_than_there_is_is_an_artifact_error(written, tmp_path):
    folder = tmp_path / "resume"
    shutil.copytree(written, folder)
    document = json.loads((written / "state.json").read_bytes())
    header = json.dumps({"0": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
    content = len(header).to_bytes(8, "little") + header
    (folder / "state-1.safetensors").write_bytes(content)
    claimed = {"size": len(content), "crc32": zlib.crc32(content)}
    forge(folder, state={**document["state"], **claimed})
    with pytest.raises(ArtifactError, match=ANEW):
        ResumeStore(folder).read()


def test_a_header_that_is_too_large_is_refused_unread(written, tmp_path):
    folder = tmp_path / "resume"
    shutil.copytree(written, folder)
    document = json.loads((written / "state.json").read_bytes())
    content = (2**24 + 1).to_bytes(8, "little") + b" " * 2**24
    (folder / "state-1.safetensors").write_bytes(content)
    forge(folder, state={**document["state"], "size": len(content)})
    with pytest.raises(ArtifactError, match=rf"its header claims 16,777,217 bytes, 16,777,216 at most\); {ANEW}$"):
        ResumeStore(folder).read()


def test_a_pickle_in_the_place_of_tensors_is_not_opened(store, tmp_path):
    write(store, 1)
    torch.save({"0": torch.ones(1)}, store.path / "state-1.safetensors")
    content = (store.path / "state-1.safetensors").read_bytes()
    document = json.loads((store.path / "state.json").read_bytes())
    forge(store.path, state={**document["state"], "size": len(content), "crc32": zlib.crc32(content)})
    with pytest.raises(ArtifactError, match=ANEW):
        store.read()
