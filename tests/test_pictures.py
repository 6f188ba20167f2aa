import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import ExifTags, Image, ImageOps
from torchvision import tv_tensors

from transferkit.exceptions import DataError, PictureError
from transferkit.pictures import as_picture, list_pictures, picture_extensions, read_picture

CORNERS = np.array([[[250, 10, 10], [10, 250, 10]], [[10, 10, 250], [240, 240, 240]]], dtype=np.uint8)


def corners(size: int = 16) -> Image.Image:
    """A picture whose four quarters differ, so that every turn of it shows."""
    return Image.fromarray(CORNERS.repeat(size, axis=0).repeat(size // 2, axis=1))


def close(picture: Image.Image, expected: Image.Image, atol: int = 12) -> bool:
    return picture.size == expected.size and np.allclose(np.asarray(picture), np.asarray(expected), atol=atol)


def block_centres(picture: Image.Image) -> list[tuple[int, ...]]:
    width, height = picture.size
    return [picture.getpixel((x, y)) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_is_applied_exactly_once(tmp_path, orientation, suffix):
    upright = corners()
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = undo
    carrier = corners()
    carrier.info["exif"] = tag.tobytes()
    stored = ImageOps.exif_transpose(carrier)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"picture{suffix}"
    stored.save(path, exif=exif, quality=95)

    picture = read_picture(path)

    assert picture.size == upright.size
    assert np.allclose(block_centres(picture), block_centres(upright), atol=20)
    assert close(as_picture(picture), picture, atol=0)  # the tag is gone


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "LA", "RGBA", "I", "I;16", "F"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / "picture.tif"
    Image.new(mode, (6, 4)).save(path)
    picture = read_picture(path)
    assert (picture.mode, picture.size, type(picture)) == ("RGB", (6, 4), Image.Image)


def test_colours_survive_cmyk_jpeg(tmp_path):
    corners().convert("CMYK").save(tmp_path / "picture.jpg", quality=98)
    assert np.allclose(block_centres(read_picture(tmp_path / "picture.jpg")), block_centres(corners()), atol=20)


def test_one_bit_pictures_are_black_and_white(tmp_path):
    picture = Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "picture.png")
    assert np.asarray(read_picture(tmp_path / "picture.png")).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparency_is_laid_on_white(tmp_path, suffix):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (255, 0, 0, 255))
    picture.save(tmp_path / f"picture{suffix}", lossless=True)
    assert np.asarray(read_picture(tmp_path / f"picture{suffix}")).tolist() == [[[255, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_transparency_is_laid_on_white_without_a_warning(tmp_path, transparency):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "picture.png", transparency=transparency)
    assert np.asarray(read_picture(tmp_path / "picture.png")).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_colour_is_laid_on_white(tmp_path, mode, colour):
    Image.new(mode, (1, 1), colour).save(tmp_path / "picture.png", transparency=colour)
    assert read_picture(tmp_path / "picture.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"picture{suffix}")
    assert np.asarray(read_picture(tmp_path / f"picture{suffix}"))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], dtype=np.int32), [0, 255]),
        (np.array([[-1000, 1000, 3000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[70000, 70000]], dtype=np.int32), [0, 0]),
        (np.array([[0.0, 0.2, 1.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0.0, 40.0, 200.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[np.nan, 1.0, -np.inf]], dtype=np.float32), [0, 255, 0]),
    ],
)
def test_32_bit_greys_are_scaled_by_their_range(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "picture.tif")
    assert np.asarray(read_picture(tmp_path / "picture.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"picture{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(tmp_path / f"picture{suffix}").getpixel((0, 0)) == (255, 0, 0)


def test_damaged_exif_costs_neither_the_picture_nor_a_warning(tmp_path):
    picture = corners()
    picture.save(
        tmp_path / "picture.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12\xff\xff", quality=95
    )
    assert np.allclose(block_centres(read_picture(tmp_path / "picture.jpg")), block_centres(picture), atol=20)


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.jpg"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("<html>not found</html>")
        case "truncated":
            corners(64).save(path)
            path.write_bytes(path.read_bytes()[:-80])
        case "truncated_png":
            corners(64).save(path, format="PNG")
            path.write_bytes(path.read_bytes()[:120])
        case "folder":
            path.mkdir()
        case "postscript":
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return path


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("empty", "the file is empty"),
        ("text", "its content is no picture Pillow can decode"),
        ("truncated", "truncated"),
        ("truncated_png", ""),
        ("missing", "there is no such file"),
        ("folder", "it is a folder"),
        ("postscript", "its content is no picture Pillow can decode"),
    ],
)
def test_an_unreadable_file_is_named_with_its_cause(tmp_path, kind, cause):
    path = broken(tmp_path, kind)
    with pytest.raises(PictureError, match=f"cannot read picture .*{kind}.jpg: .*{cause}.*; replace or remove it"):
        read_picture(path)


def test_an_absurdly_large_picture_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    corners(64).save(tmp_path / "bomb.png")
    with pytest.raises(PictureError, match=r"bomb\.png: it has more than 200 pixels"):
        read_picture(tmp_path / "bomb.png")


@given(
    content=st.binary(max_size=200),
    header=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM"]),
)
def test_whatever_a_file_holds_it_is_a_picture_or_a_picture_error(tmp_path_factory, content, header):
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    path.write_bytes(header + content)
    try:
        assert read_picture(path).mode == "RGB"
    except PictureError as error:
        assert "any.jpg" in str(error)  # noqa: PT017


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")  # noqa: PTH112
def test_the_file_is_closed_again(tmp_path):
    corners().save(tmp_path / "picture.gif")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    pictures = [read_picture(tmp_path / "picture.gif") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert len(pickle.loads(pickle.dumps(pictures))) == 5


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((1600, 1200), None, (1600, 1200)),
        ((1600, 1200), 600, (800, 600)),
        ((1600, 1200), 601, (1600, 1200)),
        ((1600, 1201), 300, (400, 301)),
        ((1200, 1600), 100, (150, 200)),
        ((40, 30), 100, (40, 30)),
    ],
)
def test_a_large_jpeg_is_decoded_smaller_where_that_is_enough(tmp_path, size, at_least, expected):
    corners().resize(size).save(tmp_path / "picture.jpg", quality=95)
    picture = read_picture(tmp_path / "picture.jpg", at_least=at_least)
    assert picture.size == expected
    assert np.allclose(block_centres(picture), block_centres(corners()), atol=20)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_jpeg_decoded_smaller_has_the_same_colours(tmp_path, mode, channels):
    corners(64).convert(mode).save(tmp_path / "picture.jpg", quality=98)
    small, full = (read_picture(tmp_path / "picture.jpg", channels=channels, at_least=each) for each in (16, None))
    assert (small.mode, small.width * 4) == (full.mode, full.width)
    assert np.allclose(block_centres(small), block_centres(full), atol=8)


def test_a_jpeg_decoded_smaller_is_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    corners(64).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "picture.jpg", exif=exif, quality=95)
    picture = read_picture(tmp_path / "picture.jpg", at_least=32)
    assert picture.size == tuple(side // 2 for side in corners(64).size)
    assert np.allclose(block_centres(picture), block_centres(corners(64)), atol=20)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".webp", ".bmp"])
