"""The real MobileNetV2 and SqueezeNet, through both libraries' paths and against the bare networks."""

from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import models

from transferkit.create import adapt, create_model
from transferkit.model import TransferModel
from transferkit.pictures import find_pictures, read_picture
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import eval_transform

FILES = {"mobilenet_v2": "mobilenet_v2-77326c9b.pth", "squeezenet1_1": "squeezenet1_1-a3c258a5.pth"}
HEADS = {"mobilenet_v2": "classifier.1", "squeezenet1_1": "classifier.1"}


@pytest.fixture(scope="module")
def pictures(assets: Path) -> list[str]:
    return find_pictures(assets / "hymenoptera_data" / "val" / "bees")[0][:6]


def bare(assets: Path, architecture: str) -> nn.Module:
    network = models.get_model(architecture)
    network.load_state_dict(torch.load(assets / "weights" / FILES[architecture], weights_only=True), strict=True)
    return network.eval()


def with_the_original_head(model: TransferModel, head: nn.Module) -> TransferModel:
    model.network.get_submodule(model.head_paths[0]).load_state_dict(head.state_dict())
    return model.eval()


def prepared(model: TransferModel, pictures: list[str]) -> Tensor:
    transform = eval_transform(model.eval_preset, model.preprocessing)
    return torch.stack([transform(read_picture(path)) for path in pictures])


@pytest.mark.parametrize("architecture", FILES)
def test_logits_are_those_of_the_bare_network_under_its_own_transform(
    architecture: str, assets: Path, pictures: list[str]
) -> None:
    network = bare(assets, architecture)
    theirs = models.get_model_weights(architecture).DEFAULT.transforms()
    images = torch.stack([theirs(read_picture(path)) for path in pictures])
    weights = assets / "weights" / FILES[architecture]
    model = create_model(f"torchvision/{architecture}", weights=weights, num_classes=1000)
    with_the_original_head(model, network.get_submodule(HEADS[architecture]))
    ours = prepared(model, pictures)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-6)  # one divides by 255, the other multiplies by 1/255
    with torch.inference_mode():
        assert torch.equal(model(images), network(images))
        torch.testing.assert_close(model(ours), network(images), rtol=0, atol=1e-3)


def test_timms_twin_gives_the_same_logits_and_is_fed_by_timms_own_transform(
    assets: Path, pictures: list[str], tmp_path: Path
) -> None:
    network = bare(assets, "mobilenet_v2")
    twin = timm.create_model("mobilenetv2_100")
    state = dict(zip(twin.state_dict(), network.state_dict().values(), strict=True))  # the same tensors in one order
    torch.save(state, tmp_path / "twin.pth")
    ours = create_model("timm/mobilenetv2_100", weights=tmp_path / "twin.pth", num_classes=1000)
    with_the_original_head(ours, network.classifier[1])
    same = create_model("mobilenet_v2", weights=assets / "weights" / FILES["mobilenet_v2"], num_classes=1000)
    with_the_original_head(same, network.classifier[1])
    theirs = create_transform(**resolve_data_config({}, model=twin), is_training=False)
    images = torch.stack([theirs(read_picture(path)) for path in pictures])
    torch.testing.assert_close(prepared(ours, pictures), images, rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(ours(images), same(images))
        assert torch.equal(ours(images), network(images))


@pytest.mark.parametrize("architecture", FILES)
def test_the_head_of_the_bare_network_is_found_by_running_it(architecture: str, assets: Path) -> None:
    model = adapt(bare(assets, architecture), num_classes=2, preprocessing=Preprocessing(resize_size=232))
    named = create_model(architecture, weights=assets / "weights" / FILES[architecture], num_classes=2)
    assert (model.head_paths, model.stage_names) == (named.head_paths, named.stage_names)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval().features(images), named.eval().features(images))


def test_a_grey_network_sees_a_grey_picture_as_the_colour_network_does(assets: Path) -> None:
    weights = assets / "weights" / FILES["mobilenet_v2"]
    colour, grey = (create_model("mobilenet_v2", weights=weights, num_classes=2, in_chans=n).eval() for n in (3, 1))
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = colour.features(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.features(images), expected, rtol=1e-4, atol=1e-4)
