"""Adapting a stem to small pictures: what is undone, what the weights become, and that a plan is data."""

import logging
from collections.abc import Callable
from importlib import import_module

import pytest
import timm
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from transferkit.backbones.stem import StemChange, Window, change_stem, describe, plan_stem, stem_arguments
from transferkit.exceptions import ArtifactError, SettingError

# The module whose output is the last feature map, channels first.
LAST_MAPS = {
    "alexnet": "features.11",
    "convnext_tiny": "features",
    "efficientnet_b0": "features",
    "mobilenet_v2": "features",
    "resnet18": "layer4",
    "shufflenet_v2_x0_5": "conv5",
    "squeezenet1_1": "features",
    "swin_t": "permute",
}
MORE_LAST_MAPS = {
    "densenet121": "features",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "mnasnet0_5": "layers",
    "mobilenet_v3_small": "features",
    "regnet_y_400mf": "trunk_output",
    "swin_v2_t": "permute",
}
TIMM = ("resnet10t", "resnet26d", "mobilenetv3_small_050", "convnext_atto")
TIMM_TOKENS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224")


def build_torchvision(name: str, **arguments: object) -> nn.Module:
    extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # torchvision's RegNet reads values while it is built
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return models.get_model(name, weights=None, **extra, **arguments)


def build_timm(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


class Halving(nn.Module):
    """A user's network that pools by a function, which no change of its layers undoes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        for _ in range(4):
            images = self.convolution(F.max_pool2d(images, 2))
        return images.mean((2, 3))


def run(network: nn.Module, size: int = 32) -> Tensor:
    weight = next(network.parameters())
    return network.eval()(torch.zeros(1, 3, size, size, device=weight.device))


@pytest.mark.parametrize(
    ("name", "path"),
    [*LAST_MAPS.items(), *(pytest.param(*each, marks=pytest.mark.long) for each in MORE_LAST_MAPS.items())],
)
def test_a_torchvision_network_keeps_4x4_positions_of_32_px(name: str, path: str) -> None:
    network = build_torchvision(name)
    change_stem(network, plan_stem(network, channels=3, size=32))
    shapes = []
    network.get_submodule(path).register_forward_hook(lambda *args: shapes.append(args[2].shape))
    assert run(network).shape == (1, 1000)
    assert min(shapes[0][-2:]) >= 4


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_network_keeps_4x4_positions_of_32_px(name: str) -> None:
    assert stem_arguments(f"timm/{name}", size=32) == {}
    network = build_timm(name)
    change_stem(network, plan_stem(network, channels=3, size=32))
    features = network.eval().forward_features(torch.zeros(1, 3, 32, 32, device="meta"))
    assert features.shape[-2:] == (4, 4)
    assert run(network).shape == (1, 1000)


@pytest.mark.parametrize("name", TIMM_TOKENS)
def test_a_timm_network_of_tokens_is_built_with_8x8_of_them(name: str) -> None:
    network = build_timm(name, num_classes=1000, **stem_arguments(f"timm/{name}", size=32))
    assert network.patch_embed.grid_size == (8, 8)
    assert run(network).shape == (1, 1000)
    assert plan_stem(network, channels=3, size=32) == ()


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", pytest.param("swinv2_tiny_window8_256", marks=pytest.mark.long)]
)
def test_timm_swin_has_whole_windows_and_4x4_positions_at_its_last_stage(name: str) -> None:
    network = build_timm(name, **stem_arguments(f"timm/{name}", size=32))
    windows = [(block.window_size[0], block.input_resolution[0]) for layer in network.layers for block in layer.blocks]
    assert all(resolution % window == 0 for window, resolution in windows)
    features = network.eval().forward_features(torch.zeros(1, 3, 32, 32, device="meta"))
    assert features.shape[1:3] == (4, 4)
    assert plan_stem(network, channels=3, size=32) == ()


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32"])
def test_torchvision_vit_sees_32_px_as_8x8_tokens(name: str) -> None:
    network = build_torchvision(name, **stem_arguments(f"torchvision/{name}", size=32))
    change_stem(network, plan_stem(network, channels=3, size=32))
    assert (network.image_size, network.patch_size, network.seq_length) == (32, 4, 65)
    assert run(network).shape == (1, 1000)


def test_resnet_gets_a_3x3_convolution_and_no_pool() -> None:
    network = models.resnet18()
    changes = plan_stem(network, channels=3, size=32)
    assert describe(changes) == "conv1 7x7/2 -> 3x3/1, maxpool removed"
    assert isinstance(network.maxpool, nn.MaxPool2d)
    change_stem(network, changes)
    assert (network.conv1.kernel_size, network.conv1.stride, network.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(network.maxpool, nn.Identity)


def test_a_smaller_picture_undoes_a_residual_step_with_its_shortcut() -> None:
    changes = plan_stem(models.resnet18(), channels=3, size=16)
    assert [change.path for change in changes] == ["conv1", "maxpool", "layer2.0.conv1", "layer2.0.downsample.0"]
    shortcut = build_timm("resnet26d")
    paths = [change.path for change in plan_stem(shortcut, channels=3, size=16)]
    assert "layer2.0.downsample.0" in paths  # its average pool


def test_a_large_picture_changes_nothing() -> None:
    assert plan_stem(build_torchvision("resnet18"), channels=3, size=128) == ()


@pytest.mark.parametrize("build", [build_torchvision, build_timm])
def test_vgg_keeps_its_stem_and_the_log_says_so(
    build: Callable[[str], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="transferkit"):
        assert plan_stem(build("vgg11"), channels=3, size=32) == ()
    assert "VGG keeps its stem" in caplog.text
    assert describe(()) == "stem unchanged"


def test_pooling_that_is_not_maximal_is_undone() -> None:
    network = build_timm("tresnet_m")  # it opens by moving pixels to channels and blurs at every step
    change_stem(network, plan_stem(network, channels=3, size=32))
    assert network.eval().forward_features(torch.zeros(1, 3, 32, 32, device="meta")).shape[-1] == 4


@pytest.mark.parametrize(("old", "new"), [(7, 3), (11, 3), (4, 3), (16, 4), (32, 4)])
def test_the_new_kernel_sees_a_picture_as_the_old_one_saw_the_enlarged_one(old: int, new: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, old, stride=old))
    small = torch.randn(2, 3, 4, 4, new, new)  # 4 × 4 patches
    # The enlarged patch is the smallest one that antialiased bicubic resizing turns into the small one.
    basis = torch.eye(old * old).reshape(-1, 1, old, old)
    shrink = F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True).reshape(old * old, new * new)
    large = (small.flatten(-2) @ torch.linalg.pinv(shrink)).unflatten(-1, (old, old))
    expected = network(large.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 4 * old, 4 * old))
    change_stem(network, [StemChange("0", Window(old, old, 0), Window(new, new, 0))])
    actual = network(small.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 4 * new, 4 * new))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_smaller_patch_answers_on_a_smooth_picture_nearly_as_on_its_bicubic_enlargement() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 16, stride=16))
    with torch.no_grad():  # neighbouring weights of trained kernels resemble each other
        network[0].weight.copy_(F.interpolate(torch.randn(64, 3, 4, 4), size=(16, 16), mode="bicubic") / 28)
    small = F.interpolate(torch.randn(8, 3, 8, 8), size=(32, 32), mode="bicubic")
    expected = network(F.interpolate(small, size=(128, 128), mode="bicubic"))
    change_stem(network, [StemChange("0", Window(16, 16, 0), Window(4, 4, 0))])
    error = (network(small) - expected).norm() / expected.norm()
    assert error < 0.2


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/test_efficientnet", "timm/test_convnext"])
def test_a_plan_read_back_rebuilds_the_network(name: str) -> None:
    library, _, architecture = name.partition("/")

    def build() -> nn.Module:
        return timm.create_model(architecture) if library == "timm" else models.get_model(architecture)

    torch.manual_seed(0)
    network, rebuilt = build(), build()
    statistics = {key: value.clone() for key, value in network.named_buffers()}
    changes = plan_stem(network, channels=3, size=32)
    change_stem(network, changes)
    assert all(torch.equal(value, statistics[key]) for key, value in network.named_buffers())
    change_stem(rebuilt, [StemChange.from_dict(change.to_dict()) for change in changes])
    rebuilt.load_state_dict(network.state_dict())
    picture = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(picture), rebuilt.eval()(picture))


def test_two_copies_of_a_network_change_alike_and_keep_what_a_parameter_is() -> None:
    first = models.resnet18().half()
    first.conv1.weight.requires_grad_(False)
    second = models.resnet18().half()
    second.load_state_dict(first.state_dict())
    changes = plan_stem(first, channels=3, size=32)
    change_stem(first, changes)
    change_stem(second, changes)
    assert torch.equal(first.conv1.weight, second.conv1.weight)
    assert first.conv1.weight.dtype == torch.float16
    assert not first.conv1.weight.requires_grad
    assert second.conv1.weight.requires_grad


def test_planning_leaves_weights_mode_and_hooks_alone() -> None:
    network = timm.create_model("test_efficientnet").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plan_stem(network, channels=3, size=32)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in network.modules())


def test_an_adapted_network_learns() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    change_stem(network, plan_stem(network, channels=1, size=32))
    network.train()(torch.randn(2, 1, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_convolutions_that_pad_by_themselves_are_not_padded_twice() -> None:
    network = build_timm("tf_efficientnet_b0")
    changes = plan_stem(network, channels=3, size=32)
    assert {change.after for change in changes} == {Window(3, 1, 0)}
    change_stem(network, changes)
    assert network.eval().forward_features(torch.zeros(1, 3, 32, 32, device="meta")).shape[-1] == 4


def test_a_single_patch_convolution_of_a_users_network_gets_8x8_tokens() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    (change,) = plan_stem(network, channels=3, size=32)
    assert change.after == Window(4, 4, 0)


def test_downsampling_by_patches_is_undone_step_by_step() -> None:
    steps = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 2, stride=2), nn.Conv2d(3, 3, 3, padding=1))]
    changes = plan_stem(nn.Sequential(*steps), channels=3, size=32)
    assert describe(changes) == "0 2x2/2 -> 3x3/1"
    changes = plan_stem(nn.Sequential(*steps), channels=3, size=8)
    assert [change.path for change in changes] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("build", "name"), [(build_timm, "mixer_s16_224"), (build_torchvision, "vit_b_16"), (Halving, "halving")]
)
def test_a_network_that_cannot_be_adapted_says_what_to_do(build: Callable[[str], nn.Module], name: str) -> None:
    with pytest.raises(SettingError, match="small_images='upsample'") as caught:
        plan_stem(build(name), channels=3, size=32)
    assert "\n" not in str(caught.value)


def test_pictures_of_no_use_are_refused() -> None:
    network = build_torchvision("resnet18")
    with pytest.raises(SettingError, match="size=3"):
        plan_stem(network, channels=3, size=3)
    with pytest.raises(SettingError, match="channels=0"):
        plan_stem(network, channels=0, size=32)
    with pytest.raises(SettingError, match="too small for 8x8 tokens"):
        stem_arguments("timm/vit_tiny_patch16_224", size=7)


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (28, 2), (31, 1), (48, 6), (64, 8), (256, 16)])
def test_a_patch_divides_a_picture_into_8x8_tokens_or_more(size: int, patch: int) -> None:
    assert stem_arguments("timm/test_vit", size=size) == {"img_size": size, "patch_size": patch}


windows = st.builds(Window, st.integers(1, 32), st.integers(1, 32), st.integers(0, 16))
changes = st.one_of(
    st.builds(StemChange, st.text(min_size=1)), st.builds(StemChange, st.text(min_size=1), windows, windows)
)


@given(change=changes)
def test_a_change_survives_its_dictionary(change: StemChange) -> None:
    assert StemChange.from_dict(change.to_dict()) == change


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"path": "conv1", "before": [7, 2, 3]},
        {"path": "conv1", "before": [7, 2, 3], "after": None},
        {"path": "conv1", "before": [7, 2, 3], "after": [3, 1]},
        {"path": "conv1", "before": [7, 2, 3], "after": [3, 0, 1]},
        {"path": "conv1", "before": [7, 2, 3], "after": [3.0, 1, 1]},
        {"path": "conv1", "before": [7, 2, 3], "after": "3x3"},
        {"path": "", "before": None, "after": None},
        {"path": 1, "before": None, "after": None},
        {"path": "conv1", "before": None, "after": None, "surprise": 1},
    ],
)
def test_nonsense_in_a_saved_change_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="stem change in the saved config"):
        StemChange.from_dict(values)


def test_a_change_that_does_not_fit_the_network_is_refused() -> None:
    network = build_torchvision("resnet18")
    plan = plan_stem(network, channels=3, size=32)
    with pytest.raises(ArtifactError, match="did you mean 'conv1'"):
        change_stem(network, [StemChange("conv11", Window(7, 2, 3), Window(3, 1, 1))])
    with pytest.raises(ArtifactError, match="does not fit fc"):
        change_stem(network, [StemChange("fc")])
    change_stem(network, plan)
    with pytest.raises(ArtifactError, match="make it once"):
        change_stem(network, plan)


def assert_weights_load(name: str) -> None:
    """Load the weights of the network as it is into the one for small pictures, through timm's own filter."""
    pretrained = timm.create_model(name)
    small = timm.create_model(name, **stem_arguments(f"timm/{name}", size=32)).eval()
    family = import_module(timm.model_entrypoint(name).__module__)
    small.load_state_dict(family.checkpoint_filter_fn(dict(pretrained.state_dict()), small))
    with torch.no_grad():
        assert small(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_pretrained_weights_load_into_a_network_of_smaller_patches() -> None:
    assert_weights_load("test_vit")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # timm's interpolation of position tables indexes by lists
@pytest.mark.filterwarnings("ignore:torch.searchsorted")
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
    ],
)
def test_pretrained_weights_load_in_every_family_of_tokens(name: str) -> None:
    assert_weights_load(name)


@pytest.mark.long
@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_torchvision_classifier_is_adapted_or_refused_in_one_sentence(name: str) -> None:
    network = build_torchvision(name, **stem_arguments(f"torchvision/{name}", size=32))
    if name == "maxvit_t":  # its windows of 7 divide no side that 32 px can have
        with pytest.raises(SettingError, match="small_images='upsample'"):
            plan_stem(network, channels=3, size=32)
        return
    changes = plan_stem(network, channels=3, size=32)
    assert bool(changes) is not name.startswith("vgg")
    change_stem(network, changes)
    assert run(network).shape == (1, 1000)
    assert plan_stem(network, channels=3, size=32) == ()