def test_other_formats_are_decoded_whole(tmp_path, suffix):
    corners(64).save(tmp_path / f"picture{suffix}")
    assert read_picture(tmp_path / f"picture{suffix}", at_least=8).size == corners(64).size


def test_a_rotated_picture_in_memory_is_turned_and_left_untouched():
    picture = corners()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.info["exif"] = exif.tobytes()
    before = picture.copy()
    turned = as_picture(picture)
    assert turned.size == picture.size[::-1]
    assert close(picture, before, atol=0)
    assert picture.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("mode", ["PA", "RGBa", "RGBX", "HSV"])
def test_modes_without_a_common_file_format_become_rgb(mode):
    assert as_picture(Image.new(mode, (6, 4))).mode == "RGB"


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_arrays_become_rgb_pictures(shape):
    picture = as_picture(np.full(shape, 255, dtype=np.uint8))
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (6, 4), (255, 255, 255))


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (3, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_tensors_become_three_channel_tensors_of_their_dtype(shape, dtype):
    picture = as_picture(tv_tensors.Image(torch.ones(shape, dtype=dtype)))
    assert (type(picture), picture.shape, picture.dtype) == (torch.Tensor, (3, 4, 6), dtype)


def test_the_overshoot_of_a_bicubic_resize_is_clamped():
    assert as_picture(torch.tensor([[-0.1, 0.5, 1.1]]))[0, 0].tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 2, 2), -1.0), "already normalised; remove Normalize .* leave normalisation to transferkit"),
        (torch.full((3, 2, 2), 255.0), r"values up to 255; scale it to \[0, 1\]"),
        (torch.full((3, 2, 2), float("nan")), "values up to nan"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "dtype torch.int64; it needs uint8 or a float"),
        (torch.zeros(2, 2, 3), r"shape \(2, 2, 3\); it needs \(H, W\)"),
        (torch.zeros(3, 0, 2), r"shape \(3, 0, 2\)"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"shape \(3, 4, 5\) and dtype uint8; it needs"),
        (np.zeros((4, 4)), "dtype float64; it needs uint8"),
        ("cat.jpg", "a picture is a str"),
    ],
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(DataError, match=message):
        as_picture(image)


