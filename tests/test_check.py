"""What a look at a folder finds, and what its exit code says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from test_cli import _restore_logging, run  # noqa: F401  # the fixture works by being here
from test_fingerprints import scene
from transferkit import Finetuner
from transferkit.check import DataCheck, check_data
from transferkit.exceptions import DataError
from transferkit.preprocessing import Preprocessing

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Make a folder with train/ and val/, two classes, six and three different pictures each."""

    def make(*, split: bool = True) -> Path:
        number = 0
        for part, count in (("train", 6), ("val", 3)) if split else (("", 9),):
            for name in ("ants", "bees"):
                place = tmp_path / "data" / part / name
                place.mkdir(parents=True)
                for index in range(count):
                    number += 1
                    scene(number).save(place / f"{index}.png")
        return tmp_path / "data"

    return make


def kinds(found: DataCheck) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.hurts) for finding in found.findings]


@pytest.mark.parametrize("split", [True, False])
def test_nothing_is_found_in_a_tidy_folder(folder: Folder, split: bool) -> None:
    found = check_data(folder(split=split))
    assert kinds(found) == []
    assert not found.hurts
    assert {part: sum(counts.values()) for part, counts in found.counts.items()} == (
        {"train": 12, "val": 6} if split else {"train": 14, "val": 4}
    )


@pytest.mark.parametrize(
    ("change", "near"),
    [
        (lambda picture: picture, ""),
        (lambda picture: picture.resize((100, 75)), "near "),
        (ImageOps.mirror, "near "),
    ],
    ids=["same", "resized", "mirrored"],
)
@pytest.mark.parametrize(
    ("copy", "kind", "hurts"),
    [
        ("val/ants/copy.png", ["leak"], True),
        ("train/bees/copy.png", ["two labels"], True),
        ("val/bees/copy.png", ["leak", "two labels"], True),
        ("train/ants/copy.png", ["duplicates"], False),
    ],
)
def test_copies_are_told_by_where_they_are(
    folder: Folder, change: Callable[[Image.Image], Image.Image], near: str, copy: str, kind: list[str], hurts: bool
) -> None:
    root = folder()
    original = root / "train" / "ants" / "0.png"
    if near:
        change(Image.open(original)).save(root / copy)
    else:
        shutil.copy(original, root / copy)
    found = check_data(root)
    assert sorted(kinds(found)) == sorted((near + each, hurts) for each in kind)
    assert {group for finding in found.findings for group in finding.pictures} == {
        tuple(str(path) for path in sorted([original, root / copy], key=lambda path: found_order(root, path)))
    }
    assert found.hurts is hurts


def found_order(root: Path, path: Path) -> tuple[bool, str, str]:
    part, label, name = path.relative_to(root).parts
    return part == "val", label, name


def test_a_copy_of_what_only_validates_is_no_leak(folder: Folder) -> None:
    root = folder()
    shutil.copy(root / "val" / "ants" / "0.png", root / "val" / "ants" / "copy.png")
    assert kinds(check_data(root)) == [("duplicates", False)]


def test_the_split_that_a_run_would_make_is_looked_at(folder: Folder) -> None:
    root = folder(split=False)
    for index in range(9):
        shutil.copy(root / "ants" / f"{index}.png", root / "ants" / f"copy-{index}.png")
    leaks = {seed: [f for f in check_data(root, seed=seed).findings if f.kind == "leak"] for seed in (0, 1)}
    assert leaks[0]
    assert leaks[0] != leaks[1]


def test_unreadable_files_are_named_with_their_cause(folder: Folder) -> None:
    root = folder()
    (root / "train" / "ants" / "0.png").write_bytes(b"")
    found = check_data(root)
    assert kinds(found) == [("unreadable", True)]
    assert dict(found.unreadable) == {str(root / "train" / "ants" / "0.png"): "the file is empty"}
    assert "0.png (the file is empty)" in found.findings[0].message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "train" / "none").mkdir(), "no pictures in class folder 'none'"),
        (lambda root: shutil.move(root / "val" / "ants", root / "val" / "wasps"), "class 'wasps', which is not among"),
        (lambda root: shutil.rmtree(root / "train"), "no train with a folder per class"),
        (lambda root: shutil.rmtree(root / "train" / "bees"), "only one class"),
    ],
    ids=["empty class", "class in val alone", "no train", "one class"],
)
def test_what_a_run_would_refuse_is_found_with_all_else(
    folder: Folder, spoil: Callable[[Path], object], words: str
) -> None:
    root = folder()
    (root / "val" / "bees" / "0.png").write_bytes(b"")
    spoil(root)
    found = check_data(root)
    assert [kind for kind, hurts in kinds(found) if hurts] == ["structure", "unreadable"]
    assert words in found.findings[0].message


def test_classes_are_compared(folder: Folder) -> None:
    root = folder()
    for number in range(10, 70):
        scene(number + 1000).save(root / "train" / "bees" / f"{number}.png")
    for number in range(2, 6):
        (root / "train" / "ants" / f"{number}.png").unlink()
    shutil.rmtree(root / "val" / "ants")
    found = check_data(root)
    assert kinds(found) == [("missing class", False), ("few pictures", False), ("imbalance", False)]
    assert "--balanced" in found.findings[2].message


