import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights
from torchvision.transforms import v2

from transferkit.exceptions import SettingError
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import (
    CIFAR10_PREPROCESSING,
    EVAL_PRESETS,
    TRAIN_PRESETS,
    cifar_eval,
    cifar_train,
    denormalize,
    eval_transform,
    imagenet_eval,
    light,
    none,
    train_transform,
    trivial_augment,
)

SMALL = Preprocessing(size=24, resize_size=28)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("weights", [ResNet18_Weights.DEFAULT, MobileNet_V2_Weights.DEFAULT])
@pytest.mark.parametrize("size", [(300, 260), (90, 400), (500, 233)])
def test_imagenet_eval_equals_the_transform_torchvision_ships_with_the_weights(weights, size):
    oracle = weights.transforms()
    preprocessing = Preprocessing(
        size=oracle.crop_size[0],
        resize_size=oracle.resize_size[0],
        mean=tuple(oracle.mean),
        std=tuple(oracle.std),
        interpolation=oracle.interpolation.value,
    )
    picture = noise(*size)
    torch.testing.assert_close(imagenet_eval(preprocessing)(picture), oracle(picture), rtol=0, atol=1e-6)


def test_squash_keeps_the_whole_picture():
    picture = Image.new("RGB", (80, 20), "black")
    picture.paste("white", (0, 0, 10, 20))
    squashed = Preprocessing(size=24, resize_size=24, mean=(0.0,) * 3, std=(1.0,) * 3, crop="squash")
    assert imagenet_eval(squashed)(picture)[:, :, 0].min() > 0.9
    assert imagenet_eval(Preprocessing(24, 24, mean=(0.0,) * 3, std=(1.0,) * 3))(picture).max() == 0


@pytest.mark.parametrize("preset", [*TRAIN_PRESETS.values(), *EVAL_PRESETS.values()])
@pytest.mark.parametrize(
    "preprocessing", [SMALL, CIFAR10_PREPROCESSING, Preprocessing(40, 40, (0.5,), (0.5,), "bicubic")]
)
@pytest.mark.parametrize("kind", ["PIL", "uint8", "float"])
def test_every_preset_gives_a_normalised_float_square(preset, preprocessing, kind):
    picture = noise(50, 41)
    if kind != "PIL":
        picture = v2.functional.pil_to_tensor(picture)
    if kind == "float":
        picture = picture / 255
    result = preset(preprocessing)(picture)
    assert type(result) is torch.Tensor
    assert result.dtype == torch.float32
    assert result.shape == (len(preprocessing.mean), preprocessing.size, preprocessing.size)
    assert result.abs().max() < 4


def test_one_mean_value_turns_the_picture_grey():
    picture = Image.new("RGB", (24, 24), (255, 0, 0))
    grey = imagenet_eval(Preprocessing(24, 24, mean=(0.0,), std=(1.0,)))(picture)
    torch.testing.assert_close(grey, torch.full((1, 24, 24), 76 / 255))


def test_two_channels_are_refused():
    with pytest.raises(SettingError, match="1 or 3 channels, preprocessing has 2"):
        imagenet_eval(Preprocessing(24, 24, mean=(0.0, 0.0), std=(1.0, 1.0)))


def test_cifar_eval_leaves_32_pixel_pictures_as_they_are():
    picture = noise(32, 32)
    result = denormalize(cifar_eval(CIFAR10_PREPROCESSING)(picture), CIFAR10_PREPROCESSING)
    torch.testing.assert_close(result, v2.functional.pil_to_tensor(picture) / 255)


