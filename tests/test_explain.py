"""Heat maps: right against plain autograd, of any family, and nothing about the model changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.create import adapt, create_model
from transferkit.exceptions import SettingError
from transferkit.explain import heat_map
from transferkit.freezing import LinearProbe
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded

FAMILIES = (
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
    "timm/test_convnext",
    "timm/test_nfnet",
    "timm/test_maxvit",
    "timm/test_vit",
    "timm/test_vit2",
    "timm/deit_tiny_distilled_patch16_224",
    "timm/pit_ti_distilled_224",
    "timm/mixer_s32_224",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            "torchvision/densenet121",
            "torchvision/swin_t",
            "torchvision/vgg11_bn",
            "timm/test_mambaout",
            "timm/vit_little_patch16_reg4_gap_256",
            "timm/cait_xxs24_224",
            "timm/xcit_nano_12_p16_224",
            "timm/coat_tiny",
            "timm/pvt_v2_b0",
        )
    ),
)


def pictures(count: int, height: int, width: int | None = None, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def model_of(name: str, size: int = 64, **more: Any) -> TransferModel:
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's GoogLeNet warns of its initialisation
        model = create_model(name, weights=None, num_classes=3, image_size=size, **more)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics of what it sees, and a head of noticeable size, as after training
        model.train()(pictures(8, size, seed=1))
        for path in model.head_paths:
            model.network.get_submodule(path).weight.mul_(100)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_map_of_more_than_one_place(name: str) -> None:
    maps = heat_map(model_of(name), pictures(2, 64).repeat(3, 1, 1, 1), class_index=[0, 0, 1, 1, 2, 2])
    assert maps.shape == (6, 64, 64)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert 0 <= maps.min() <= maps.max() <= 1
    peaks = maps.amax((1, 2))
    assert (((peaks - 1).abs() < 1e-6) | (peaks == 0)).all()
    assert any(each.std() > 0.01 for each in maps), "no map tells one place from another"


# Against plain autograd


def grad_cam(features: Tensor, score: Tensor, size: tuple[int, int]) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2, of (B, C, h, w)."""
    (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean((2, 3))
    maps = torch.einsum("bc,bchw->bhw", weights, features).clamp(min=0)
    maps = nn.functional.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True)).detach()


@pytest.mark.parametrize(("name", "size"), [("resnet18", (96, 96)), ("resnet18", (64, 128)), ("googlenet", (64, 64))])
def test_of_a_convolutional_network_it_is_grad_cam_of_what_is_pooled(name: str, size: tuple[int, int]) -> None:
    model = model_of(f"torchvision/{name}")
    images = pictures(3, *size)
    network = copy.deepcopy(model.network)
    pooled: list[Tensor] = []
    network.avgpool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    logits = network(images)
    expected = grad_cam(pooled[0], logits[:, 1].sum(), size)
    torch.testing.assert_close(heat_map(model, images, class_index=1), expected)