def test_odd_pictures_are_mentioned(folder: Folder) -> None:
    root = folder()
    place = root / "train" / "ants"
    scene(900).convert("CMYK").save(place / "cmyk.tif")
    scene(901).resize((900, 60)).save(place / "long.png")
    scene(902).resize((20, 24)).save(place / "small.png")
    found = check_data(root)
    assert kinds(found) == [("modes", False), ("shapes", False), ("sizes", False)]
    assert [Path(finding.pictures[0][0]).name for finding in found.findings] == ["cmyk.tif", "long.png", "small.png"]
    assert "1 CMYK" in found.findings[0].message


def test_what_is_left_out_is_listed(folder: Folder) -> None:
    root = folder()
    for name in ("train/ants/notes.txt", "train/loose.png", "train/ants/.hidden.png"):
        shutil.copy(root / "val" / "bees" / "0.png", root / name)
    (root / "train" / "bees" / ".cache").mkdir()
    messages = [finding.message for finding in check_data(root).findings]
    assert len(messages) == 3
    assert messages[0].startswith("1 picture(s) in no class folder: ")
    assert messages[1].startswith("1 file(s) that are no pictures: ")
    assert messages[2].startswith("2 hidden file(s) or folder(s): ")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        check_data(tmp_path / "nowhere")


def test_the_terminal_shows_counts_findings_and_a_verdict(folder: Folder) -> None:
    root = folder()
    stdout, _ = run("check", root)
    assert stdout.splitlines() == [
        "class  train  val",
        "ants   6      3",
        "bees   6      3",
        "all    12     6",
        "",
        "nothing found that would hurt",
    ]
    shutil.copy(root / "train" / "ants" / "0.png", root / "val" / "ants" / "copy.png")
    (root / "train" / "ants" / "notes.txt").touch()
    lines = run("check", root, expect=1)[0].splitlines()
    assert lines[5].startswith("! leak: 1 set(s) of identical files are trained on and validated on")
    assert lines[6].startswith("- left out: 1 file(s) that are no pictures: ")
    assert lines[7] == "something here would hurt (!)"


def test_json_stands_alone_and_says_all(folder: Folder) -> None:
    root = folder()
    shutil.copy(root / "train" / "ants" / "0.png", root / "val" / "ants" / "copy.png")
    found = json.loads(run("check", root, "--json", expect=1)[0])
    assert found == check_data(root).to_dict()
    assert found["findings"][0]["pictures"] == [
        [str(root / "train" / "ants" / "0.png"), str(root / "val" / "ants" / "copy.png")]
    ]


def test_a_run_warns_of_identical_files_that_would_hurt(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    root = folder()
    shutil.copy(root / "train" / "ants" / "0.png", root / "train" / "ants" / "copy.png")
    tuner = Finetuner("timm/test_resnet", weights=None, image_size=32, epochs=1, progress=False)
    tuner.fit(root)
    assert "identical" not in caplog.text
    shutil.copy(root / "train" / "ants" / "0.png", root / "val" / "bees" / "copy.png")
    tuner.fit(root)
    assert "1 set(s) of identical files are trained on and validated on" in caplog.text
    assert "have two labels" in caplog.text


def test_progress_counts_all_files(folder: Folder) -> None:
    seen: list[tuple[int, int]] = []
    check_data(folder(), on_progress=lambda done, count: seen.append((done, count)))
    assert seen[-1] == (18, 18)


def test_features_that_an_earlier_run_kept_find_copies_that_were_changed_more(folder: Folder, tmp_path: Path) -> None:
    root = folder()
    original = root / "train" / "ants" / "0.png"
    with Image.open(original) as picture:
        picture.convert("RGB").rotate(180).save(root / "val" / "ants" / "turned.png")
    assert kinds(check_data(root)) == []
    cache = tmp_path / "cache"
    # The network sees an upside-down picture as the same: its pictures are averaged over their places.
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 5),
    )
    tuner = Finetuner(
        network,
        weights=None,
        policy="head",
        epochs=1,
        train_preset="none",
        num_workers=0,
        cache_dir=cache,
        progress=False,
        preprocessing=Preprocessing(size=64, resize_size=64),
    )
    tuner.fit(root)
    found = check_data(root, cache_dir=cache)
    assert ("near leak", True) in kinds(found)
    [leak] = [finding for finding in found.findings if finding.kind == "near leak"]
    assert (str(original), str(root / "val" / "ants" / "turned.png")) in leak.pictures
    out, _ = run("check", root, "--cache-dir", cache, expect=1)
    assert "near leak" in out


@pytest.mark.parametrize("content", [None, "no json", '{"facts": 1}'])
def test_a_cache_that_holds_nothing_of_use_changes_nothing(folder: Folder, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cache" / "one").mkdir(parents=True)
        (tmp_path / "cache" / "one" / "activations.json").write_text(content)
    assert kinds(check_data(folder(), cache_dir=tmp_path / "cache")) == []