# Channels


def half_clear() -> Image.Image:
    """Green where it is clear, red where it is half transparent, blue where it is opaque."""
    picture = Image.new("RGBA", (3, 1), (0, 255, 0, 0))
    picture.putpixel((1, 0), (255, 0, 0, 128))
    picture.putpixel((2, 0), (0, 0, 255, 255))
    return picture


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_four_channels_keep_transparency_and_three_lay_it_on_white(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    half_clear().save(path, lossless=True, exact=True)
    four, three, one = (read_picture(path, channels=channels) for channels in (4, 3, 1))
    assert (four.mode, three.mode, one.mode) == ("RGBA", "RGB", "RGB")
    assert np.array_equal(np.asarray(four), np.asarray(half_clear()))
    assert np.asarray(three).tolist() == [[[255, 255, 255], [255, 127, 127], [0, 0, 255]]]
    assert close(three, read_picture(path), atol=0)
    assert close(one, three, atol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_a_picture_without_transparency_is_opaque_in_four_channels(mode):
    picture = as_picture(Image.new(mode, (6, 4)), channels=4)
    assert (picture.mode, picture.getpixel((0, 0))[3]) == ("RGBA", 255)
    assert close(picture.convert("RGB"), as_picture(Image.new(mode, (6, 4))), atol=0)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa"])
def test_every_kind_of_transparency_is_kept_in_four_channels(mode):
    assert as_picture(Image.new(mode, (6, 4)), channels=4).getpixel((0, 0))[3] == 0


def test_a_transparent_palette_colour_is_clear_in_four_channels(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "picture.png", transparency=0)
    four = read_picture(tmp_path / "picture.png", channels=4)
    assert np.asarray(four).tolist() == [[[10, 20, 30, 0], [40, 50, 60, 255]]]


def test_a_rotated_picture_with_transparency_is_turned():
    picture = half_clear()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.info["exif"] = exif.tobytes()
    turned = np.asarray(as_picture(picture, channels=4))
    assert np.array_equal(turned, np.asarray(half_clear()).transpose(1, 0, 2))


@pytest.mark.parametrize("channels", [-1, 0, 2, 5, 13])
def test_files_and_pil_images_are_refused_for_channels_they_cannot_have(tmp_path, channels):
    corners().save(tmp_path / "picture.png")
    message = rf"1, 3 or 4 channels and the network takes {channels}; hand .* tensors \({channels}, H, W\)"
    with pytest.raises(DataError, match=message) as caught:
        read_picture(tmp_path / "picture.png", channels=channels)
    assert not isinstance(caught.value, PictureError)
    with pytest.raises(DataError, match=message):
        as_picture(corners(), channels=channels)


@given(channels=st.integers(1, 14), dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]))
def test_tensors_of_exactly_the_channels_stay_as_they_are(channels, dtype):
    image = torch.rand(channels, 3, 2, generator=torch.Generator().manual_seed(0))
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    picture = as_picture(tv_tensors.Image(image), channels=channels)
    assert (type(picture), picture.dtype) == (torch.Tensor, dtype)
    assert torch.equal(picture, image)


