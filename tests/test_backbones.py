"""Names, preprocessing and modules of one's own: from what a person writes to a native network."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.backbones import list_models, load_backbone, model_info, resolve_name
from transferkit.exceptions import SettingError, UnknownModelError
from transferkit.model import adapt, create_model
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
