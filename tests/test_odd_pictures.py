"""A folder as people have them: every good picture is used and looks right, every bad one is named with its cause."""

from __future__ import annotations

import csv
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import odd_pictures
from test_cli import NETWORK, _restore_logging, run  # noqa: F401  # the fixture works by being here
from transferkit import Finetuner, image_folder
from transferkit.check import check_data
from transferkit.exceptions import DataError, PictureError, SettingError
from transferkit.pictures import read_picture
from transferkit.scan import scan_pictures

QUICK = {"weights": None, "image_size": 32, "epochs": 1, "progress": False, "batch_size": 8}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[odd_pictures.Odd]]:
    folder = tmp_path_factory.mktemp("good")
    return folder, list(odd_pictures.good(folder))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, list(odd_pictures.bad(folder))


@pytest.fixture(scope="module")
def dirty(
    good: tuple[Path, list[odd_pictures.Odd]],
    bad: tuple[Path, list[str]],
    picture_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, set[str]]:
    """A data folder with all of them, bad ones in training and validation, and the names of these."""
    root = tmp_path_factory.mktemp("dirty")
    shutil.copytree(picture_folder / "train" / "red", root / "train" / "red")
    shutil.copytree(picture_folder / "val" / "red", root / "val" / "red")
    shutil.copytree(picture_folder / "val" / "blue", root / "val" / "odd")
    (root / "train" / "odd").mkdir()
    names = set()
    for each in good[0].iterdir():
        (root / "train" / "odd" / each.name).symlink_to(each)
    for number, name in enumerate(bad[1]):
        place = root / ("val" if number % 4 == 0 else "train") / "odd" / name
        place.symlink_to(bad[0] / name)
        names.add(str(place))
    return root, names


def test_there_are_at_least_sixty_kinds(good: tuple[Path, list[odd_pictures.Odd]], bad: tuple[Path, list[str]]) -> None:
    assert len(good[1]) + len(bad[1]) >= 100
    assert len({each.name for each in good[1]}) == len(good[1])


def test_every_good_picture_looks_right_without_a_warning(good: tuple[Path, list[odd_pictures.Odd]]) -> None:
    folder, pictures = good
    wrong = []
    for name, expected, tolerance in pictures:
        with warnings.catch_warnings(action="error"):
            picture = read_picture(folder / name)
        if (picture.mode, picture.size) != ("RGB", expected.size):
            wrong.append(f"{name}: {picture.mode} {picture.size}")
            continue
        apart = np.abs(np.asarray(picture, dtype=float) - np.asarray(expected, dtype=float)).mean()
        if apart > tolerance:
            wrong.append(f"{name}: {apart:.1f} levels apart")
    assert not wrong


def test_every_bad_picture_is_named_with_its_cause(bad: tuple[Path, list[str]]) -> None:
    folder, names = bad
    started = time.monotonic()
    for name in names:
        with pytest.raises(PictureError) as caught, warnings.catch_warnings(action="error"):
            read_picture(folder / name)
        error = caught.value
        assert error.path == str(folder / name)
        assert error.cause
        assert "\n" not in str(error)
        assert str(error) == f"cannot read picture {folder / name}: {error.cause}; replace or remove it"
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "its content is no picture pillow can decode"),
        ("document.jpg", "its content is no picture pillow can decode"),
        ("half.jpg", "truncated"),
        ("bomb.png", "it has more than 178,956,970 pixels"),
        ("dangling.jpg", "there is no such file"),
        ("pipe.jpg", "it is a pipe, a device or a socket"),
        ("device.png", "it is a pipe, a device or a socket"),
        ("socket.png", "it is a pipe, a device or a socket"),
    ],
)
def test_causes_are_plain(bad: tuple[Path, list[str]], name: str, cause: str) -> None:
    [facts] = scan_pictures([str(bad[0] / name)], remember=False)
    assert facts.cause is not None
    assert cause in facts.cause.lower()


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(PictureError, match="it is a folder"):
        read_picture(tmp_path / "x.png")