def test_cifar_train_shifts_by_at_most_four_pixels_before_it_enlarges():
    picture = Image.new("RGB", (32, 32), "black")
    picture.putpixel((16, 16), (255, 255, 255))
    preprocessing = Preprocessing(64, 64, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest")
    transform = cifar_train(preprocessing)
    torch.manual_seed(0)
    places = set()
    for _ in range(60):
        rows, columns = transform(picture)[0].nonzero(as_tuple=True)
        assert len(rows) == 4  # one pixel became two by two
        places.add((int(rows[0]) // 2, int(columns[0]) // 2))
    assert len(places) > 20
    assert all(12 <= row <= 20 and 11 <= column <= 20 for row, column in places)


def test_jitter_and_rotation_join_the_pipeline_only_when_asked_for():
    assert "ColorJitter" not in repr(cifar_train(CIFAR10_PREPROCESSING))
    text = repr(cifar_train(CIFAR10_PREPROCESSING, jitter=0.25, rotation=15))
    assert "brightness=(0.75, 1.25)" in text
    assert "degrees=[-15.0, 15.0]" in text


@pytest.mark.parametrize("options", [{"jitter": -0.1}, {"rotation": -1}, {"rotation": 181}, {"jitter": float("nan")}])
def test_cifar_train_refuses_settings_outside_their_range(options):
    (name, value), *_ = options.items()
    with pytest.raises(SettingError, match=f"{name}={value}; it can be"):
        cifar_train(CIFAR10_PREPROCESSING, **options)


@pytest.mark.parametrize("kind", ["PIL", "uint8", "float"])
def test_trivial_augment_can_apply_every_change_to_every_kind_of_picture(kind):
    picture = noise(12, 12) if kind == "PIL" else v2.functional.pil_to_tensor(noise(12, 12))
    picture = picture / 255 if kind == "float" else picture
    transform = trivial_augment(Preprocessing(8, 8, interpolation="bicubic"))
    torch.manual_seed(0)
    assert all(transform(picture).isfinite().all() for _ in range(100))


def test_light_keeps_half_of_the_picture():
    assert "scale=(0.5, 1.0)" in repr(light(SMALL))
    assert "TrivialAugmentWide" in repr(trivial_augment(SMALL))


def test_none_is_the_evaluation_transform():
    picture = noise(60, 50)
    assert torch.equal(none(SMALL)(picture), imagenet_eval(SMALL)(picture))


def test_pipelines_print_one_line_per_step_with_short_numbers():
    assert repr(train_transform("imagenet", SMALL)).splitlines() == [
        "imagenet_train(",
        "  RandomResizedCrop(size=(24, 24), scale=(0.08, 1.0), ratio=(0.75, 1.333), "
        "interpolation=bilinear, antialias=True)",
        "  RandomHorizontalFlip(p=0.5)",
        "  PILToTensor()",
        "  ToDtype(scale=True)",
        "  Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], inplace=False)",
        ")",
    ]
    assert isinstance(train_transform("imagenet", SMALL), v2.Compose)


def test_a_callable_is_its_own_training_transform():
    def own(picture):
        return torch.zeros(3, 1, 1)

    assert train_transform(own, SMALL) is own


def test_eval_transform_depends_on_its_two_arguments_alone():
    picture = noise(60, 50)
    first = eval_transform("cifar", SMALL)(picture)
    torch.manual_seed(1)
    assert torch.equal(first, eval_transform("cifar", SMALL)(picture))


@pytest.mark.parametrize(
    ("find", "name", "near"),
    [(train_transform, "trivial", "trivial_augment"), (eval_transform, "imagenette", "imagenet")],
)
def test_unknown_names_are_answered_with_the_names_that_exist(find, name, near):
    with pytest.raises(
        SettingError, match=f"no (train|eval) transform named '{name}'; there are .*imagenet.* '{near}'"
    ):
        find(name, SMALL)


CHANNEL = st.floats(0.05, 1.0)


@given(
    mean=st.tuples(CHANNEL, CHANNEL, CHANNEL),
    std=st.tuples(CHANNEL, CHANNEL, CHANNEL),
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([(), (1,), (2,)]),
)
def test_denormalize_inverts_normalisation(mean, std, seed, batch):
    images = torch.rand(*batch, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    normalised = v2.functional.normalize(images, list(mean), list(std))
    restored = denormalize(normalised, Preprocessing(mean=mean, std=std))
    torch.testing.assert_close(restored, images, rtol=0, atol=1e-5)


def test_denormalize_clamps_and_gives_float32():
    wild = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.bfloat16).view(3, 1, 1)
    assert denormalize(wild, Preprocessing(mean=(0.5,) * 3)).flatten().tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4), (2, 1, 4, 4)])
def test_denormalize_refuses_images_of_another_shape(shape):
    with pytest.raises(SettingError, match=r"give \(3, H, W\) or \(B, 3, H, W\)"):
        denormalize(torch.zeros(shape), SMALL)
