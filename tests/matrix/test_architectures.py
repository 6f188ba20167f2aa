"""The families of both libraries, their smallest members: built, split, frozen, trained, saved and opened natively."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision import models
from torchvision.models import regnet

from transferkit.backbones import build_network, list_models
from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.freezing import LinearProbe, TrainLast
from transferkit.model import TransferModel, create_model

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


def copies(model: TransferModel) -> dict[str, list[Tensor]]:
    return {
        stage.name: [each.detach().clone() for each in (*stage.parameters, *stage.buffers)] for stage in model.stages
    }


def assert_partition(model: TransferModel) -> None:
    network = model.network
    tensors = [id(each) for stage in model.stages for each in (*stage.parameters, *stage.buffers)]
    assert sorted(tensors) == sorted(map(id, itertools.chain(network.parameters(), network.buffers())))
    modules = [id(module) for stage in model.stages for module in stage.modules]
    assert len(modules) == len(set(modules))
    assert model.stage_names == ("stem", *(f"stage{n}" for n in range(1, len(model.stages) - 1)), "head")
    assert len(model.stages) >= 3


@architectures
def test_what_is_frozen_is_bit_equal_after_a_step_and_what_is_trained_moves(
    name: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(name, size)
    assert_partition(model)
    assert not caplog.records  # the network ran, so its stages follow its execution
    images, labels = batch(size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for policy in (TrainLast(2), LinearProbe()):  # so the probe also re-freezes what has momentum
        frozen = policy.frozen_stages(model.stage_names, 0)
        model.freeze(frozen).train()
        before = copies(model)
        logits = model(images)
        assert logits.shape == (6, 3)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {
            stage: not all(torch.equal(old, new) for old, new in zip(before[stage], tensors, strict=True))
            for stage, tensors in copies(model).items()
        }
        assert moved == {stage: stage not in frozen for stage in model.stage_names}
        head = zip(before["head"], model.stages[-1].parameters, strict=True)
        assert not any(torch.equal(old, new) for old, new in head)


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
        native.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
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


@pytest.mark.parametrize("name", list_models("torchvision/*"))
def test_every_torchvision_network_has_one_head_and_ordered_stages(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_widths = regnet.BlockParams.from_init_params

    def with_values(**settings: float) -> regnet.BlockParams:
        with torch.device("cpu"):  # RegNet's builder reads the widths it computes
            return compute_widths(**settings)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", with_values)
    with torch.device("meta"):  # shapes without memory: the largest of them has 645 million parameters
        native = build_network(name, num_classes=1000, arguments={})
        model = create_model(name, weights=None, num_classes=3)
        size = model.preprocessing.size
        logits = model.eval()(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 3)
    assert not caplog.records  # the network ran, so its stages follow its execution
    assert_partition(model)
    (path,) = model.head_paths
    stated, new = native.get_submodule(path), model.network.get_submodule(path)
    assert type(new) is type(stated)
    assert (stated.weight.shape[0], new.weight.shape[0]) == (1000, 3)
