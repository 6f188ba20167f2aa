"""Small pictures and other channels through the whole job: what is done, what is said, what is saved."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from transferkit import Finetuner
from transferkit.checkpoint import save_artifact
from transferkit.create import create_model
from transferkit.data import image_folder
from transferkit.exceptions import SettingError
from transferkit.freezing import FullFinetune, LinearProbe
from transferkit.pieces import build_model
from transferkit.plan import note_enlarging
from transferkit.preprocessing import Preprocessing

SETTINGS = {"weights": "bundled", "epochs": 1, "num_workers": 0, "device": "cpu", "progress": False}
BUNDLED = "timm/mobilenetv2_050"


def test_an_adapted_stem_is_trained_whole_and_its_statistics_move(
    picture_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuner = Finetuner(BUNDLED, small_images="stem", output_dir=tmp_path / "run", **SETTINGS)
    assert (tuner.recipe.policy, tuner.recipe.head_lr_multiplier) == (FullFinetune(), 10.0)
    with caplog.at_level(logging.INFO, logger="transferkit"):
        tuner.fit(picture_folder)
    assert f"{BUNDLED} for 32-px pictures: conv_stem 3x3/2 -> 3x3/1" in caplog.text
    assert tuner.model is not None
    assert not tuner.model.keep_statistics
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["transferkit"]["stem"][0] == {"path": "conv_stem", "before": [3, 2, 1], "after": [3, 1, 1]}
    assert config["run"]["settings"]["small_images"] == "stem"
    assert config["transferkit"]["small_images"] == "stem"
    again = Finetuner.load(tmp_path / "run", device="cpu")
    assert again.evaluate(picture_folder)["loss"] == tuner.evaluate(picture_folder)["loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "torchvision/squeezenet1_1", "small_images": "stem", "in_chans": 4},
        {"backbone": "timm/test_vit", "small_images": "stem"},
        {"backbone": "torchvision/resnet18", "small_images": "stem", "in_chans": 1},
        {"backbone": "timm/test_resnet", "image_size": 48, "in_chans": 1},
        {"backbone": "torchvision/googlenet", "image_size": 64, "aux": "train"},
    ],
    ids=lambda settings: settings["backbone"],
)
def test_training_on_starts_from_the_saved_network_as_it_was(
    settings: dict[str, Any], picture_folder: Path, tmp_path: Path
) -> None:
    model = create_model(settings.pop("backbone"), weights=None, num_classes=2, seed=0, **settings).eval()
    save_artifact(model, tmp_path)
    tuner = Finetuner.load(tmp_path, device="cpu", progress=False)
    again = build_model(tuner, image_folder(picture_folder)).eval()
    assert again.class_names == ("blue", "green", "red")
    assert (again.preprocessing, again.stem) == (model.preprocessing, model.stem)
    assert (again.aux_paths, again.small_images) == (model.aux_paths, model.small_images)
    shape = (2, model.preprocessing.channels, model.preprocessing.size, model.preprocessing.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again.features(images), model.features(images))


def test_enlarging_small_pictures_is_said(picture_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuner = Finetuner(BUNDLED, policy="head", **SETTINGS)
    assert tuner.recipe.policy == LinearProbe()
    with caplog.at_level(logging.INFO, logger="transferkit"):
        tuner.fit(picture_folder)
    assert "pictures of 40 px are enlarged to the network's 112 px (small_images='upsample')" in caplog.text


def test_with_an_adapted_stem_nothing_is_said_of_enlarging(caplog: pytest.LogCaptureFixture) -> None:
    pictures = [(Image.new("RGB", (20, 20)), 0)]
    enlarged, adapted = (
        create_model("torchvision/resnet18", weights=None, num_classes=2, image_size=64, small_images=way)
        for way in ("upsample", "stem")
    )
    with caplog.at_level(logging.INFO, logger="transferkit"):
        note_enlarging(enlarged, pictures)
        assert "pictures of 20 px are enlarged to the network's 64 px" in caplog.text
        caplog.clear()
        note_enlarging(adapted, pictures)
    assert caplog.text == ""


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_through_the_whole_job(in_chans: int, picture_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tuner = Finetuner(
        "timm/test_efficientnet", image_size=32, in_chans=in_chans, output_dir=folder, **{**SETTINGS, "weights": None}
    )
    tuner.fit(picture_folder)
    again = Finetuner.load(folder, device="cpu")
    assert again.model is not None
    assert again.model.preprocessing.channels == in_chans
    picture = next((picture_folder / "val" / "red").iterdir())
    assert again.predict(picture)[0].confidence == tuner.predict(picture)[0].confidence
    assert again.evaluate(picture_folder)["count"] == 18
    figure = again.plot_predictions(tmp_path / "predictions.png", count=2, data=picture_folder / "val")
    assert figure.axes
    with Image.open(tmp_path / "predictions.png") as drawn:
        assert drawn.size[0] > 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 64}, "image_size goes with a backbone's name"),
        ({"in_chans": 1}, "in_chans goes with a backbone's name"),
        ({"aux": "train"}, "aux goes with a backbone's name"),
        ({"small_images": "stem"}, "small_images goes with a backbone's name"),
        ({"weights": "weights.pth"}, "weights goes with a backbone's name"),
    ],
)
def test_what_a_module_cannot_have_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Finetuner(nn.Linear(1, 1), **settings)  # type: ignore[arg-type]


def test_head_goes_with_a_module_only() -> None:
    with pytest.raises(SettingError, match="head= goes with a module"):
        Finetuner("torchvision/resnet18", head="fc")


def test_a_module_whose_head_is_named(picture_folder: Path) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3, stride=4)
            self.classes = nn.Linear(8, 5)
            self.other = nn.Linear(8, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.body(images).mean((2, 3))
            self.other(features)
            return self.classes(features)

    tuner = Finetuner(
        TwoHeads(), head="classes", preprocessing=Preprocessing(32, 32), **{**SETTINGS, "weights": "default"}
    )
    tuner.fit(picture_folder)
    assert tuner.model is not None
    assert tuner.model.head_paths == ("classes",)
