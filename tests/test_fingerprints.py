"""Copies are found by how they look: at another size, from another encoder, mirrored. Other pictures are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFilter, ImageOps

from transferkit.fingerprints import NEAR, near_pairs, picture_facts


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A made picture with structure at several scales, as photos have."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / cells
    picture -= picture.min()
    return Image.fromarray((picture * (255 / picture.max())).astype(np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def distance(first: bytes, second: bytes) -> int:
    return sum((one ^ other).bit_count() for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_near_and_others_are_not(tmp_path: Path, seed: int) -> None:
    picture = scene(seed)
    files = [
        saved(picture, tmp_path / "a.png"),
        saved(picture.resize((80, 60)), tmp_path / "small.png"),
        saved(picture.resize((400, 300), Image.Resampling.BICUBIC), tmp_path / "large.jpg", quality=90),
        saved(picture, tmp_path / "encoded.jpg", quality=30),
        saved(picture.convert("L"), tmp_path / "grey.png"),
        saved(picture.filter(ImageFilter.GaussianBlur(1)), tmp_path / "blurred.png"),
        saved(ImageOps.mirror(picture), tmp_path / "mirrored.jpg", quality=80),
    ]
    others = [saved(scene(100 + number), tmp_path / f"{number}.png") for number in range(20)]
    pairs = near_pairs([picture_facts(path).look for path in (*files, *others)])
    count = len(files)
    assert {(pair.first, pair.second) for pair in pairs} == {
        (first, second) for first in range(count) for second in range(first + 1, count)
    }
    assert {pair.mirrored for pair in pairs if pair.second < count - 1} == {False}
    assert {pair.mirrored for pair in pairs if pair.second == count - 1} == {True}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_mirrored_picture_has_the_mirrored_look(seed: int) -> None:
    picture = scene(seed, (64, 64))
    looks = []
    for each in (picture, ImageOps.mirror(picture)):
        file = io.BytesIO()
        each.save(file, "PNG")
        looks.append(_look_of(file.getvalue()))
    [pair] = near_pairs(looks)
    assert pair.mirrored
    assert pair.distance <= 4


def _look_of(content: bytes) -> bytes:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(content)
        file.flush()
        return picture_facts(file.name).look


def drawn(generator: np.random.Generator, count: int) -> list[bytes]:
    signs = generator.integers(0, 2, (count, 256), dtype=np.uint8)
    signs[:, 0] = 0
    return [np.packbits(row).tobytes() for row in signs]


def changed(look: bytes, generator: np.random.Generator, count: int) -> bytes:
    signs = np.unpackbits(np.frombuffer(look, dtype=np.uint8))
    signs[generator.choice(np.arange(1, 256), count, replace=False)] ^= 1
    return np.packbits(signs).tobytes()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.lists(st.integers(0, 7), max_size=10))
def test_it_finds_what_comparing_all_with_all_finds(seed: int, count: int, copies: list[int]) -> None:
    generator = np.random.default_rng(seed)
    looks = drawn(generator, count)
    looks += [changed(looks[int(generator.integers(count))], generator, apart) for apart in copies]
    found = {(pair.first, pair.second): pair.distance for pair in near_pairs(looks)}
    expected = {
        (first, second): distance(looks[first], looks[second])
        for first in range(len(looks))
        for second in range(first + 1, len(looks))
        if distance(looks[first], looks[second]) <= NEAR
    }
    assert {pair: found[pair] for pair in expected} == expected
    assert all(apart <= NEAR for apart in found.values())


def test_most_of_the_farthest_near_ones_are_found() -> None:
    generator = np.random.default_rng(0)
    looks = drawn(generator, 500)
    looks += [changed(look, generator, NEAR) for look in looks]
    pairs = {(pair.first, pair.second) for pair in near_pairs(looks)}
    assert len(pairs & {(index, index + 500) for index in range(500)}) >= 485


def test_many_that_look_alike_do_not_take_forever() -> None:
    look = drawn(np.random.default_rng(0), 1)[0]
    pairs = near_pairs([look] * 3000)
    assert 3000 - 1 <= len(pairs) <= 32 * 3000 * 2


def test_pictures_of_one_colour_are_like_none(tmp_path: Path) -> None:
    looks = [picture_facts(saved(Image.new("RGB", (50, 50), c), tmp_path / f"{c}.png")).look for c in ("red", "blue")]
    assert looks == [b"", b""]
    assert near_pairs([*looks, b""]) == []


@pytest.mark.parametrize("looks", [[], [b""], [bytes(range(32))]])
def test_one_picture_has_no_copy(looks: list[bytes]) -> None:
    assert near_pairs(looks) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_lies_on_its_side_is_measured_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    facts = picture_facts(saved(scene(0, (640, 320)), tmp_path / "a.jpg", exif=exif))
    assert (facts.width, facts.height) == ((320, 640) if orientation > 4 else (640, 320))
