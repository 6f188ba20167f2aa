"""Preprocessing: validated, resized with its crop, written as plain JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from transferkit.exceptions import ArtifactError, SettingError
from transferkit.preprocessing import Preprocessing

channels = st.integers(1, 4)


@st.composite
def preprocessings(draw: st.DrawFn) -> Preprocessing:
    size = draw(st.integers(1, 600))
    count = draw(channels)
    unit = st.floats(0.01, 1.0)
    return Preprocessing(
        size=size,
        resize_size=size + draw(st.integers(0, 300)),
        mean=tuple(draw(st.lists(unit, min_size=count, max_size=count))),
        std=tuple(draw(st.lists(unit, min_size=count, max_size=count))),
        interpolation=draw(st.sampled_from(["nearest", "bilinear", "bicubic"])),
        crop=draw(st.sampled_from(["center", "squash"])),
    )


@given(preprocessings())
@settings(max_examples=50, deadline=None)
def test_json_gives_the_same_back(preprocessing: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@given(preprocessings(), st.integers(1, 600))
@settings(max_examples=100, deadline=None)
def test_another_size_keeps_the_crops_share(preprocessing: Preprocessing, size: int) -> None:
    other = preprocessing.resized(size)
    assert other.size == size
    assert other.resize_size >= size
    assert abs(other.resize_size - preprocessing.resize_size * size / preprocessing.size) < 1
    assert (other.mean, other.std, other.crop) == (preprocessing.mean, preprocessing.std, preprocessing.crop)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    assert Preprocessing(size=224, resize_size=232).resized(224) == Preprocessing(size=224, resize_size=232)


@given(preprocessings(), channels, channels)
def test_another_number_of_channels_keeps_everything_else(preprocessing: Preprocessing, count: int, again: int) -> None:
    other = preprocessing.with_channels(count)
    assert (other.channels, len(other.mean), len(other.std)) == (count, count, count)
    assert other.with_channels(count) is other
    assert preprocessing.differences(other).keys() <= {"mean", "std"}
    assert other.with_channels(again).channels == again
    for old, new in ((preprocessing.mean, other.mean), (preprocessing.std, other.std)):
        average = pytest.approx(sum(old) / len(old))
        if count == 1:
            assert new == (pytest.approx(average.expected),)
        else:
            kept = min(count, len(old))
            assert new[:kept] == old[:kept]
            assert all(value == average for value in new[kept:])


def test_one_channel_has_the_mean_of_three_and_three_stay_themselves() -> None:
    preprocessing = Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.75))
    assert preprocessing.with_channels(3) is preprocessing
    assert preprocessing.channels == 3
    grey = preprocessing.with_channels(1)
    assert (grey.mean, grey.std) == ((0.5,), (0.5,))
    six = preprocessing.with_channels(6)
    assert (six.mean, six.std) == ((0.25, 0.5, 0.75, 0.5, 0.5, 0.5), (0.5, 0.25, 0.75, 0.5, 0.5, 0.5))


@pytest.mark.parametrize("count", [0, -2])
def test_fewer_channels_than_one_are_refused(count: int) -> None:
    with pytest.raises(SettingError, match=f"channels must be from 1 to 1,000, got {count}"):
        Preprocessing().with_channels(count)


def test_differences_name_each_value_that_is_another() -> None:
    own = Preprocessing()
    assert own.differences(Preprocessing()) == {}
    assert own.differences(Preprocessing(mean=(0.5,) * 3, crop="squash")) == {
        "mean": (own.mean, (0.5,) * 3),
        "crop": ("center", "squash"),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (), "std": ()}, "one value per channel"),
        ({"size": 0}, "size must be from 1 to 16,384, got 0"),
        ({"size": 300}, "got size=300, resize_size=256"),
        ({"mean": (0.5,)}, "one value per channel"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be above 0, got 0.0"),
        ({"std": (0.5, 0.5, float("nan"))}, "std must be a finite number, above 0, got nan"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos'; it can be nearest, bilinear or bicubic"),
        ({"crop": "five"}, "crop='five'; it can be center, squash or border"),
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Preprocessing(**values)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_pixel_is_refused(size: int) -> None:
    with pytest.raises(SettingError, match=f"image_size must be from 1 to 16,384, got {size}"):
        Preprocessing().resized(size)


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": None},
        {"std": [0, 0, 0]},
        {"std": ["a", "b", "c"]},
        {"size": "224"},
        {"interpolation": "magic"},
        {"surprise": 1},
    ],
)
def test_a_damaged_config_is_an_artifact_error(damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="preprocessing in the saved config cannot be used"):
        Preprocessing.from_dict({**Preprocessing().to_dict(), **damage})


def test_a_config_without_a_mean_is_an_artifact_error() -> None:
    values = Preprocessing().to_dict()
    del values["mean"]
    with pytest.raises(ArtifactError, match="mean"):
        Preprocessing.from_dict(values)
