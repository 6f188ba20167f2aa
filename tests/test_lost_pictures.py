"""Pictures that go bad or vanish after a run has begun: left out and listed, or named as what stopped it."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transferkit import Callback, Finetuner
from transferkit.data import image_folder
from transferkit.exceptions import PictureError
from transferkit.loading import Batches, loader
from transferkit.preprocessing import Preprocessing
from transferkit.resident import ResidentBatches
from transferkit.sources import PictureData
from transferkit.transforms import Transform, imagenet_eval, light

SMALL = Preprocessing(size=8, resize_size=8)


@pytest.fixture
def folder(picture_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(picture_folder, tmp_path / "data"))


@pytest.fixture
def data(folder: Path) -> PictureData:
    return image_folder(folder)


def batches_of(
    data: PictureData, lost: dict[str, str] | None, *, train: bool, transform: Transform | None = None, **options: Any
) -> Batches:
    source = data.train if train else data.val
    given = {"batch_size": 4, "seed": 3, **options}
    return loader(source, transform or (light if train else imagenet_eval)(SMALL), train=train, lost=lost, **given)


def path_of(data: PictureData, index: int, *, train: bool) -> Path:
    return Path((data.train if train else data.val).name(index))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:200])])
def test_a_lost_picture_makes_its_batch_smaller_and_changes_no_other(
    data: PictureData, num_workers: int, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    lost: dict[str, str] = {}
    batches = batches_of(data, lost, train=True, num_workers=num_workers)
    batches.sampler.set_epoch(1)
    whole = list(batches)
    keys = list(batches.batch_keys())
    gone = keys[2][1][1]
    path = path_of(data, gone, train=True)
    damage(path)
    left = list(batches)
    assert len(left) == len(whole)
    for number, ((images, labels), (all_images, all_labels)) in enumerate(zip(left, whole, strict=True)):
        kept = [place for place in range(len(all_labels)) if (number, place) != (2, 1)]
        assert torch.equal(images, all_images[kept])
        assert torch.equal(labels, all_labels[kept])
    assert list(lost) == [str(path)]
    list(batches)
    assert sum("left out from here on" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_a_place_to_note_it_a_lost_picture_stops_with_its_name(data: PictureData, num_workers: int) -> None:
    batches = batches_of(data, None, train=True, num_workers=num_workers)
    path = path_of(data, 5, train=True)
    path.unlink()
    with pytest.raises(PictureError, match=f"cannot read picture {path}: there is no such file"):
        list(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_to_train_on_of_which_nothing_is_left_stops_and_names_its_pictures(
    data: PictureData, num_workers: int
) -> None:
    batches = batches_of(data, {}, train=True, num_workers=num_workers)
    paths = [path_of(data, index, train=True) for _, index, _ in list(batches.batch_keys())[1]]
    for path in paths:
        path.unlink()
    with pytest.raises(PictureError, match="no picture of a whole batch can be read any more") as caught:
        list(batches)
    assert all(str(path) in str(caught.value) for path in paths)


def test_a_batch_to_validate_on_of_which_nothing_is_left_does_not_come(data: PictureData) -> None:
    lost: dict[str, str] = {}
    batches = batches_of(data, lost, train=False)
    whole = list(batches)
    for index in range(4, 8):
        path_of(data, index, train=False).unlink()
    rows = [rows for rows, _ in batches.with_rows()]
    assert [labels.tolist() for _, labels in batches] == [labels.tolist() for _, labels in (whole[0], *whole[2:])]
    assert rows == [[0, 1, 2, 3], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]
    assert len(lost) == 4


@pytest.mark.parametrize("train", [True, False])
def test_pictures_that_stay_on_the_device_are_kept_without_the_lost_ones(data: PictureData, train: bool) -> None:
    wanted = list(ResidentBatches(batches_of(data, {}, train=train), torch.device("cpu")))
    lost: dict[str, str] = {}
    batches = batches_of(data, lost, train=train)
    _, gone, _ = list(batches.batch_keys())[1][0]
    path_of(data, gone, train=train).unlink()
    found = list(ResidentBatches(batches, torch.device("cpu")))
    assert [len(labels) for _, labels in found] == [len(labels) - (n == 1) for n, (_, labels) in enumerate(wanted)]
    assert torch.equal(found[1][0], wanted[1][0][1:])
    assert torch.equal(found[2][0], wanted[2][0])
    assert len(lost) == 1


class Vandal(Callback):
    """Deletes pictures when an epoch begins."""

    def __init__(self, epoch: int, *paths: Path) -> None:
        self.epoch, self.paths = epoch, paths

    def on_train_epoch_start(self, trainer: Any) -> None:
        if trainer.epoch == self.epoch:
            for path in self.paths:
                path.unlink()


def tuner_with(callback: Callback, output: Path, **settings: Any) -> Finetuner:
    return Finetuner(
        "timm/test_efficientnet",
        weights=None,
        image_size=32,
        batch_size=4,
        num_workers=0,
        device="cpu",
        progress=False,
        callbacks=[callback],
        output_dir=output,
        **{"epochs": 3, "on_bad_image": "skip", **settings},
    )


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({"policy": "full"}, 1),
        ({"policy": "head", "train_preset": "none"}, 0),  # before the frozen pass
        ({"policy": "head", "train_preset": "light", "views": 2}, 1),  # the first view has them, the second has not
        ({"policy": "full", "resident": True, "train_preset": "light"}, 0),
    ],
    ids=["every epoch", "kept", "kept views", "resident"],
)
def test_a_run_goes_on_without_pictures_that_vanish_and_lists_them(
    folder: Path, tmp_path: Path, settings: dict[str, Any], epoch: int
) -> None:
    gone = [folder / "train" / "blue" / "0.jpg", folder / "val" / "red" / "1.png"]
    seen_in_validation = settings["policy"] == "full" and "resident" not in settings
    tuner = tuner_with(Vandal(epoch, *gone), tmp_path / "run", **settings)
    history = tuner.fit(folder)
    assert len(history) == 3
    assert str(gone[0]) in tuner.data.left_out
    if seen_in_validation or epoch == 0:
        assert str(gone[1]) in tuner.data.left_out
    with (tmp_path / "run" / "bad_images.csv").open(newline="", encoding="utf-8") as file:
        assert {row["path"]: row["cause"] for row in csv.DictReader(file)} == tuner.data.left_out


def test_raise_stops_a_run_at_a_picture_that_vanishes(folder: Path, tmp_path: Path) -> None:
    gone = folder / "train" / "green" / "3.png"
    tuner = tuner_with(Vandal(1, gone), tmp_path / "run", policy="full", on_bad_image="raise")
    with pytest.raises(PictureError, match="there is no such file"):
        tuner.fit(folder)
    assert len(tuner.history) == 1


def test_activations_without_a_lost_picture_are_not_kept_for_later_runs(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "transferkit")
    gone = folder / "train" / "blue" / "0.jpg"

    class DuringThePass(Callback):
        def on_frozen_pass_batch_end(self, trainer: Any) -> None:
            if trainer.frozen_pass[0] == 1:
                (folder / "train" / "red" / "11.png").unlink(missing_ok=True)

    settings = {"policy": "head", "train_preset": "none", "cache_dir": tmp_path / "cache"}
    tuner_with(DuringThePass(), tmp_path / "first", **settings).fit(folder)
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1, "the training pictures lost one, the validation pictures none"
    gone.unlink()
    caplog.clear()
    tuner_with(Callback(), tmp_path / "second", **settings).fit(folder)
    assert sum("those of an earlier run" in record.message for record in caplog.records) == 1