@given(channels=st.integers(2, 14).filter(lambda channels: channels != 3))
def test_arrays_of_exactly_the_channels_become_tensors(channels):
    array = np.random.default_rng(0).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    array.flags.writeable = False
    for each in (array, array[::-1]):
        picture = as_picture(each, channels=channels)
        assert np.array_equal(picture.numpy(), each.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_arrays_without_a_fourth_channel_are_opaque(shape):
    picture = as_picture(np.full(shape, 9, dtype=np.uint8), channels=4)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGBA", (6, 4), (9, 9, 9, 255))


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6)])
def test_one_channel_of_a_tensor_stays_one_where_the_network_takes_one(shape):
    assert as_picture(torch.ones(shape), channels=1).shape == (1, 4, 6)
    assert as_picture(torch.ones(3, 4, 6), channels=1).shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (torch.zeros(3, 4, 6), 4, r"shape \(3, 4, 6\); it needs \(4, H, W\)"),
        (torch.zeros(4, 6), 5, r"shape \(4, 6\); it needs \(5, H, W\)"),
        (torch.zeros(5, 0, 6), 5, r"shape \(5, 0, 6\)"),
        (torch.zeros(4, 4, 6), 1, r"it needs \(H, W\), \(1, H, W\) or \(3, H, W\)"),
        (torch.full((5, 2, 2), -1.0), 5, "already normalised"),
        (np.zeros((4, 6, 3), dtype=np.uint8), 5, r"shape \(4, 6, 3\) .* needs uint8 \(H, W, 5\)"),
        (np.zeros((4, 6, 5)), 5, "dtype float64; it needs uint8"),
    ],
)
def test_pictures_of_other_channels_than_the_network_takes_are_refused(image, channels, message):
    with pytest.raises(DataError, match=message):
        as_picture(image, channels=channels)


def test_extensions_are_those_of_raster_formats():
    extensions = picture_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".jp2"} <= extensions
    assert not extensions & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt"}


def test_a_folder_gives_its_pictures_sorted_and_a_file_itself(tmp_path):
    for name in ("b.JPG", "a.png", "deep/c.webp", ".hidden.jpg", ".git/d.jpg", "notes.txt", "odd.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / name) for name in ("a.png", "b.JPG", "deep/c.webp")]
    assert list_pictures(tmp_path) == expected
    assert list_pictures([str(tmp_path / "odd.bin"), tmp_path]) == [str(tmp_path / "odd.bin"), *expected]


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    assert list_pictures(tmp_path / "root") == [str(tmp_path / "root" / "linked" / "a.png")]


def test_missing_paths_and_folders_without_pictures_are_named(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no pictures in .*photos or below, only 1 other file\(s\)"):
        list_pictures(tmp_path / "photos")
    with pytest.raises(DataError, match=r"no file or folder .*photo; check the path — did you mean 'photos'"):
        list_pictures(tmp_path / "photo")
    with pytest.raises(DataError, match=r"no file or folder .*x/y\.jpg; check the path$"):
        list_pictures(tmp_path / "x" / "y.jpg")


def test_reading_leaves_the_warning_filters_as_they_were(tmp_path):
    corners().save(tmp_path / "picture.png")
    before = list(warnings.filters)
    read_picture(tmp_path / "picture.png")
    assert warnings.filters == before
