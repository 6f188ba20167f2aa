"""Prediction picture by picture: streamed, from several views, with a confidence that is asked for, into a table."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from test_cli import _restore_logging, run  # noqa: F401  # the fixture works by being here
from transferkit import evaluation
from transferkit.calibration import LEAST_PICTURES
from transferkit.exceptions import OutputError, PictureError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.model import TransferModel
from transferkit.prediction import Prediction, predict, save_predictions, stream_predictions
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import eval_transform
from transferkit.tta import TTA

Model = Callable[..., TransferModel]
WHOLE = ("--batch-size", 32)  # all in one batch, so that no process is started for it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("prediction") / "run"
    tuner = Finetuner(
        "timm/test_efficientnet",
        weights=None,
        epochs=3,
        policy="full",
        lr=3e-3,
        image_size=32,
        batch_size=8,
        num_workers=0,
        device="cpu",
        progress=False,
        output_dir=folder,
    )
    tuner.fit(picture_folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of seven pictures of noise, named 0.png to 6.png."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(7):
        Image.fromarray(rng.integers(0, 256, (50, 44, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def shares_of(predictions: list[Prediction]) -> torch.Tensor:
    return torch.tensor([list(each.probabilities.values()) for each in predictions], dtype=torch.float64)


def by_hand(model: TransferModel, views: list[Image.Image], preprocessing: Preprocessing) -> torch.Tensor:
    """Average the probabilities of one picture's views, which are prepared one by one."""
    transform = eval_transform(model.eval_preset, preprocessing)
    with torch.no_grad():
        logits = model.eval()(torch.stack([transform(view) for view in views]))
    return torch.softmax(logits.double(), 1).mean(0)


# Several views


