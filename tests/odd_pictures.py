"""Picture files of every odd kind, made with Pillow and by surgery on their bytes: good ones, and broken ones."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

SIZE = (48, 36)


class Odd(NamedTuple):
    """One file: its name, what it should look like, and how far it may be from that on average."""

    name: str
    expected: Image.Image
    tolerance: float


def base() -> Image.Image:
    """A picture whose corners differ, so that every turn and mirroring shows."""
    width, height = SIZE
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    values = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], axis=2)
    return Image.fromarray((values + 0.5).astype(np.uint8))


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _faded() -> Image.Image:
    picture = base().convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1))))
    return picture


def _turned(orientation: int) -> Image.Image:
    """The base as a camera stores it that notes such an orientation."""
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = undo
    carrier = base()
    carrier.info["exif"] = tag.tobytes()
    return ImageOps.exif_transpose(carrier)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", head), *more, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _png_16_bit() -> bytes:
    values = np.asarray(base()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return _png(*SIZE, 16, 2, rows)


def good(folder: Path) -> Iterator[Odd]:
    """Write the good ones, and say what each should look like."""
    plain, grey, palette = base(), base().convert("L"), base().quantize(32)
    as_grey, one_bit = grey.convert("RGB"), base().convert("1")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [Image.new("RGB", SIZE)], "duration": 50}

    def odd(name: str, content: bytes, expected: Image.Image, tolerance: float = 0.0) -> Odd:
        (folder / name).write_bytes(content)
        return Odd(name, expected.convert("RGB"), tolerance)

    yield odd("rgb.png", _saved(plain, "PNG"), plain)
    yield odd("grey.png", _saved(grey, "PNG"), as_grey)
    yield odd("one-bit.png", _saved(one_bit, "PNG"), one_bit)
    yield odd("palette.png", _saved(palette, "PNG"), palette)
    yield odd("palette-transparent-entry.png", _saved(palette, "PNG", transparency=3), _entry_on_white(palette, [3]))
    alphas = bytes([0, 255, 0] + [255] * 29)
    yield odd("palette-alphas.png", _saved(palette, "PNG", transparency=alphas), _entry_on_white(palette, [0, 2]))
    yield odd("alpha.png", _saved(_faded(), "PNG"), _on_white(_faded()), 1.0)
    yield odd("opaque-alpha.png", _saved(plain.convert("RGBA"), "PNG"), plain)
    grey_alpha = grey.convert("LA")
    yield odd("grey-alpha.png", _saved(grey_alpha, "PNG"), as_grey)
    yield odd("grey-16-bit.png", _saved(deep, "PNG"), as_grey)
    yield odd("rgb-16-bit.png", _png_16_bit(), plain)
    yield odd("animated.png", _saved(plain, "PNG", **frames), plain)
    yield odd("extra-chunk.png", _png(1, 1, 8, 0, b"\0\x80", _chunk(b"tEXt", b"a\0b")), Image.new("L", (1, 1), 128))
    yield odd("resolution.png", _saved(plain, "PNG", dpi=(1, 1000)), plain)
    yield odd("turned.png", _saved(_turned(6), "PNG", exif=_exif(6)), plain)
    yield odd("a-png.jpg", _saved(plain, "PNG"), plain)

    jpeg = _saved(plain, "JPEG", quality=95, subsampling=0)
    yield odd("plain.jpg", jpeg, plain, 2.0)
    yield odd("UPPER.JPG", jpeg, plain, 2.0)
    yield odd("a-jpeg.png", jpeg, plain, 2.0)
    yield odd("low-quality.jpeg", _saved(plain, "JPEG", quality=20), plain, 12.0)
    yield odd("grey.jpg", _saved(grey, "JPEG", quality=95), as_grey, 2.0)
    yield odd("progressive.jpg", _saved(plain, "JPEG", quality=95, progressive=True), plain, 4.0)
    cmyk = plain.convert("CMYK")
    yield odd("cmyk.jpg", _saved(cmyk, "JPEG", quality=95), cmyk, 4.0)
    yield odd("bytes-behind.jpg", jpeg + b"more than a picture" * 50, plain, 2.0)
    yield odd("comment.jpg", _saved(plain, "JPEG", quality=95, comment=b"\xff\xfe\0" * 20), plain, 4.0)
    yield odd("profile.jpg", _saved(plain, "JPEG", quality=95, icc_profile=b"no profile at all"), plain, 4.0)
    yield odd("damaged-exif.jpg", _saved(plain, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), plain, 4.0)
    for orientation in range(1, 9):
        content = _saved(_turned(orientation), "JPEG", quality=95, subsampling=0, exif=_exif(orientation))
        yield odd(f"orientation-{orientation}.jpg", content, plain, 2.0)
    yield odd("two-lenses.mpo", _saved(plain, "MPO", save_all=True, append_images=[plain], quality=95), plain, 4.0)

    yield odd("plain.gif", _saved(palette, "GIF"), palette)
    yield odd("animated.gif", _saved(palette, "GIF", save_all=True, append_images=[Image.new("P", SIZE)]), palette)
    yield odd("transparent.gif", _saved(palette, "GIF", transparency=3), _entry_on_white(palette, [3]))
    yield odd("plain.bmp", _saved(plain, "BMP"), plain)
    yield odd("palette.bmp", _saved(palette, "BMP"), palette)
    yield odd("one-bit.bmp", _saved(one_bit, "BMP"), one_bit)
    yield odd("plain.dib", _saved(plain, "DIB"), plain)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield odd(f"{compression}.tif", _saved(plain, "TIFF", compression=compression), plain)
    yield odd("fax.tif", _saved(one_bit, "TIFF", compression="group4"), one_bit)
    yield odd("grey-16-bit.tif", _saved(deep, "TIFF"), as_grey)
    share = Image.fromarray(np.asarray(grey, dtype=np.float32) / 255)
    yield odd("float.tif", _saved(share, "TIFF"), as_grey)
    whole = Image.fromarray(np.asarray(grey, dtype=np.int32) * 257)
    yield odd("grey-32-bit.tif", _saved(whole, "TIFF"), as_grey)
    yield odd("cmyk.tif", _saved(cmyk, "TIFF"), cmyk)
    yield odd("ycbcr.tif", _saved(plain.convert("YCbCr"), "TIFF"), plain.convert("YCbCr"), 1.0)
    yield odd("alpha.tif", _saved(_faded(), "TIFF"), _on_white(_faded()), 1.0)
    yield odd("pages.tif", _saved(plain, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]), plain)
    yield odd("turned.tif", _saved(_turned(8), "TIFF", exif=_exif(8)), plain)
    yield odd("plain.ppm", _saved(plain, "PPM"), plain)
    yield odd("grey.pgm", _saved(grey, "PPM"), as_grey)
    yield odd("one-bit.pbm", _saved(one_bit, "PPM"), one_bit)
    two = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    yield odd("text.ppm", b"P3\n2 1 255\n1 2 3 4 5 6\n", two)
    yield odd("plain.pcx", _saved(plain, "PCX"), plain)
    yield odd("plain.sgi", _saved(plain, "SGI"), plain)
    yield odd("plain.tga", _saved(plain, "TGA"), plain)
    yield odd("packed.tga", _saved(plain, "TGA", compression="tga_rle"), plain)
    yield odd("plain.dds", _saved(plain, "DDS"), plain)
    yield odd("one-bit.xbm", _saved(one_bit, "XBM"), one_bit)
    yield odd("plain.ico", _saved(plain.resize((32, 32)), "ICO", sizes=[(32, 32)]), plain.resize((32, 32)))
    if features.check("webp"):
        yield odd("lossless.webp", _saved(plain, "WEBP", lossless=True), plain)
        yield odd("lossy.webp", _saved(plain, "WEBP", quality=95), plain, 6.0)
        yield odd("alpha.webp", _saved(_faded(), "WEBP", lossless=True, exact=True), _on_white(_faded()), 1.0)
        yield odd("animated.webp", _saved(plain, "WEBP", lossless=True, **frames), plain)
    if features.check("jpg_2000"):
        yield odd("plain.jp2", _saved(plain, "JPEG2000"), plain, 1.0)
    if features.check("avif"):
        yield odd("plain.avif", _saved(plain, "AVIF", quality=95), plain, 6.0)

    (folder / "linked.jpg").symlink_to(folder / "plain.jpg")
    yield Odd("linked.jpg", plain, 2.0)
    yield odd("a name with spaces, ünïcode 图片.jpg", jpeg, plain, 2.0)
    yield odd("n" * 200 + ".jpg", jpeg, plain, 2.0)
    yield odd("one-pixel.png", _saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), Image.new("RGB", (1, 1), (1, 2, 3)))
    yield odd("very-long.png", _saved(plain.resize((900, 3)), "PNG"), plain.resize((900, 3)))


def _entry_on_white(palette: Image.Image, entries: list[int]) -> Image.Image:
    values = np.asarray(palette.convert("RGB")).copy()
    values[np.isin(np.asarray(palette), entries)] = 255
    return Image.fromarray(values)


def bad(folder: Path) -> Iterator[str]:
    """Write the broken ones, and name each."""
    jpeg, png = _saved(base(), "JPEG", quality=95), _saved(base(), "PNG")
    gif, tiff = _saved(base().quantize(32), "GIF"), _saved(base(), "TIFF", compression="tiff_lzw")
    data = png.index(b"IDAT") + 4
    broken: dict[str, bytes] = {
        "empty.jpg": b"",
        "one-byte.png": b"\x89",
        "text.jpg": b"This is a text, and no picture at all.\n",
        "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "document.jpg": b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\n",
        "archive.png": b"PK\x03\x04" + b"\0" * 60,
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "noise.png": np.random.default_rng(0).bytes(4000),
        "zeros.jpg": b"\0" * 4000,
        "half.jpg": jpeg[: len(jpeg) // 2],
        "head-alone.jpg": jpeg[:20],
        "half.png": png[: len(png) // 2],
        "head-alone.png": png[:33],
        "bad-sum.png": png[: data + 5] + bytes([png[data + 5] ^ 0xFF]) + png[data + 6 :],
        "bad-stream.png": _png(40, 40, 8, 2, b"far too few rows"),
        "no-size.png": _png(0, 0, 8, 2, b""),
        "bomb.png": _png(60_000, 60_000, 8, 0, b"\0"),
        "half.gif": gif[:12],
        "half.tif": tiff[: len(tiff) // 3],
        "endless.tif": tiff[:4] + struct.pack("<I", 2**31) + tiff[8:],
        "half.bmp": _saved(base(), "BMP")[:200],
        "absurd.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "half.ppm": _saved(base(), "PPM")[:100],
        "huge.ppm": b"P6\n99999999 99999999\n255\n",
        "half.tga": _saved(base(), "TGA", compression="tga_rle")[:60],
        "half.ico": _saved(base().resize((32, 32)), "ICO", sizes=[(32, 32)])[:40],
    }
    if features.check("webp"):
        broken["half.webp"] = _saved(base(), "WEBP", quality=95)[:60]
    if features.check("jpg_2000"):
        broken["half.jp2"] = _saved(base(), "JPEG2000")[:120]
    for name, content in broken.items():
        (folder / name).write_bytes(content)
        yield name
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    yield "dangling.jpg"
    (folder / "circle.png").symlink_to(folder / "circle.png")
    yield "circle.png"
    yield from _no_files(folder)


def _no_files(folder: Path) -> Iterator[str]:
    """What waits for ever when it is opened, or never ends."""
    os.mkfifo(folder / "pipe.jpg")
    yield "pipe.jpg"
    (folder / "device.png").symlink_to("/dev/zero")
    yield "device.png"
    place = Path.cwd()
    os.chdir(folder)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.png")
    finally:
        os.chdir(place)
    yield "socket.png"
    if os.geteuid() != 0:
        (folder / "secret.jpg").write_bytes(_saved(base(), "JPEG"))
        (folder / "secret.jpg").chmod(0)
        yield "secret.jpg"
