from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights
from torchvision.transforms import v2

from transferkit.exceptions import DataError, SettingError
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
KINDS = {"train": TRAIN_PRESETS, "eval": EVAL_PRESETS}


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


PLAIN = Preprocessing(24, 28, mean=(0.0,) * 3, std=(1.0,) * 3)
PRESETS = {f"{kind}_{name}": make for kind, presets in KINDS.items() for name, make in presets.items()}
JITTER = partial(cifar_train, jitter=0.4, rotation=10)


def channels_of(count: int, kind: str) -> Image.Image | torch.Tensor:
    if kind == "PIL":
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[count]
        return Image.merge(mode, [noise(50, 41, band).convert("L") for band in range(count)])
    tensor = torch.randint(256, (count, 41, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return tensor if kind == "uint8" else tensor / 255


@pytest.mark.parametrize("preset", [*PRESETS.values(), JITTER], ids=[*PRESETS, "jitter"])
@pytest.mark.parametrize(
    ("count", "kind"),
    [*product([1, 3, 4], ["PIL", "uint8", "float"]), (5, "uint8"), (5, "float"), (13, "uint8")],
)
def test_every_preset_takes_pictures_of_its_channels(preset, count, kind):
    preprocessing = SMALL.with_channels(count)
    transform = preset(preprocessing)
    picture = channels_of(count, kind)
    torch.manual_seed(0)
    for _ in range(20):  # trivial_augment draws one of 14 changes
        result = transform(picture)
        assert (type(result), result.dtype, result.shape) == (
            torch.Tensor,
            torch.float32,
            (count, preprocessing.size, preprocessing.size),
        )
        assert result.abs().max() < 4
    assert transform.channels == count
    assert len(repr(transform).splitlines()) == len(transform.transforms) + 2


@pytest.mark.parametrize("preset", [light, cifar_train, cifar_eval, imagenet_eval])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_geometry_treats_every_channel_alike(preset, kind):
    picture = channels_of(3, kind)
    doubled = torch.cat([picture, picture])
    torch.manual_seed(0)
    expected = preset(PLAIN)(picture)
    torch.manual_seed(0)
    six = preset(PLAIN.with_channels(6))(doubled)
    torch.testing.assert_close(six, torch.cat([expected, expected]))


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_changes_of_colour_are_those_of_rgb_and_leave_further_channels_alone(kind):
    picture = channels_of(3, kind)
    five = torch.cat([picture, picture[:2]])
    changed, moved = 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        expected = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)(picture)
        torch.manual_seed(seed)
        result = trivial_augment(PLAIN.with_channels(5)).transforms[-4](five)
        torch.testing.assert_close(result[:3], expected)
        if torch.equal(result[3:], five[3:]):
            changed += not torch.equal(expected, picture)
        else:
            torch.testing.assert_close(result[3:], expected[:2])
            moved += 1
    assert min(changed, moved) > 10


def test_jitter_changes_rgb_as_it_does_alone_and_leaves_transparency():
    picture = noise(32, 32).convert("RGBA")
    picture.putalpha(noise(32, 32, 1).convert("L"))
    plain = Preprocessing(32, 32, mean=(0.0,) * 3, std=(1.0,) * 3)
    jittered = cifar_train(plain.with_channels(4), jitter=0.4).transforms[-4]
    tensor = v2.functional.pil_to_tensor(picture)
    torch.manual_seed(0)
    four = jittered(tensor)
    torch.manual_seed(0)
    three = v2.ColorJitter(0.4, 0.4, 0.4)(tensor[:3])
    assert torch.equal(four, torch.cat([three, tensor[3:]]))
    assert not torch.equal(three, tensor[:3])


def test_colours_under_transparency_are_not_lost():
    picture = Image.new("RGBA", (80, 40), (200, 100, 50, 0))
    result = imagenet_eval(PLAIN.with_channels(4))(picture)
    torch.testing.assert_close(result.mean((1, 2)) * 255, torch.tensor([200.0, 100.0, 50.0, 0.0]))


def test_a_grey_tensor_keeps_its_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    result = imagenet_eval(Preprocessing(16, 16, mean=(0.0,), std=(1.0,)))(levels)
    torch.testing.assert_close(result, levels / 255)


@pytest.mark.parametrize(
    ("count", "picture", "what"),
    [
        (4, Image.new("RGB", (9, 9)), "of mode RGB"),
        (4, Image.new("CMYK", (9, 9)), "of mode CMYK"),
        (5, Image.new("RGBA", (9, 9)), "of mode RGBA"),
        (4, torch.zeros(3, 9, 9), r"of shape \(3, 9, 9\)"),
        (2, torch.zeros(4, 9, 9), r"of shape \(4, 9, 9\)"),
    ],
)
def test_a_picture_of_other_channels_is_refused_not_padded(count, picture, what):
    message = rf"picture {what} came to a transform for {count} channels; read it with channels={count}, or from"
    with pytest.raises(DataError, match=message):
        imagenet_eval(SMALL.with_channels(count))(picture)


def test_two_channels_take_geometry_and_refuse_changes_of_colour():
    two = SMALL.with_channels(2)
    assert light(two)(channels_of(2, "uint8")).shape == (2, 24, 24)
    for preset in (trivial_augment, JITTER):
        with pytest.raises(SettingError, match="2 channels have no colours to change; choose the transform light"):
            preset(two)


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
    with pytest.raises(SettingError, match=f"^{name} must be .*, got {value}$"):
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