def test_the_scan_says_the_same_as_reading(
    good: tuple[Path, list[odd_pictures.Odd]], bad: tuple[Path, list[str]]
) -> None:
    for facts, (name, expected, _) in zip(
        scan_pictures([str(good[0] / each.name) for each in good[1]], remember=False), good[1], strict=True
    ):
        assert facts.cause is None, (name, facts.cause)
        assert (facts.width, facts.height) == expected.size, name
    assert all(facts.cause for facts in scan_pictures([str(bad[0] / name) for name in bad[1]], remember=False))


def test_check_names_every_bad_file(dirty: tuple[Path, set[str]]) -> None:
    root, names = dirty
    found = json.loads(run("check", root, "--json", expect=1)[0])
    assert found["unreadable"].keys() == names
    assert all(found["unreadable"].values())
    assert found["hurts"]
    assert check_data(root).to_dict() == found  # from what is remembered


def test_raise_names_the_files_before_anything_is_trained(dirty: tuple[Path, set[str]], tmp_path: Path) -> None:
    root, names = dirty
    tuner = Finetuner("timm/test_resnet", **QUICK, output_dir=tmp_path / "run")
    with pytest.raises(
        PictureError, match=rf"^{len(names)} of \d+ pictures cannot be read: .* and {len(names) - 5} more"
    ):
        tuner.fit(root)
    assert not any((tmp_path / "run").iterdir())
    _, message = run("finetune", root, *NETWORK, "--on-bad-image", "raise", "--output", tmp_path / "run", expect=2)
    assert "cannot be read" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_uses_every_good_picture_and_lists_the_bad(
    dirty: tuple[Path, set[str]], tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root, names = dirty
    tuner = Finetuner(
        "timm/test_resnet", **QUICK, on_bad_image="skip", num_workers=workers, output_dir=tmp_path / "run"
    )
    tuner.fit(root)
    assert tuner.data is not None
    listed = image_folder(root)
    assert len(tuner.data.train) + len(tuner.data.val) == len(listed.train) + len(listed.val) - len(names)
    assert tuner.data.left_out.keys() == names
    with (tmp_path / "run" / "bad_images.csv").open(encoding="utf-8", newline="") as file:
        rows = dict(csv.reader(file))
    assert rows.pop("path") == "cause"
    assert rows == dict(tuner.data.left_out)
    assert f"{len(names)} of " in caplog.text


def test_the_command_line_goes_the_whole_way(
    dirty: tuple[Path, set[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, names = dirty
    stdout, _ = run("finetune", root, *NETWORK, "--epochs", 1, "--output", tmp_path / "run", "--json")
    assert json.loads(stdout)["classes"] == ["odd", "red"]
    assert f"{len(names)} of " in caplog.text
    measured = json.loads(run("evaluate", tmp_path / "run", root, "--json")[0])
    held_out = [path for path in (root / "val").rglob("*") if not path.is_dir() and str(path) not in names]
    assert measured["count"] == len(held_out)
    predicted = json.loads(run("predict", tmp_path / "run", root / "train" / "odd", "--json")[0])["predictions"]
    found = {each["path"] for each in predicted}
    assert found == {str(path) for path in (root / "train" / "odd").iterdir() if str(path) not in names}
    bad_ones = sorted(names)[:2]
    _, message = run("predict", tmp_path / "run", *bad_ones, expect=2)
    assert "2 of 2 pictures cannot be read" in message
    _, message = run("predict", tmp_path / "run", root / "train" / "odd", "--on-bad-image", "raise", expect=2)
    assert "cannot be read" in message


def test_a_class_without_a_readable_picture_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(picture_folder, root)
    for path in (root / "train" / "red").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no picture of class 'red' can be read"):
        Finetuner("timm/test_resnet", **QUICK, on_bad_image="skip").fit(root)


def test_no_readable_picture_to_validate_on_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(picture_folder, root)
    for path in (root / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no picture to validate on can be read"):
        Finetuner("timm/test_resnet", **QUICK, on_bad_image="skip").fit(root)


def test_a_choice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingError, match="on_bad_image='ignore'; it can be raise or skip"):
        Finetuner("timm/test_resnet", on_bad_image="ignore")
