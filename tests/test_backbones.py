"""Names, preprocessing and modules of one's own: from what a person writes to a native network."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.backbones import list_models, load_backbone, model_info, resolve_name
from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.create import adapt, create_model
from transferkit.exceptions import SettingError, UnknownModelError
from transferkit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        ("torchvision/resnet18", ("torchvision", "resnet18")),
        ("timm/resnet18", ("timm", "resnet18")),
        ("timm/resnet18.a1_in1k", ("timm", "resnet18.a1_in1k")),
        ("resnet18", ("torchvision", "resnet18")),
        ("convnext_atto", ("timm", "convnext_atto")),
        ("convnext_atto.d2_in1k", ("timm", "convnext_atto.d2_in1k")),
    ],
)
def test_a_bare_name_is_torchvisions_first(name: str, resolved: tuple[str, str]) -> None:
    assert resolve_name(name) == resolved


def test_the_log_says_what_a_bare_name_was_taken_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="transferkit"):
        load_backbone("squeezenet1_1", weights=None)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["squeezenet1_1 is taken as torchvision/squeezenet1_1"]


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("resnet81", "torchvision/resnet18"),
        ("torchvision/mobilenetv2", "torchvision/mobilenet_v2"),
        ("timm/convnext_ato", "timm/convnext_atto"),
        ("Squeezenet1_1", "torchvision/squeezenet1_1"),
        ("keras/resnet50", "torchvision/resnet50"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_real_ones(name: str, offered: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        create_model(name, weights=None, num_classes=2)
    assert f"no torchvision or timm classifier named {name!r}" in str(caught.value)
    assert f"'{offered}'" in str(caught.value)


@pytest.mark.parametrize("name", ["", "/", "torchvision/", "timm/.a1_in1k", "no such thing at all"])
def test_nonsense_is_an_unknown_model_too(name: str) -> None:
    with pytest.raises(UnknownModelError, match="transferkit models PATTERN"):
        resolve_name(name)


def test_every_name_offered_can_be_resolved() -> None:
    names = list_models()
    assert len(names) == len(set(names)) > 1000
    assert all("/".join(resolve_name(name)) == name for name in names)
    assert names == sorted(names, key=lambda name: name.startswith("timm/"))


def test_patterns_match_full_and_bare_names() -> None:
    assert list_models("torchvision/squeezenet*") == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    assert {"torchvision/resnet18", "timm/resnet18"} <= set(list_models("resnet18*"))
    assert list_models("squeezenet") == list_models("torchvision/squeezenet*")
    assert list_models("nothing like this") == []


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/mobilenetv2_050", "timm/test_vit.r160_in1k"])
def test_model_info_counts_what_the_library_counts(name: str) -> None:
    library, architecture = name.split("/")
    network = models.get_model(architecture) if library == "torchvision" else timm.create_model(architecture)
    info = model_info(name)
    assert (info.name, info.parameters) == (name, sum(each.numel() for each in network.parameters()))
    assert info.input_size == load_backbone(name, weights=None).preprocessing.size
    assert (info.licence is None) == (library == "torchvision")


# --- preprocessing -------------------------------------------------------------------------------------------------

HALVES = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/resnet18", Preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD, "bilinear")),
        ("torchvision/mobilenet_v2", Preprocessing(224, 232, IMAGENET_MEAN, IMAGENET_STD, "bilinear")),
        ("torchvision/efficientnet_b1", Preprocessing(240, 255, IMAGENET_MEAN, IMAGENET_STD, "bilinear")),
        ("torchvision/efficientnet_b0", Preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD, "bicubic")),
        ("timm/vit_tiny_patch16_224", Preprocessing(224, 248, HALVES, HALVES, "bicubic")),
        ("timm/resnet10t", Preprocessing(176, 201, IMAGENET_MEAN, IMAGENET_STD, "bicubic")),
        (
            "timm/mobilenetv3_large_100.miil_in21k",
            Preprocessing(224, 256, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear"),
        ),
    ],
)
def test_preprocessing_is_that_of_the_weights(name: str, expected: Preprocessing) -> None:
    assert load_backbone(name, weights=None).preprocessing == expected


def test_image_size_keeps_the_crops_share() -> None:
    model = create_model("torchvision/resnet18", weights=None, num_classes=2, image_size=112)
    assert (model.preprocessing.size, model.preprocessing.resize_size) == (112, 128)


@pytest.mark.parametrize("name", ["torchvision/vit_b_32", "timm/vit_tiny_patch16_224"])
def test_a_vit_is_built_for_the_image_size(name: str) -> None:
    model = create_model(name, weights=None, num_classes=2, image_size=64).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    assert model.preprocessing.size == 64


@pytest.mark.parametrize("name", ["torchvision/vit_b_32", "timm/vit_tiny_patch16_224", "torchvision/resnet18"])
@pytest.mark.parametrize("size", [0, -1])
def test_an_image_size_below_one_is_refused(name: str, size: int) -> None:
    with pytest.raises(SettingError):
        create_model(name, weights=None, num_classes=2, image_size=size)


def test_an_image_size_that_the_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(SettingError, match="torchvision/vit_b_32 cannot take 50-px pictures"):
        create_model("torchvision/vit_b_32", weights=None, num_classes=2, image_size=50)


def test_preprocessing_can_be_overridden() -> None:
    own = Preprocessing(size=64, resize_size=64, mean=HALVES, std=HALVES)
    assert (
        create_model("torchvision/squeezenet1_1", weights=None, num_classes=2, preprocessing=own).preprocessing == own
    )


# --- a module that the user built ----------------------------------------------------------------------------------


def own_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 9),
    )


def test_a_module_keeps_its_weights_and_gets_a_new_head_in_place() -> None:
    network = own_network()
    before = [value.clone() for value in network[:5].state_dict().values()]
    model = adapt(network, num_classes=2, preprocessing=Preprocessing(size=32, resize_size=32))
    assert model.network is network
    assert model.name == "module/Sequential"
    assert model.head_paths == ("5",)
    assert all(map(torch.equal, before, network[:5].state_dict().values()))
    assert network[5].out_features == 2


def test_a_module_without_metadata_is_told_which_preprocessing_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="transferkit"):
        model = adapt(own_network(), num_classes=2)
    assert model.preprocessing == Preprocessing()
    assert "Sequential does not say how its pictures are prepared" in caplog.text


def test_a_timm_module_brings_its_metadata(caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("vit_tiny_patch16_224")
    model = adapt(network, num_classes=2)
    assert (model.head_paths, model.preprocessing.mean) == (("head",), HALVES)
    assert not caplog.records


def test_head_names_the_layer_to_replace() -> None:
    network = nn.ModuleDict({"body": nn.Conv2d(3, 4, 3), "classes": nn.Linear(4, 9), "unused": nn.Linear(4, 4)})
    network.forward = lambda images: network["classes"](network["body"](images).mean((2, 3)))  # type: ignore[method-assign]
    model = adapt(network, num_classes=2, head="classes", preprocessing=Preprocessing(32, 32))
    assert model.head_paths == ("classes",)
    assert (network["classes"].out_features, network["unused"].out_features) == (2, 4)


def test_a_module_whose_last_layer_is_a_convolution_keeps_it_one() -> None:
    model = adapt(models.squeezenet1_1(), num_classes=2)
    assert model.head_paths == ("classifier.1",)
    assert isinstance(model.network.classifier[1], nn.Conv2d)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "4"}, "head='4' is no nn.Linear or nn.Conv2d of Sequential"),
        ({"head": "fc"}, "head='fc' is no nn.Linear or nn.Conv2d of Sequential — did you mean '0' or '5'"),
    ],
)
def test_settings_that_do_not_go_with_a_module_are_refused(arguments: dict[str, Any], message: str) -> None:
    network = own_network()
    with pytest.raises(SettingError, match=message):
        adapt(network, num_classes=2, preprocessing=Preprocessing(), **arguments)
    assert network[5].out_features == 9


def test_the_head_is_the_last_layer_that_runs_and_gives_the_logits() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Linear(8, 9)
            self.body = nn.Conv2d(3, 8, 3)
            self.projection = nn.Linear(8, 9)
            self.unused = nn.Linear(8, 9)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.body(images).mean((2, 3))
            projected = self.projection(features)
            return self.classes(features), projected

    network = Backwards()
    model = adapt(network, num_classes=2, preprocessing=Preprocessing(32, 32))
    assert model.head_paths == ("classes",)
    assert model.stage_names == ("stem", "stage1", "head")


def test_a_head_that_cannot_be_found_is_asked_for() -> None:
    with pytest.raises(SettingError, match=r"Sequential gives an output of shape \(1, 3072\).*name .* with head="):
        adapt(nn.Sequential(nn.Flatten()), num_classes=2, preprocessing=Preprocessing(32, 32))
    with pytest.raises(SettingError, match=r"could not be found by running a made 32-px picture .*head=.*size="):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(784, 9)), num_classes=2, preprocessing=Preprocessing(32, 32))


def test_a_module_for_greys_is_prepared_for_greys(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
    model = adapt(network, num_classes=2)
    assert len(model.preprocessing.mean) == 1
    assert "(channels: 1)" in caplog.text


def test_a_module_of_torchvision_keeps_its_auxiliary_heads() -> None:
    with torch.device("meta"):
        model = adapt(models.googlenet(init_weights=False), num_classes=2)
    assert (model.head_paths, model.aux_paths, model.aux_weight) == (("fc",), ("aux1.fc2", "aux2.fc2"), 0.3)


def test_a_seed_decides_what_is_drawn_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (
        create_model("torchvision/squeezenet1_1", weights=None, num_classes=2, seed=seed).network.state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.1.weight"], other["classifier.1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("timm/gemma4_vit_167m_enc", {}, "encoder without a head to replace; choose another"),
        (
            "torchvision/alexnet",
            {"image_size": 16},
            "AlexNet cannot take 16-px pictures of 3 channels .* another image_s",
        ),
        ("timm/maxvit_tiny_rw_224", {"image_size": 50}, "MaxxVit cannot take 50-px pictures"),
        ("torchvision/inception_v3", {"image_size": 32}, "Inception3 cannot take 32-px pictures"),
        ("torchvision/vit_b_16", {"image_size": 20}, "vit_b_16 cannot take 20-px pictures: Input shape indivisible"),
        (
            "torchvision/resnet18",
            {"in_chans": 0},
            "in_chans must be from 1 to 1,000, got 0; photographs have 3, greys 1",
        ),
        ("timm/resnet18", {"in_chans": -1}, "in_chans must be from 1 to 1,000, got -1"),
        ("torchvision/resnet18", {"small_images": "enlarge"}, "small_images='enlarge'; it can be 'upsample' or 'stem'"),
        ("timm/vit_tiny_patch16_224", {"small_images": "stem", "image_size": 4}, "too small for 8x8 tokens"),
    ],
)
def test_what_a_network_cannot_take_is_said_before_it_is_trained(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(SettingError, match=message):
        create_model(name, weights=None, num_classes=2, **settings)


def test_preprocessing_that_contradicts_other_settings_is_refused() -> None:
    small = Preprocessing(size=64, resize_size=64)
    with pytest.raises(SettingError, match="image_size=32 and preprocessing for 64 contradict each other"):
        create_model("squeezenet1_1", weights=None, num_classes=2, image_size=32, preprocessing=small)
    with pytest.raises(SettingError, match="in_chans=1 and preprocessing for 3 contradict each other"):
        create_model("squeezenet1_1", weights=None, num_classes=2, in_chans=1, preprocessing=small)


def test_overriding_the_preprocessing_of_weights_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "weights.pth")
    own = Preprocessing(size=64, resize_size=64, mean=HALVES, std=HALVES)
    settings = {"num_classes": 2, "preprocessing": own}
    create_model("squeezenet1_1", weights=None, **settings)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    create_model("squeezenet1_1", weights=tmp_path / "weights.pth", **settings)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is overridden: mean (0.5, 0.5, 0.5) instead of (0.485, 0.456, 0.406), std" in warning


# --- channels and small pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/test_resnet", "torchvision/googlenet"])
def test_in_chans_adapts_network_and_preprocessing_together(name: str, in_chans: int, tmp_path: Path) -> None:
    library, architecture = name.split("/")
    options = {"init_weights": False} if architecture == "googlenet" else {}
    native = models.get_model(architecture, **options) if library == "torchvision" else timm.create_model(architecture)
    torch.save(native.state_dict(), tmp_path / "weights.pth")
    model = create_model(name, weights=tmp_path / "weights.pth", num_classes=2, in_chans=in_chans, image_size=96)
    assert model.preprocessing.channels == in_chans
    first = next(module for module in native.modules() if isinstance(module, nn.Conv2d))
    ours = next(module for module in model.network.modules() if isinstance(module, nn.Conv2d))
    torch.testing.assert_close(ours.weight, timm.models.adapt_input_conv(in_chans, first.weight))
    images = torch.randn(2, in_chans, 96, 96)
    with torch.no_grad():
        logits = model.eval()(images)
    save_artifact(model, tmp_path / "saved")
    again = load_artifact(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(images), logits)
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["transferkit"]["native"] is (library == "timm")
    assert config["pretrained_cfg"]["input_size"] == [in_chans, 96, 96]


def test_googlenet_for_greys_expects_pixels_from_minus_one_to_one() -> None:
    with torch.device("meta"):
        model = create_model("torchvision/googlenet", weights=None, num_classes=2, in_chans=1)
    assert (model.preprocessing.mean, model.preprocessing.std) == ((0.5,), (0.5,))
    assert model.arguments == {"aux_logits": False, "transform_input": False}


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "torchvision/vit_b_32", "timm/vit_tiny_patch16_224"])
def test_a_small_stem_is_said_saved_and_rebuilt(name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, logger="transferkit"):
        model = create_model(name, weights=None, num_classes=2, small_images="stem").eval()
    assert f"{name} for 32-px pictures: " in caplog.text
    assert (model.preprocessing.size, model.preprocessing.resize_size) == (32, 32)
    images = torch.randn(2, 3, 32, 32)
    save_artifact(model, tmp_path)
    own = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["transferkit"]
    assert own["stem"] == [change.to_dict() for change in model.stem]
    assert own["native"] is (not model.stem)
    assert own["small_images"] == "stem"
    again = load_artifact(tmp_path)
    assert (again.stem, again.small_images) == (model.stem, "stem")
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_small_stem_keeps_pretrained_weights(tmp_path: Path) -> None:
    native = models.resnet18()
    torch.save(native.state_dict(), tmp_path / "weights.pth")
    model = create_model("resnet18", weights=tmp_path / "weights.pth", num_classes=2, small_images="stem")
    ours, theirs = model.network.state_dict(), native.state_dict()
    assert {key for key in theirs if not torch.equal(ours[key], theirs[key])} == {
        "conv1.weight",
        "fc.weight",
        "fc.bias",
    }
    assert ours["conv1.weight"].shape == (64, 3, 3, 3)
    assert isinstance(model.network.maxpool, nn.Identity)
    own = timm.layers.resample_patch_embed(native.conv1.weight, [3, 3])
    torch.testing.assert_close(ours["conv1.weight"], own)
