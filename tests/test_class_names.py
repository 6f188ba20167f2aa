"""Classes whose names are unusual, from the folder to the saved model and back, and the order of classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from test_cli import _restore_logging, run  # noqa: F401  # the fixture works by being here
from transferkit import Finetuner
from transferkit.data import image_folder

NAMES = ("Cat", "cat", " two  spaces", "蚂蚁", "🐝 bee", "naïve – “quoted”", "-x", "=1+1", "ä" * 120, "$x^2$ {} %s \\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        (root / name).mkdir()
        for index in range(3):
            pixels = np.full((12, 12, 3), 20 * number + index, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_names_survive_training_saving_loading_and_prediction(folder: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    tuner = Finetuner(
        "timm/test_efficientnet",
        weights=None,
        policy="head",
        epochs=1,
        image_size=32,
        num_workers=0,
        progress=False,
        output_dir=run_folder,
    )
    tuner.fit(folder)
    tuner.plot_predictions(run_folder / "predictions.png")
    loaded = Finetuner.load(run_folder, progress=False)
    assert loaded.model is not None
    assert set(loaded.model.class_names) == set(NAMES)
    assert loaded.model.class_names == tuple(sorted(NAMES))
    assert loaded.evaluate(folder)["per_class"].keys() == set(NAMES)
    before, after = tuner.predict(folder), loaded.predict(folder)
    assert [each.label for each in before] == [each.label for each in after]
    assert before[0].probabilities.keys() == set(NAMES)


def test_the_command_line_prints_such_names(folder: Path, tmp_path: Path) -> None:
    network = ["--model", "timm/test_efficientnet", "--weights", "none", "--image-size", 32]
    how = ["--policy", "head", "--epochs", 1, "--workers", 0, "--output", tmp_path / "run", "--json"]
    out, _ = run("finetune", folder, *network, *how)
    assert json.loads(out)["classes"] == sorted(NAMES)
    out, _ = run("check", folder)
    assert all(name in out for name in NAMES)


def test_classes_are_sorted_by_letters_or_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    names = ["10", "9", "b2", "b10", "b1c30", "b1c4", "a", "01", "1", "v1.10", "v1.9", "²"]
    for name in names:
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    assert image_folder(tmp_path).class_names == tuple(sorted(names))
    natural = ("01", "1", "9", "10", "a", "b1c4", "b1c30", "b2", "b10", "v1.9", "v1.10", "²")
    assert image_folder(tmp_path, natural_sort=True).class_names == natural


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=6, unique=True), st.text("ab-._ ", max_size=3))
def test_natural_order_is_the_order_of_the_numbers(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], prefix: str
) -> None:
    root = tmp_path_factory.mktemp("numbers")
    for number in numbers:
        place = root / f"x{prefix}{number}"
        place.mkdir()
        for index in range(2):
            (place / f"{index}.png").touch()
    names = image_folder(root, natural_sort=True).class_names
    assert names == tuple(f"x{prefix}{number}" for number in sorted(numbers))
