"""Files from strangers: opened as they were written, or refused in one sentence; nothing in them is run or followed."""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transferkit import create_model
from transferkit.artifact_config import ArtifactConfig, sealed
from transferkit.backbones import _state_dict, _torch_file, fit_state_dict, read_state_dict
from transferkit.checkpoint import CONFIG, WEIGHTS, load_artifact, read_weights, save_artifact
from transferkit.exceptions import ArtifactError, TransferkitError, WeightsError
from transferkit.resume import ResumeStore

ROOT = Path(__file__).parents[1]
MODEL = "timm/test_efficientnet"
NAMES = ["ant", "bee", "wasp"]
STATM = Path("/proc/self/statm")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that is only looked at."""
    model = create_model(MODEL, class_names=NAMES, weights=None, image_size=32, seed=0)
    return save_artifact(model, tmp_path_factory.mktemp("saved") / "artifact", extra={"lr": 0.1})


@pytest.fixture
def artifact(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((saved / name).read_bytes())
    return folder


@cache
def state_dict() -> Mapping[str, Tensor]:
    model = create_model(MODEL, num_classes=3, weights=None, image_size=32, seed=0)
    return MappingProxyType(model.network.state_dict())


@contextmanager
def little_memory(more: int = 2**30) -> Iterator[None]:
    """Let this process map no more than so many bytes beyond those that it has, where the system tells how many."""
    if not STATM.exists():
        yield
        return
    size = int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(open_it: Callable[[], object], kind: type[TransferkitError] = ArtifactError) -> str:
    """Return the sentence with which something is refused."""
    with little_memory(), pytest.raises(kind) as caught:
        open_it()
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1000
    return text


def edit(artifact: Path, **values: Any) -> None:
    """Change fields of the ``transferkit`` block as somebody would who makes the checksum anew."""
    config = json.loads((artifact / CONFIG).read_text(encoding="utf-8"))
    for place, value in values.items():
        *way, name = place.split("__")
        holder = config["transferkit"]
        for key in way:
            holder = holder[key]
        holder[name] = value
    if "class_names" in values:
        config |= {"label_names": values["class_names"], "num_classes": len(values["class_names"])}
    (artifact / CONFIG).write_text(json.dumps(sealed(config)), encoding="utf-8")


# --- planted pickles


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def pickles(canary: Path) -> dict[str, bytes]:
    """Return files that run code when they are unpickled, by the way they were written."""
    files = {f"protocol {number}": pickle.dumps(Evil(canary), protocol=number) for number in range(6)}
    for zipped in (True, False):
        for content in (Evil(canary), {"state_dict": {"a": torch.ones(1)}, "args": Evil(canary)}):
            written = io.BytesIO()
            torch.save(content, written, _use_new_zipfile_serialization=zipped)
            files[f"zip {zipped}, {type(content).__name__}"] = written.getvalue()
    return files


PICKLES = list(pickles(Path()))


def test_the_planted_pickles_do_run_when_they_are_unpickled(tmp_path: Path) -> None:
    for number, content in enumerate(pickles(tmp_path / "canary").values()):
        with suppress(Exception):
            pickle.loads(content)
        with suppress(Exception):
            torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / "canary").is_dir(), number
        (tmp_path / "canary").rmdir()


@pytest.mark.parametrize("way", PICKLES)
def test_a_pickle_is_never_run(way: str, saved: Path, artifact: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    planted = pickles(canary)[way]
    for name in (CONFIG, WEIGHTS):
        (artifact / name).write_bytes(planted)
        refusal(partial(load_artifact, artifact))
        refusal(partial(read_weights, artifact))
        (artifact / name).write_bytes((saved / name).read_bytes())
    for suffix in (".pth", ".bin", ".safetensors"):
        (tmp_path / f"weights{suffix}").write_bytes(planted)
        refusal(partial(read_state_dict, tmp_path / f"weights{suffix}"), WeightsError)
    store = ResumeStore(tmp_path / "resume")
    for name in ("state.json", "state-1.safetensors", "constant-1.safetensors"):
        store.clear()
        store.write({"epoch": 1, "x": torch.ones(1)}, constant={"a": torch.ones(1)}, version="a")
        (store.path / name).write_bytes(planted)
        refusal(store.read)
    assert not canary.exists()


@pytest.mark.parametrize("way", PICKLES[::3])
def test_a_pickle_beside_the_files_is_not_looked_at(way: str, artifact: Path, tmp_path: Path) -> None:
    store = ResumeStore(tmp_path / "resume")
    store.write({"epoch": 1}, constant={}, version="a")
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "pytorch_model.bin", "best.pt"):
        for folder in (artifact, store.path):
            (folder / name).write_bytes(pickles(tmp_path / "canary")[way])
    assert load_artifact(artifact).class_names == tuple(NAMES)
    assert store.read() == ({"epoch": 1}, {})
    assert not (tmp_path / "canary").exists()


# --- saved models: every bit counts


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_every_changed_byte_is_found(name: str, saved: Path, artifact: Path) -> None:
    whole = (saved / name).read_bytes()
    kept = json.loads(whole) if name == CONFIG else None
    for position in range(0, len(whole), len(whole) // 60):
        changed = bytearray(whole)
        changed[position] ^= 1
        (artifact / name).write_bytes(changed)
        try:
            read_weights(artifact)
        except ArtifactError:
            continue
        assert kept is not None, position
        assert json.loads(changed) == kept  # a space that became another


def test_a_value_that_was_changed_by_hand_is_found(artifact: Path) -> None:
    text = (artifact / CONFIG).read_text(encoding="utf-8")
    for before, after in (('"lr": 0.1', '"lr": 0.2'), ('"ant"', '"fly"'), ('"dropout": 0.0', '"dropout": 0.5')):
        assert before in text
        (artifact / CONFIG).write_text(text.replace(before, after), encoding="utf-8")
        assert "it is not as it was written: its checksum differs" in refusal(partial(load_artifact, artifact))


def test_weights_and_config_of_two_models_are_not_mixed(saved: Path, artifact: Path, tmp_path: Path) -> None:
    other = save_artifact(create_model(MODEL, class_names=NAMES, weights=None, image_size=32, seed=1), tmp_path / "b")
    (artifact / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    text = refusal(partial(load_artifact, artifact))
    assert "it is not the one that config.json was saved with, for its checksum differs" in text


# --- saved models: the config


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:me/bees", "local-dir:/tmp", "timm/hf-hub:me/bees", "timm/local-dir:/tmp", "timm/../resnet18"),
        *("timm/resnet18/x", "timm/resnet18.a.b", "timm/", "timm/resnet18.../x", "/etc/passwd", "../resnet18", ""),
        *("torchvision/resnet18.x/y", "timm\\resnet18", "timm/resnet18\n", "module/a/b", "module/", "other/resnet18"),
    ],
)
def test_a_name_becomes_no_path_and_no_download(name: str, artifact: Path) -> None:
    edit(artifact, backbone=name)
    assert "transferkit.backbone is " in refusal(partial(load_artifact, artifact))


@pytest.mark.parametrize("name", ["timm/no_such_network", "timm/resnet18.no_such_tag", "torchvision/resnet19"])
def test_a_name_that_no_library_knows_is_refused(name: str, artifact: Path) -> None:
    edit(artifact, backbone=name)
    assert "cannot be rebuilt" in refusal(partial(load_artifact, artifact))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("head__hidden_size", 10**9),
        ("head__hidden_size", 0),
        ("head__hidden_size", 2.0),
        ("head__dropout", 1.5),
        ("head__dropout", float("nan")),
        ("head__dropout", True),
        ("head__aux_weight", float("inf")),
        ("head__paths", []),
        ("head__paths", ["../x"]),
        ("head__paths", ["classifier"] * 101),
        ("head__extra", 1),
        ("preprocessing__size", 16_385),
        ("preprocessing__resize_size", 10**12),
        ("preprocessing__mean", [0.5] * 1_001),
        ("preprocessing__std", [0.1, float("nan"), 0.1]),
        ("preprocessing__crop", "../x"),
        ("arguments__img_size", 10**6),
        ("arguments__img_size", [32, 32]),
        ("arguments__patch_size", -1),
        ("arguments__window_size", 10**5),
        ("arguments__in_chans", 10**9),
        ("arguments__checkpoint_path", "/etc/passwd"),
        ("arguments__pretrained_cfg", {"url": "https://example.org"}),
        ("temperature", 0),
        ("weights", "x" * 10_001),
        ("weights", 5),
        ("stem", [{"path": "conv_stem", "before": [3, 2, 10**6], "after": [3, 1, 1]}]),
        ("stem", [{"path": "conv_stem", "before": None, "after": None, "code": "x"}]),
        ("small_images", "crop"),
        ("native", "yes"),
        ("weights_sha256", "x" * 64),
        ("pickle", "x"),
    ],
)
def test_a_field_outside_its_range_is_named(place: str, value: Any, artifact: Path) -> None:
    edit(artifact, **{place: value})
    text = refusal(partial(load_artifact, artifact))
    way, _, name = place.replace("__", ".").rpartition(".")
    assert f"transferkit{'.' if way else ''}{way}" in text
    assert name in text


@pytest.mark.parametrize(
    "values",
    [
        {"class_names": [str(number) for number in range(100_000)]},
        {"class_names": [str(number) for number in range(100_000)], "head__hidden_size": 1},
        {"head__hidden_size": 1_000_000},
        {"backbone": "timm/vit_giant_patch14_224"},
        {"backbone": "timm/beit_base_patch16_224", "arguments": {"img_size": 16_000}, "preprocessing__size": 16_000},
        {"backbone": "torchvision/regnet_y_128gf", "head__paths": ["fc"]},  # cannot be built without values
        {"backbone": "torchvision/vgg19", "head__paths": ["classifier.6"]},
        {"arguments": {"in_chans": 1_000}, "preprocessing__mean": [0.5] * 1_000, "preprocessing__std": [1.0] * 1_000},
    ],
)
def test_a_network_that_the_weights_are_not_for_is_never_built(values: dict[str, Any], artifact: Path) -> None:
    if "preprocessing__size" in values:
        values = {"preprocessing__resize_size": 16_000, **values}
    edit(artifact, **values)
    refusal(partial(load_artifact, artifact))


def test_what_a_network_needs_beside_its_weights_is_limited(tmp_path: Path) -> None:
    """A head with a hidden layer is small, but its library builds a wide one first."""
    model = create_model("timm/mobilenetv3_small_050", class_names=NAMES, weights=None, image_size=32, hidden_size=1)
    artifact = save_artifact(model, tmp_path)
    tensors, names = load_file(artifact / WEIGHTS), [str(number) for number in range(300_000)]
    tensors |= {"classifier.3.weight": torch.zeros(len(names), 1), "classifier.3.bias": torch.zeros(len(names))}
    save_file(tensors, artifact / WEIGHTS)
    edit(artifact, class_names=names, weights_sha256=hashlib.sha256((artifact / WEIGHTS).read_bytes()).hexdigest())
    text = refusal(partial(load_artifact, artifact))
    assert f"needs {4 * 1024 * len(names):,} bytes beside its weights, 1,073,741,824 at most" in text


@pytest.mark.parametrize("name", ["num_classes", "label_names"])
def test_fields_that_contradict_each_other_are_refused(name: str, artifact: Path) -> None:
    config = json.loads((artifact / CONFIG).read_text(encoding="utf-8"))
    config[name] = 4 if name == "num_classes" else NAMES[::-1]
    (artifact / CONFIG).write_text(json.dumps(sealed(config)), encoding="utf-8")
    assert "num_classes, label_names and transferkit.class_names disagree" in refusal(partial(load_artifact, artifact))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_of_a_config_is_taken_or_refused(saved: Path, data: st.DataObject) -> None:
    config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    holder: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.just(0))
        if not (isinstance(holder[key], dict | list) and holder[key] and data.draw(st.booleans())):
            break
        holder = holder[key]
    before = copy.deepcopy(config)
    holder[key] = data.draw(JSON)
    with suppress(ArtifactError):
        ArtifactConfig.from_dict(config)
        assert json.dumps(config, sort_keys=True) == json.dumps(before, sort_keys=True)  # no other has this checksum
    with suppress(TypeError, ValueError, AttributeError):  # some cannot have one
        config = sealed(config)
    with suppress(ArtifactError):
        ArtifactConfig.from_dict(config)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.text(max_size=30) | st.just("../../x") | st.just("\udc80"), min_size=1, unique=True))
def test_class_names_may_be_any_text(saved: Path, names: list[str]) -> None:
    config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    config["transferkit"]["class_names"] = config["label_names"] = names
    config["num_classes"] = len(names)
    assert ArtifactConfig.from_dict(json.loads(json.dumps(sealed(config)))).class_names == tuple(names)


def test_class_names_that_look_like_paths_or_are_no_utf8_are_saved_and_make_no_files(tmp_path: Path) -> None:
    names = ["../../x", "/etc/passwd", "a\nb", "\0", "\udc80", "", "x" * 255]
    model = create_model(MODEL, class_names=names, weights=None, image_size=32)
    folder = save_artifact(model, tmp_path / "artifact")
    assert load_artifact(folder).class_names == tuple(names)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["artifact", CONFIG, WEIGHTS]


# --- files that are none, and files that are too large


def linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def piped(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", [linked, dangling, piped, device, folder])
def test_only_plain_files_are_opened(damage: Callable[[Path], None], name: str, artifact: Path) -> None:
    damage(artifact / name)
    assert f"'{name}' is no plain file; put the file itself there" in refusal(partial(load_artifact, artifact))


@pytest.mark.parametrize("damage", [dangling, piped, device, folder])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_from_no_pipe_or_device(damage: Callable[[Path], None], suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.touch()
    damage(file)
    assert "no weights file at" in refusal(partial(create_model, MODEL, weights=file, num_classes=2), WeightsError)


def test_weights_may_be_a_link_as_in_the_hubs_cache(tmp_path: Path) -> None:
    save_file(dict(state_dict()), tmp_path / "weights.safetensors")
    linked(tmp_path / "weights.safetensors")
    assert len(read_state_dict(tmp_path / "weights.safetensors")) == len(state_dict())


def enlarged(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(2**40)


def test_files_that_are_too_large_are_refused_unread(saved: Path, artifact: Path, tmp_path: Path) -> None:
    enlarged(artifact / CONFIG)
    assert "config.json has 1,099,511,627,776 bytes, 16,777,216 at most" in refusal(partial(load_artifact, artifact))
    (artifact / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    enlarged(artifact / WEIGHTS)
    refusal(partial(load_artifact, artifact))
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"weights{suffix}"
        save_file(dict(state_dict()), file) if suffix == ".safetensors" else torch_file(file)
        enlarged(file)
        refusal(partial(read_state_dict, file), WeightsError)


@pytest.mark.parametrize("length", [2**24 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_is_too_large_is_refused_unread(length: int, artifact: Path, tmp_path: Path) -> None:
    content = length.to_bytes(8, "little") + b" " * (2**24 + 2)
    (artifact / WEIGHTS).write_bytes(content)
    assert f"its header claims {length:,} bytes, 16,777,216 at most" in refusal(partial(load_artifact, artifact))
    (tmp_path / "weights.safetensors").write_bytes(content)
    assert f"claims {length:,} bytes" in refusal(
        partial(read_state_dict, tmp_path / "weights.safetensors"), WeightsError
    )


# --- weights that torch wrote


def torch_file(file: Path, content: Any = None, **options: Any) -> Path:
    torch.save(dict(state_dict()) if content is None else content, file, **options)
    return file


def repacked(file: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file


def pickle_in(records: dict[str, bytes]) -> str:
    return next(name for name in records if name.endswith("data.pkl"))


def test_an_archive_that_was_packed_again_as_it_was_is_read(tmp_path: Path) -> None:
    file = repacked(torch_file(tmp_path / "weights.pth"), lambda records: None)
    assert read_state_dict(file).keys() == state_dict().keys()


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    file = repacked(torch_file(tmp_path / "weights.pth"), lambda records: None, zipfile.ZIP_DEFLATED)
    assert "its records are compressed" in refusal(partial(read_state_dict, file), WeightsError)


def test_records_that_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    file = torch_file(tmp_path / "weights.pth")
    whole = file.read_bytes()
    entries = [at for at in range(len(whole)) if whole[at : at + 4] == b"PK\x01\x02"]
    for at in entries[::20]:
        content = bytearray(whole)
        content[at + 20 : at + 28] = struct.pack("<LL", 2**31, 2**31)
        file.write_bytes(content)
        assert "its records claim more bytes than the file has" in refusal(partial(read_state_dict, file), WeightsError)


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    """Python's reader and torch's could each take another for the one that is meant."""
    first, second = torch_file(tmp_path / "a.pth").read_bytes(), torch_file(tmp_path / "b.pth", {"a": 1}).read_bytes()
    (tmp_path / "c.pth").write_bytes(first + second)
    assert "it is a damaged zip archive" in refusal(partial(read_state_dict, tmp_path / "c.pth"), WeightsError)


def test_two_pickles_in_one_archive_are_refused(tmp_path: Path) -> None:
    def doubled(records: dict[str, bytes]) -> None:
        name = pickle_in(records)
        records[name.upper()] = records[name]

    file = repacked(torch_file(tmp_path / "weights.pth"), doubled)
    assert "no pickle of torch.save, or more than one" in refusal(partial(read_state_dict, file), WeightsError)


def test_a_record_that_is_not_as_it_was_written_is_found(tmp_path: Path) -> None:
    file = torch_file(tmp_path / "weights.pth")
    content = bytearray(file.read_bytes())
    tensor = state_dict()["conv_stem.weight"].numpy().tobytes()
    content[content.index(tensor) + 5] ^= 1
    file.write_bytes(content)
    assert "is not as it was written" in refusal(partial(read_state_dict, file), WeightsError)


def test_an_archive_that_torch_wrote_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = torch_file(tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state_dict(file).keys() == state_dict().keys()


BOMBS = {
    "tuples in tuples": (b"\x80\x02}K\x01\x85q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns.", "a tuple of more than 10,000"),
    "a deep tuple": (b"\x80\x02}K\x01" + b"\x85" * 300_000 + b"Ns.", "a tuple of more than 10,000"),
    "a bytearray": (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "it makes a bytearray"),
    "many values": (b"\x80\x02(" + b"K\x01" * 4_000 + b"l.", "it holds more than 3,000 values"),
    "a long text": (b"\x80\x02X" + struct.pack("<L", 2**24) + b"x" * 2**24 + b".", "16,777,216 at most"),
    "no end": (b"\x80\x02", "pickle exhausted before seeing STOP"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_fill_the_memory_or_never_end_is_refused(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, reason = BOMBS[bomb]
    if bomb == "many values":
        monkeypatch.setattr(_torch_file, "_MOST_VALUES", 3_000)
    file = repacked(torch_file(tmp_path / "weights.pth"), lambda records: records.update({pickle_in(records): content}))
    assert reason in refusal(partial(read_state_dict, file), WeightsError)
    old = tmp_path / "old.pth"
    old.write_bytes(content)
    refusal(partial(read_state_dict, old), WeightsError)


def test_a_checkpoint_that_leads_to_itself_on_every_way_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for name in ("state_dict", "model", "teacher", "ema", "module", "network", "net", "student", "backbone", "encoder"):
        content[name] = {"deeper": content, "state_dict": content, "model": content, "net": content, "module": content}
    assert "not a state dict" in refusal(
        partial(read_state_dict, torch_file(tmp_path / "loop.pth", content)), WeightsError
    )


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 301, "." * 31, "\u202e"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_that_no_tensor_of_a_network_has_are_refused(name: str, suffix: str, tmp_path: Path) -> None:
    file, content = tmp_path / f"weights{suffix}", {name: torch.ones(1)}
    save_file(content, file) if suffix == ".safetensors" else torch.save(content, file)
    assert "which names no tensor of a network" in refusal(partial(read_state_dict, file), WeightsError)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state_dict, "_MOST_TENSORS", 200)
    content = {str(number): torch.empty(0) for number in range(201)}
    save_file(content, tmp_path / "weights.safetensors")
    assert "holds 201 tensors; a state dict has 200 at most" in refusal(
        partial(read_state_dict, tmp_path / "weights.safetensors"), WeightsError
    )


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_not_dense_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    file = torch_file(tmp_path / "weights.pth", {"a": tensor})
    assert "as something else than a dense tensor" in refusal(partial(read_state_dict, file), WeightsError)


def test_tensors_that_claim_much_more_than_the_file_are_refused(tmp_path: Path) -> None:
    file = torch_file(tmp_path / "weights.pth", {"a": torch.ones(1).expand(2**40)})
    assert "its tensors claim 4,398,046,511,104" in refusal(partial(read_state_dict, file), WeightsError)


def test_options_and_other_plain_values_beside_the_weights_are_no_hindrance(tmp_path: Path) -> None:
    betas = (0.9, 0.999)
    content = {
        "state_dict": dict(state_dict()),
        "optimizer": {"param_groups": [{"betas": betas, "params": list(range(99))} for _ in range(99)]},
        "args": argparse.Namespace(lr=0.1, betas=betas),
    }
    assert read_state_dict(torch_file(tmp_path / "weights.pth", content)).wrapper == "state_dict"


# --- values in weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_that_are_no_finite_numbers_are_refused_by_the_tensors_name(value: float, dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = network[0].weight.clone()
    state = {key: each.to(dtype) for key, each in nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict().items()}
    state["0.weight"][1, 1] = value
    with pytest.raises(WeightsError, match=r"mine holds values in 0.weight that are no finite numbers"):
        fit_state_dict(network, state, head_paths=["1"], source="mine")
    assert torch.equal(network[0].weight, before)


def test_a_number_that_the_network_cannot_hold_is_refused() -> None:
    state = {"0.weight": torch.full((2, 2), 1e300, dtype=torch.float64), "0.bias": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"mine holds values in 0.weight that are no finite numbers"):
        fit_state_dict(nn.Sequential(nn.Linear(2, 2)), state, head_paths=[], source="mine")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_whole_and_complex_numbers_are_no_weights(dtype: torch.dtype) -> None:
    state = {"0.weight": torch.ones(2, 2, dtype=dtype), "0.bias": torch.zeros(2)}
    with pytest.raises(WeightsError, match=rf"mine holds 0.weight as {dtype}, the network as torch.float32"):
        fit_state_dict(nn.Sequential(nn.Linear(2, 2)), state, head_paths=[], source="mine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_counters_of_batch_norms_may_be_of_any_real_kind(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.BatchNorm2d(2))
    state = {**nn.BatchNorm2d(2).state_dict(prefix="0."), "0.num_batches_tracked": torch.tensor(3, dtype=dtype)}
    fit_state_dict(network, state, head_paths=[], source="mine")
    assert network[0].num_batches_tracked == 3
    state["0.num_batches_tracked"] = torch.tensor(3j)
    with pytest.raises(WeightsError, match=r"mine holds 0.num_batches_tracked as torch.complex64"):
        fit_state_dict(network, state, head_paths=[], source="mine")


@pytest.mark.parametrize("shape", [(16, 0, 3, 3), (0, 3, 3, 3), (0,), (), (1,) * 40])
def test_kernels_of_odd_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({**state_dict(), "conv_stem.weight": torch.ones(shape)}, file)
    with suppress(WeightsError):  # one tensor of another shape is borne
        create_model(MODEL, weights=file, num_classes=3, image_size=32)
    save_file({key: torch.ones(shape) for key in state_dict()}, file)
    refusal(partial(create_model, MODEL, weights=file, num_classes=3, image_size=32), WeightsError)


def test_the_weights_of_a_saved_model_open_as_weights(saved: Path) -> None:
    model = create_model(MODEL, weights=saved / WEIGHTS, num_classes=3, image_size=32)
    stored = load_file(saved / WEIGHTS)
    assert torch.equal(model.network.conv_stem.weight, stored["conv_stem.weight"])


# --- all of it, many times


def fuzzed(count: int, seed: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 went wrong; planted code never ran" in done.stdout


@pytest.mark.skipif(not STATM.exists(), reason="the script reads its memory from /proc")
def test_damaged_files_open_as_they_were_or_are_refused() -> None:
    fuzzed(102, seed=0)  # each kind of damage twice


@pytest.mark.long
@pytest.mark.skipif(not STATM.exists(), reason="the script reads its memory from /proc")
def test_a_thousand_damaged_files_open_as_they_were_or_are_refused() -> None:
    fuzzed(1_000, seed=1)