def test_flip_averages_the_picture_and_its_mirror_image(tiny_model: Model, pictures: Path) -> None:
    model = tiny_model()
    model.preprocessing = Preprocessing(size=32, resize_size=32, crop="squash")  # whose mirror image loses no column
    images = [Image.open(file) for file in sorted(pictures.iterdir())]
    expected = [by_hand(model, [each, ImageOps.mirror(each)], model.preprocessing) for each in images]
    torch.testing.assert_close(shares_of(predict(model, images, tta="flip")), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("resize_size", [32, 36, 48])
@pytest.mark.parametrize("crop", ["center", "squash", "border"])
def test_crops_averages_the_centre_and_the_corners(
    tiny_model: Model, pictures: Path, resize_size: int, crop: str
) -> None:
    model = tiny_model()
    model.preprocessing = Preprocessing(size=32, resize_size=resize_size, crop=crop)
    side = max(resize_size, 37)  # 32 and a seventh
    images = [Image.open(file) for file in sorted(pictures.iterdir())]
    whole = eval_transform("imagenet", Preprocessing(size=side, resize_size=side, crop=crop))
    with torch.no_grad():
        expected = [
            torch.softmax(model.eval()(torch.stack(v2.FiveCrop(32)(whole(each)))).double(), 1).mean(0)
            for each in images
        ]
    torch.testing.assert_close(shares_of(predict(model, images, tta="crops")), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tta", TTA)
@pytest.mark.parametrize("preset", ["imagenet", "cifar"])
def test_views_give_the_same_at_every_call_in_workers_and_on_the_fast_path(
    tiny_model: Model, pictures: Path, monkeypatch: pytest.MonkeyPatch, tta: str, preset: str
) -> None:
    model = tiny_model()
    model.eval_preset = preset
    once = shares_of(predict(model, pictures, tta=tta))
    assert torch.equal(once, shares_of(predict(model, pictures, tta=tta)))
    assert not torch.allclose(once, shares_of(predict(model, pictures)), atol=1e-6)
    others = [shares_of(predict(model, pictures, tta=tta, batch_size=3, num_workers=1))]
    monkeypatch.setattr(evaluation, "_WORTH", 0)
    others.append(shares_of(predict(model, pictures, tta=tta)))
    for other in others:
        torch.testing.assert_close(other, once, atol=1e-4, rtol=0)


def test_the_mirror_image_of_what_is_its_own_mirror_image_changes_nothing(tiny_model: Model) -> None:
    half = np.random.default_rng(0).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    symmetric = torch.from_numpy(np.concatenate([half, half[:, ::-1]], 1).copy()).permute(2, 0, 1)
    model = tiny_model()
    model.preprocessing = Preprocessing(size=32, resize_size=32)
    torch.testing.assert_close(
        shares_of(predict(model, symmetric, tta="flip")), shares_of(predict(model, symmetric)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("tta", [None, *TTA])
def test_evaluate_measures_what_predict_says(trained: Path, picture_folder: Path, tta: str | None) -> None:
    tuner = Finetuner.load(trained, device="cpu", num_workers=0)
    said = tuner.predict(picture_folder / "val", tta=tta)
    result = tuner.evaluate(picture_folder / "val", tta=tta)
    names = [Path(each.path or "").parent.name for each in said]
    right = [each.label == name for each, name in zip(said, names, strict=True)]
    assert result["accuracy"] == sum(right) / len(right)
    loss = -np.mean([np.log(each.probabilities[name]) for each, name in zip(said, names, strict=True)])
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
    low, high = result["accuracy_interval"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert 0 <= result["ece"] <= 1


def test_a_way_that_does_not_exist_is_refused(tiny_model: Model, pictures: Path) -> None:
    with pytest.raises(SettingError, match="tta='spin'; it can be flip or crops, or None"):
        predict(tiny_model(), pictures, tta="spin")


# One after the other


def test_pictures_are_read_as_they_are_asked_for(tiny_model: Model, pictures: Path) -> None:
    stream = stream_predictions(tiny_model(), pictures, batch_size=2, on_bad_image="skip")
    first = next(stream)
    assert first.path == str(pictures / "0.png")
    (pictures / "6.png").unlink()
    assert [Path(each.path or "").name for each in stream] == [f"{index}.png" for index in range(1, 6)]


def test_what_was_predicted_is_not_kept(tiny_model: Model, pictures: Path) -> None:
    alive = []
    for _ in stream_predictions(tiny_model(), pictures, batch_size=3):
        alive.append(sum(isinstance(each, Prediction) for each in gc.get_objects()))
    assert len(alive) == 7
    assert max(alive) <= min(alive) + 1


@pytest.mark.parametrize("mode", [True, False])
def test_between_two_predictions_the_model_is_in_its_own_mode(tiny_model: Model, pictures: Path, mode: bool) -> None:
    model = tiny_model().train(mode)
    expected = predict(model, pictures, batch_size=2)
    found = []
    for each in stream_predictions(model, pictures, batch_size=2):
        assert all(module.training == mode for module in model.modules())
        assert torch.is_grad_enabled()
        found.append(each)
    assert found == expected


def test_progress_is_told_after_each_batch(tiny_model: Model, pictures: Path) -> None:
    told: list[tuple[int, int]] = []
    list(stream_predictions(tiny_model(), pictures, batch_size=3, on_progress=lambda *numbers: told.append(numbers)))
    assert told == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_skip_leaves_out_what_cannot_be_read_and_raise_names_all_of_it(
    tiny_model: Model, pictures: Path, num_workers: int
) -> None:
    for name in ("1.png", "4.png", "5.png"):
        (pictures / name).write_bytes(b"no picture")
    options: dict[str, Any] = {"batch_size": 2, "num_workers": num_workers}
    said = predict(tiny_model(), pictures, on_bad_image="skip", **options)
    assert [Path(each.path or "").name for each in said] == ["0.png", "2.png", "3.png", "6.png"]
    alone = [predict(tiny_model(), each.path or "")[0] for each in said]
    torch.testing.assert_close(shares_of(said), shares_of(alone), atol=1e-5, rtol=0)
    with pytest.raises(PictureError, match=r"^3 of 7 pictures cannot be read: .*1\.png .*4\.png .*5\.png"):
        predict(tiny_model(), pictures, on_bad_image="raise", **options)
    bad = [pictures / name for name in ("1.png", "4.png", "5.png")]
    with pytest.raises(PictureError, match=r"^3 of 3 pictures cannot be read"):
        predict(tiny_model(), bad, on_bad_image="skip", **options)


def test_wrong_settings_are_told_before_the_first_picture_is_asked_for(tiny_model: Model, pictures: Path) -> None:
    for options, words in (
        ({"min_confidence": 1.5}, "min_confidence must be from 0 to 1, got 1.5"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore'"),
        ({"batch_size": 0}, "batch_size must be from 1"),
    ):
        with pytest.raises(SettingError, match=words):
            stream_predictions(tiny_model(), pictures, **options)


# Confidence


def test_a_prediction_is_accepted_from_the_confidence_on_that_was_asked_for(tiny_model: Model, pictures: Path) -> None:
    plain = predict(tiny_model(), pictures)
    assert all(each.accepted for each in plain)
    asked = sorted(each.confidence for each in plain)[3]
    said = predict(tiny_model(), pictures, min_confidence=asked)
    assert [each.accepted for each in said] == [each.confidence >= asked for each in plain]
    assert sum(each.accepted for each in said) == 4
    assert [each.label for each in said] == [each.label for each in plain]


# Tables


def rows_of(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        return list(csv.reader(text))


def test_a_table_has_a_row_per_picture_and_the_classes_that_were_asked_for(
    tiny_model: Model, pictures: Path, tmp_path: Path
) -> None:
    said = predict(tiny_model(), pictures)
    file = tmp_path / "new" / "said.csv"
    assert save_predictions(iter(said), file) == 7
    head, *rows = rows_of(file)
    assert head == ["path", "label", "confidence"]
    assert [(row[0], row[1], float(row[2])) for row in rows] == [
        (each.path, each.label, pytest.approx(each.confidence, abs=1e-6)) for each in said
    ]
    save_predictions(said, file, top=2)
    head, *rows = rows_of(file)
    assert head[3:] == ["class_1", "probability_1", "class_2", "probability_2"]
    assert [row[3::2] for row in rows] == [[name for name, _ in each.top(2)] for each in said]
    save_predictions(said, file, top=5)
    assert {len(row) for row in rows_of(file)} == {3 + 2 * 5}
    assert [each.name for each in file.parent.iterdir()] == ["said.csv"]


def test_what_is_not_accepted_has_no_label(tiny_model: Model, pictures: Path, tmp_path: Path) -> None:
    said = predict(tiny_model(), pictures, min_confidence=1.0)
    save_predictions(said, tmp_path / "said.csv", top=2)
    rows = rows_of(tmp_path / "said.csv")[1:]
    assert {row[1] for row in rows} == {""}
    assert [row[3] for row in rows] == [each.label for each in said]


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
EVIL = NAMES | st.builds(str.__add__, st.sampled_from(["=", "+", "-", "@", "\t", "\r"]), NAMES)


@given(path=EVIL, label=EVIL)
@settings(deadline=None)
def test_no_cell_is_a_formula_and_every_path_still_names_its_file(
    tmp_path_factory: pytest.TempPathFactory, path: str, label: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "evil.csv"
    save_predictions([Prediction(path, label, 1.0, {label: 1.0, "other": 0.0})], file, top=2)
    (row,) = rows_of(file)[1:]
    assert not row[0].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert os.path.normpath(row[0]) == os.path.normpath(path)
    assert row[1] == row[3]
    assert row[1].removeprefix("'") == label.removeprefix("'")
    assert not row[1].startswith(("=", "@", "\t", "\r"))


def test_classes_that_are_numbers_stay_numbers(tmp_path: Path) -> None:
    for name in ("-1", "+2.5", "7"):
        save_predictions([Prediction("a.png", name, 1.0, {name: 1.0})], tmp_path / "said.csv")
        assert rows_of(tmp_path / "said.csv")[1][1] == name


def test_an_interrupt_leaves_the_rows_that_were_done_beside_the_old_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = Prediction("a.png", "a", 1.0, {"a": 1.0})
    save_predictions([said], tmp_path / "said.csv")

    def interrupted() -> Iterator[Prediction]:
        yield from [said] * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_predictions(interrupted(), tmp_path / "said.csv")
    assert len(rows_of(tmp_path / "said.csv")) == 2
    assert len(rows_of(tmp_path / "said.csv.partial")) == 6
    assert "5 predictions were written before this ended" in caplog.text


def test_a_table_that_cannot_be_written_is_told_before_anything_is_predicted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def never() -> Iterator[Prediction]:
        raise AssertionError("a picture was asked for")
        yield

    with pytest.raises(OutputError, match=r"said\.csv cannot be written"):
        save_predictions(never(), tmp_path / "file" / "said.csv")
    with pytest.raises(SettingError, match="top must be 1 or more"):
        save_predictions([], tmp_path / "said.csv", top=0)


# The terminal


def test_predict_writes_a_table_and_says_how_many(trained: Path, picture_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.csv"
    stdout, _ = run("predict", trained, picture_folder / "val", "--csv", file, "--top", 2, "--tta", "flip")
    assert stdout == f"18 predictions written into {file}\n"
    expected = Finetuner.load(trained, device="cpu", num_workers=0).predict(picture_folder / "val", tta="flip")
    assert [row[:2] for row in rows_of(file)[1:]] == [[each.path, each.label] for each in expected]
    stdout, _ = run("predict", trained, picture_folder / "val", *WHOLE, "--csv", file, "--json")
    assert json.loads(stdout) == {"csv": str(file), "count": 18}


def test_predict_calls_what_is_below_the_confidence_unsure(trained: Path, picture_folder: Path) -> None:
    arguments = ["predict", trained, picture_folder / "val", *WHOLE, "--top", 2, "--json"]
    plain = json.loads(run(*arguments)[0])["predictions"]
    asked = sorted(each["confidence"] for each in plain)[9]
    found = json.loads(run(*arguments, "--min-confidence", asked)[0])["predictions"]
    assert [each["label"] for each in found] == [
        each["label"] if each["confidence"] >= asked else None for each in plain
    ]
    assert [each["top"] for each in found] == [each["top"] for each in plain]
    stdout, _ = run("predict", trained, picture_folder / "val", *WHOLE, "--min-confidence", asked)
    assert stdout.count("unsure (") == 9
    _, message = run("predict", trained, picture_folder / "val", *WHOLE, "--min-confidence", 2, expect=2)
    assert "min_confidence must be from 0 to 1" in message


def test_evaluate_says_how_sure_its_figures_are(trained: Path, picture_folder: Path) -> None:
    plain = json.loads(run("evaluate", trained, picture_folder, *WHOLE, "--json")[0])
    views = json.loads(run("evaluate", trained, picture_folder, *WHOLE, "--tta", "crops", "--json")[0])
    assert plain.keys() == views.keys() == {"accuracy", "accuracy_interval", "loss", "ece", "count", "per_class"}
    assert plain["loss"] != views["loss"]
    low, high = plain["accuracy_interval"]
    stdout, _ = run("evaluate", trained, picture_folder, *WHOLE)
    assert f"(95 %: {low:.3f} to {high:.3f})" in stdout.splitlines()[0]
    assert f"calibration error {plain['ece']:.3f}" in stdout.splitlines()[0]


def test_calibrate_keeps_the_temperature_and_finds_a_confidence(
    trained: Path, picture_folder: Path, tmp_path: Path
) -> None:
    assert LEAST_PICTURES > 18
    trained = Path(shutil.copytree(trained, tmp_path / "run"))
    before = json.loads(run("evaluate", trained, picture_folder, *WHOLE, "--json")[0])
    found = json.loads(run("calibrate", trained, picture_folder, *WHOLE, "--precision", 0.2, "--json")[0])
    assert found["count"] == 18
    assert found["nll_after"] < found["nll_before"] == pytest.approx(before["loss"], rel=1e-6)
    after = json.loads(run("evaluate", trained, picture_folder, *WHOLE, "--json")[0])
    assert after["ece"] == pytest.approx(found["ece_after"], abs=1e-6)
    assert after["loss"] == before["loss"]
    stdout, _ = run("calibrate", trained, picture_folder, *WHOLE, "--precision", 0.2)
    assert f"temperature {found['temperature']:.3f} from 18 pictures" in stdout
    assert f"--min-confidence {found['threshold']['confidence']:.4f}" in stdout
    _, message = run("calibrate", trained, picture_folder, *WHOLE, "--precision", 1.2, expect=2)
    assert "precision must be above 0 and at most 1" in message
