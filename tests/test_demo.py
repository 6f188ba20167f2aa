"""The demo: real code path, real files, and an honest comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from transferkit import OutputError, demo, image_folder
from transferkit.cli import app


def test_digits_are_an_ordinary_picture_folder(tmp_path: Path):
    data = image_folder(demo.write_digits(tmp_path, train_per_class=2, val_per_class=3))
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.val)) == (20, 30)
    with Image.open(data.train.name(0)) as picture:
        assert (picture.mode, picture.size) == ("L", (32, 32))


def test_demo_refuses_a_folder_of_somebody_else(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="holds other files"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.long
def test_pretrained_is_clearly_ahead_of_random(tmp_path: Path):
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["pretrained"]["val_accuracy"] >= found["random"]["val_accuracy"] + 0.1
    assert found["prediction"]["label"] == "7"
    folder = tmp_path / "demo"
    for name in ("curves.png", "predictions.png", "run/model.safetensors", "run/config.json", "run/history.csv"):
        assert (folder / name).is_file(), name
    demo.run_demo(folder, progress=False)  # a second time replaces the first
