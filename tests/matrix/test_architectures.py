"""Saved models of many families, opened by their own library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor
from torchvision import models

from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.create import create_model
from transferkit.model import TransferModel

pytestmark = pytest.mark.long

CLASSES = ("ant", "bee", "cat")

# (name, image size): the smallest member of each family at a size that it can still halve five times.
ARCHITECTURES = [
    ("torchvision/resnet18", 64),
    ("torchvision/vgg11", 32),
    ("torchvision/alexnet", 64),
    ("torchvision/squeezenet1_0", 64),
    ("torchvision/squeezenet1_1", 64),
    ("torchvision/mobilenet_v2", 64),
    ("torchvision/mobilenet_v3_small", 64),
    ("torchvision/densenet121", 64),
    ("torchvision/efficientnet_b0", 64),
    ("torchvision/convnext_tiny", 64),
    ("torchvision/regnet_x_400mf", 64),
    ("torchvision/regnet_y_400mf", 64),
    ("torchvision/vit_b_32", 64),
    ("torchvision/swin_t", 64),
    ("torchvision/maxvit_t", 224),  # its head has no bias
    ("timm/resnet10t", 64),
    ("timm/vgg11", 32),
    ("timm/mobilenetv2_035", 64),
    ("timm/mobilenetv3_small_050", 64),
    ("timm/densenet121", 64),
    ("timm/efficientnet_lite0", 64),
    ("timm/convnext_atto", 64),
    ("timm/regnetx_002", 64),
    ("timm/regnety_002", 64),
    ("timm/vit_tiny_patch16_224", 64),
    ("timm/swin_tiny_patch4_window7_224", 64),
    ("timm/deit_tiny_patch16_224", 64),
    ("timm/deit_tiny_distilled_patch16_224", 64),
    ("timm/beit_base_patch16_224", 32),
]
architectures = pytest.mark.parametrize(("name", "size"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes at once: pytest would keep gigabytes of weights."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def build(name: str, size: int) -> TransferModel:
    torch.manual_seed(0)
    return create_model(name, weights=None, class_names=CLASSES, image_size=size)


def batch(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


@architectures
def test_the_saved_model_opens_in_its_own_library_with_equal_logits(name: str, size: int, folder: Path) -> None:
    model = build(name, size).eval()
    images, _ = batch(size)
    with torch.no_grad():
        expected = model(images)
    save_artifact(model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["transferkit"]["native"]
    library, architecture = name.split("/")
    if library == "torchvision":
        native = models.get_model(architecture, weights=None, num_classes=3, **config["model_args"])
        state, saved = native.state_dict(), load_file(folder / "model.safetensors")
        assert saved.keys() == state.keys()
        state.update(saved)
        native.load_state_dict(state)
    else:
        native = timm.create_model(f"local-dir:{folder}", pretrained=True)
        resolved = resolve_data_config({}, model=native)
        assert tuple(resolved["mean"]) == model.preprocessing.mean
        assert tuple(resolved["std"]) == model.preprocessing.std
        assert tuple(resolved["input_size"]) == (3, size, size)
        assert resolved["interpolation"] == model.preprocessing.interpolation
    with torch.no_grad():
        assert torch.equal(native.eval()(images), expected)
        del native
        again = load_artifact(folder)
        assert torch.equal(again(images), expected)
    assert again.stage_names == model.stage_names
    assert again.preprocessing == model.preprocessing