def test_of_a_convolutional_head_it_is_grad_cam_of_what_the_head_receives() -> None:
    model = model_of("torchvision/squeezenet1_1")
    images = pictures(3, 96)
    nn.init.uniform_(model.network.classifier[1].weight)  # what is below 0 is cut off
    network: models.SqueezeNet = copy.deepcopy(model.network)
    features = network.features(images)
    expected = grad_cam(features, network.classifier(features)[:, 1].sum(), (96, 96))
    torch.testing.assert_close(heat_map(model, images, class_index=1), expected)


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_of_a_vit_with_a_class_token_it_is_grad_cam_of_the_patches_after_the_last_blocks_first_norm(
    size: tuple[int, int],
) -> None:
    model = model_of("timm/test_vit")
    images = pictures(3, *size)
    network = copy.deepcopy(model.network)
    *others, block = network.blocks
    x = network.norm_pre(network._pos_embed(network.patch_embed(images)))
    for each in others:
        x = each(x)
    normed = block.norm1(x)
    grid = normed[:, 1:].reshape(3, size[0] // 16, size[1] // 16, -1).permute(0, 3, 1, 2)
    tokens = torch.cat([normed[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    x = x + block.attn(tokens)
    x = network.norm(x + block.mlp(block.norm2(x)))
    logits = network.head(x[:, 0])
    expected = grad_cam(grid, logits[:, 2].sum(), size)
    torch.testing.assert_close(heat_map(model, images, class_index=2), expected)


def test_of_a_swin_it_is_grad_cam_of_the_channels_last_map_that_is_pooled() -> None:
    with seeded(0):
        network = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), img_size=64)
        model = adapt(network, num_classes=2, preprocessing=Preprocessing(64, 64))
    with torch.no_grad():
        model.network.head.fc.weight.mul_(100)
    images = pictures(2, 64)
    native = copy.deepcopy(model.network).eval()
    features = native.forward_features(images).permute(0, 3, 1, 2)
    expected = grad_cam(features, native.forward_head(features.permute(0, 2, 3, 1))[:, 0].sum(), (64, 64))
    torch.testing.assert_close(heat_map(model, images, class_index=0), expected)


# Where one place alone matters


class OnePlace(nn.Module):
    """Its first logit is the mean brightness; between its layers, places are held in one of three ways."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.patches = nn.Conv2d(3, 2, 8, stride=8, bias=False)
        self.mix = nn.Conv2d(2, 2, 1, bias=False) if layout == "BCHW" else nn.Linear(2, 2, bias=False)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.patches.weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None] / 192)
            self.mix.weight.copy_(torch.eye(2).reshape(self.mix.weight.shape))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.patches(images))
        if self.layout == "BNC":
            tokens = x.flatten(2).transpose(1, 2)
            extra = tokens.new_full((len(x), 3, 2), 0.5)
            return self.fc(self.mix(torch.cat([extra, tokens], 1)).mean(1))
        if self.layout == "BHWC":
            return self.fc(self.mix(x.permute(0, 2, 3, 1)).mean((1, 2)))
        return self.fc(self.mix(x).mean((2, 3)))


@pytest.mark.parametrize("layout", ["BCHW", "BHWC", "BNC"])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_the_map_peaks_at_the_one_place_that_matters(layout: str, size: tuple[int, int]) -> None:
    model = adapt(OnePlace(layout), num_classes=2, preprocessing=Preprocessing(32, 32), head="fc")
    with torch.no_grad():
        model.network.fc.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    places = [(row, column) for row in range(size[0] // 8) for column in range(size[1] // 8)]
    images = torch.zeros(len(places), 3, *size)
    for image, (row, column) in zip(images, places, strict=True):
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    maps = heat_map(model, images, class_index=0)
    for found, (row, column) in zip(maps, places, strict=True):
        inside = found[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert inside.max() == found.max() == 1
        assert (found > 0.5).sum() <= 100
    assert not heat_map(model, images, class_index=1).any()  # nothing speaks for the other class


# Classes


def test_without_a_class_the_likeliest_of_each_picture_is_taken() -> None:
    model, images = model_of("timm/test_convnext"), pictures(4, 64)
    with torch.no_grad():
        likeliest = model.eval()(images).argmax(1).tolist()
    one_by_one = [heat_map(model, image[None], class_index=each) for image, each in zip(images, likeliest, strict=True)]
    torch.testing.assert_close(heat_map(model, images), torch.cat(one_by_one))
    torch.testing.assert_close(heat_map(model, images, class_index=likeliest), torch.cat(one_by_one))


def test_classes_and_pictures_that_cannot_be_are_refused(tiny_model: Callable[..., TransferModel]) -> None:
    model = tiny_model()
    for wrong in (3, -1, [0, 7]):
        with pytest.raises(SettingError, match=r"no class with index .* its 3 classes are counted from 0"):
            heat_map(model, pictures(2, 32), class_index=wrong)
    with pytest.raises(SettingError, match="3 class indices for 2 pictures"):
        heat_map(model, pictures(2, 32), class_index=[0, 1, 2])
    for images in (pictures(1, 32)[0], pictures(1, 32)[:, :1], torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(SettingError, match=r"give \(B, 3, H, W\) floats"):
            heat_map(model, images)


def test_a_network_without_places_says_so() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = adapt(network, num_classes=2, preprocessing=Preprocessing(8, 8))
    with pytest.raises(SettingError, match=r"no feature map of more than one place before its head.* 8 × 8 px"):
        heat_map(model, pictures(1, 8))


# The model stays as it was


def state_of(model: TransferModel) -> dict[str, Any]:
    return {
        "values": {key: value.numpy().tobytes() for key, value in model.network.state_dict().items()},
        "identities": [id(each) for each in (*model.parameters(), *model.buffers())],
        "trains": [each.requires_grad for each in model.parameters()],
        "gradients": [None if each.grad is None else each.grad.numpy().tobytes() for each in model.parameters()],
        "modes": [each.training for each in model.modules()],
        "attributes": [set(vars(each)) for each in model.modules()],
        "hooks": [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()],
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched(tiny_model: Callable[..., TransferModel], frozen: bool, training: bool) -> None:
    model = tiny_model().train(training)
    if frozen:
        model.freeze(LinearProbe().frozen_stages(model.stage_names, 0))
    model(pictures(2, 32)).sum().backward()
    if not frozen:
        model.network.bn1.training = not training
    images = pictures(2, 32)
    before = state_of(model)
    with torch.no_grad():
        heat_map(model, images)
    assert state_of(model) == before
    assert images.grad is None
    assert not images.requires_grad


def test_the_model_is_untouched_after_an_error(tiny_model: Callable[..., TransferModel]) -> None:
    model = tiny_model().train()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        heat_map(model, pictures(2, 32).double())
    with pytest.raises(SettingError):
        heat_map(model, pictures(2, 32), class_index=9)
    assert state_of(model) == before


def test_every_parameter_may_be_frozen_and_grad_mode_does_not_matter(tiny_model: Callable[..., TransferModel]) -> None:
    model, images = tiny_model(), pictures(2, 32)
    expected = heat_map(model, images)
    model.freeze(model.stage_names)
    with torch.inference_mode():
        found = heat_map(model, images.clone())
    torch.testing.assert_close(found, expected)
