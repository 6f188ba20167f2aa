"""One picture: from a file or from memory to upright 8-bit RGB or more channels, and where picture files are."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from transferkit.exceptions import DataError, PictureError, closest

__all__ = [
    "FoundFiles",
    "as_picture",
    "check_file_channels",
    "decode_picture",
    "existing",
    "find_pictures",
    "list_pictures",
    "opened_picture",
    "picture_extensions",
    "read_picture",
    "upright",
]

# Pillow lists these, but they are pages, films or containers: it needs Ghostscript or a handler it does not bring.
_NOT_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})

# A float picture that was resized bicubically overshoots [0, 1] a little; a normalised one leaves it clearly.
_OVERSHOOT = 0.25

_FILE_CHANNELS = (1, 3, 4)


def read_picture(path: str | os.PathLike[str], *, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """Read one picture file as upright RGB, or with its transparency as RGBA, whatever its mode.

    EXIF orientation is applied, 16-bit and float greys are scaled to 8 bits, and of an animation the first frame is
    taken. The file is closed again, and Pillow's warnings stay silent. Only a regular file is opened, and none is
    decoded that has more than 178,956,970 pixels (Pillow's limit, which guards against files that unpack to fill the
    memory).

    Args:
        path: Any raster file Pillow decodes; the content decides, not the extension.
        channels: What the network takes. 3 gives RGB, transparency laid on white, and so does 1, which the network's
            transform turns grey. 4 gives RGBA: transparency is kept, and a picture without is opaque. Pillow drops a
            fourth band of another meaning, as in TIFF files from satellites; hand those over as tensors.
        at_least: Pixels that the shorter side must keep. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size where
            that is enough, which is faster; other formats keep their size. ``None`` decodes all pixels.

    Returns:
        A PIL image of mode ``RGB`` or ``RGBA``.

    Raises:
        PictureError: The file cannot be read; the message names it and the cause.
        DataError: Files do not have so many channels.

    Source: Pillow.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("LA", (4, 2)).save(file.name)
        ...     picture = read_picture(file.name)
        >>> picture.mode, picture.size, picture.getpixel((0, 0))
        ('RGB', (4, 2), (255, 255, 255))
    """
    with warnings.catch_warnings(action="ignore"):
        return decode_picture(path, channels=channels, at_least=at_least)


def decode_picture(path: str | os.PathLike[str], *, channels: int = 3, at_least: int | None = None) -> Image.Image:
    """Do what :func:`read_picture` does, but for Pillow's warnings, for threads, which must not silence them each.

    Args:
        path: As for :func:`read_picture`, and so are all others.
        channels: What the network takes.
        at_least: Pixels that the shorter side must keep.

    Raises:
        PictureError: The file cannot be read.
        DataError: Files do not have so many channels.
    """
    check_file_channels(channels)
    with opened_picture(path) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        return upright(image, channels)


@contextmanager
def opened_picture(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a picture file, so far undecoded; whatever goes wrong with it, here or inside the ``with``, is told alike.

    Pillow warns of much that is harmless; :func:`read_picture` silences it.

    Args:
        path: As for :func:`read_picture`.

    Yields:
        Pillow's image, closed afterwards.

    Raises:
        PictureError: The file cannot be read; ``path`` and ``cause`` say which and why.

    Example:
        >>> with opened_picture("/no/such/file.jpg") as image:
        ...     image.load()
        Traceback (most recent call last):
        transferkit.exceptions.PictureError: cannot read picture /no/such/file.jpg: there is no such file; ...
    """
    try:
        # Opening a named pipe waits for somebody to write into it.
        if not stat.S_ISREG(mode := Path(path).stat().st_mode):
            raise IsADirectoryError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe, a device or a socket")
        with Image.open(path, formats=_formats()) as image:
            yield image
    # Pillow's decoders let struct.error, zlib.error, SyntaxError and more escape from damaged files.
    except Exception as error:
        cause = _cause(Path(path), error)
        refusal = PictureError(f"cannot read picture {os.fspath(path)}: {cause}; replace or remove it")
        refusal.path, refusal.cause = os.fspath(path), cause
        raise refusal from error


def as_picture(image: Any, *, channels: int = 3) -> Image.Image | Tensor:
    """Bring a picture that is already in memory to what the transforms take.

    Args:
        image: A PIL image of any mode; a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a uint8 or float
            tensor (H, W), (1, H, W) or (3, H, W), floats in [0, 1]. For another number of channels than 1 and 3 a
            tensor has exactly these, (channels, H, W), and an array may have them, (H, W, channels).
        channels: What the network takes; 1, 3 and 4 mean for a PIL image what they mean for :func:`read_picture`.

    Returns:
        An upright PIL image of mode ``RGB``, or ``RGBA`` for 4 channels. From tensors, and from arrays that have
        exactly the channels where these are not 1 or 3, a plain tensor (channels, H, W) of the given dtype, floats
        clamped to [0, 1]; for 1 channel a tensor (3, H, W) stays as it is, and the network's transform turns it grey.

    Raises:
        DataError: The picture has another type, dtype, shape or range, or is already normalised.

    Source: the conventions of Pillow, torchvision and numpy.

    Example:
        >>> as_picture(np.zeros((2, 4), dtype=np.uint8)).size
        (4, 2)
        >>> as_picture(torch.zeros(1, 2, 4)).shape, as_picture(torch.zeros(8, 2, 4), channels=8).shape
        (torch.Size([3, 2, 4]), torch.Size([8, 2, 4]))
    """
    if isinstance(image, Image.Image):
        check_file_channels(channels)
        with warnings.catch_warnings(action="ignore"):
            return upright(image, channels)
    if isinstance(image, Tensor):
        return _checked_tensor(image, channels)
    if isinstance(image, np.ndarray):
        return _from_array(image, channels)
    raise DataError(
        f"a picture is a {type(image).__name__}; it needs to be a PIL image, a uint8 array or a uint8 or float tensor"
    )


def check_file_channels(channels: int) -> None:
    """Check that picture files, and PIL images, can be read with so many channels.

    Args:
        channels: What the network takes.

    Raises:
        DataError: It is not 1, 3 or 4.

    Source: :func:`read_picture` says what the channels of a file are.

    Example:
        >>> check_file_channels(4)
    """
    if channels not in _FILE_CHANNELS:
        raise DataError(
            f"picture files and PIL images have 1, 3 or 4 channels and the network takes {channels}; "
            f"hand its pictures over as tensors ({channels}, H, W), to train on as a data set of (tensor, label) pairs"
        )


@lru_cache(maxsize=1)
def picture_extensions() -> frozenset[str]:
    """Name the file extensions that count as pictures: those of the raster formats Pillow can decode.

    Returns:
        Lower-case extensions with their dot. Found at the first call, since Pillow then loads its plugins.

    Source: ``PIL.Image.registered_extensions``.

    Example:
        >>> ".jpg" in picture_extensions(), ".pdf" in picture_extensions()
        (True, False)
    """
    # Pillow reads MPO, the two-lens JPEG of some phones, through its JPEG plugin.
    formats = {*_formats(), "MPO"}
    return frozenset(suffix.lower() for suffix, kind in Image.registered_extensions().items() if kind in formats)


def list_pictures(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Name the picture files meant by files and folders, for prediction.

    Args:
        paths: One path or several. A file is taken as it is, whatever its extension; a folder gives the pictures in it
            and below, sorted, hidden ones left out.

    Returns:
        Paths of files, in the order given.

    Raises:
        DataError: A path does not exist, or a folder holds no pictures.

    Source: :func:`picture_extensions` says what a picture is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.jpg", "a.png", "notes.txt"):
        ...         (Path(folder) / name).touch()
        ...     [Path(path).name for path in list_pictures(folder)]
        ['a.png', 'b.jpg']
    """
    found: list[str] = []
    for path in map(existing, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if path.is_dir():
            pictures, others, _ = find_pictures(path)
            if not pictures:
                raise DataError(
                    f"no pictures in {path} or below, only {len(others)} other file(s); give another folder"
                )
            found.extend(pictures)
        else:
            found.append(str(path))
    return found


def existing(path: str | os.PathLike[str]) -> Path:
    """Check that a path exists, and offer its nearest sibling when it does not.

    Args:
        path: A file or a folder.

    Returns:
        The path, unchanged.

    Raises:
        DataError: There is no such file or folder.

    Source: :func:`transferkit.exceptions.closest`.

    Example:
        >>> existing("/no/such/folder")
        Traceback (most recent call last):
        transferkit.exceptions.DataError: no file or folder /no/such/folder; check the path
    """
    path = Path(path)
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = closest(path.name, [sibling.name for sibling in siblings])
        raise DataError(f"no file or folder {path}; check the path{near}")
    return path


class FoundFiles(NamedTuple):
    """Paths of the files below a folder, sorted: pictures, other files, and hidden ones, which are passed over."""

    pictures: list[str]
    others: list[str]
    hidden: list[str]


def find_pictures(folder: str | os.PathLike[str]) -> FoundFiles:
    """Walk a folder, symbolic links included, and tell pictures from other files.

    Args:
        folder: An existing folder. A hidden folder in it is passed over as a whole.

    Returns:
        What lies there, by the extensions of its names; no file is opened.

    Source: ``os.walk``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     find_pictures(folder)
        FoundFiles(pictures=[], others=[], hidden=[])
    """
    found = FoundFiles([], [], [])
    known = picture_extensions()
    visited: set[str] = set()
    for walked, folders, files in os.walk(folder, followlinks=True):
        place = Path(walked)
        # A link to a folder above would be walked for ever.
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        found.hidden.extend(str(place / name) for name in (*folders, *files) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                file = place / name
                (found.pictures if file.suffix.lower() in known else found.others).append(str(file))
    for each in found:
        each.sort()
    return found


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_PICTURES)


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which may be meant to fill the memory"
    if isinstance(error, UnidentifiedImageError):
        return "its content is no picture Pillow can decode"
    return str(error) or type(error).__name__


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Decode a picture, turn it as its EXIF block says, and give it the mode that :func:`read_picture` promises.

    Args:
        image: Of any mode, decoded or not.
        channels: 1 or 3 for RGB, 4 for RGBA.

    Returns:
        A picture of mode ``RGB`` or ``RGBA``; Pillow's errors of a damaged file come through.

    Example:
        >>> upright(Image.new("1", (4, 2)), 3).mode
        'RGB'
    """
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels, and fails in as many ways as a file
        image = image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_to_8_bits(image)
    if channels == 4:
        return image.convert("RGBA") if image.has_transparency_data else image.convert("RGB").convert("RGBA")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 0..65535 (integers) or 0..1 (floats) onto 0..255; a picture outside that range, its own range."""
    values = np.asarray(image, dtype=np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = float(values.min()), float(values.max())
    scale = 255.0 / (high - low or 1.0)
    return Image.fromarray(((values - low) * scale + 0.5).astype(np.uint8))


def _from_array(image: np.ndarray[Any, np.dtype[Any]], channels: int) -> Image.Image | Tensor:
    if image.dtype == np.uint8:
        if channels not in (1, 3) and image.shape[2:] == (channels,):
            # Pillow would weight the colours by a fourth channel that need not be transparency.
            return torch.from_numpy(np.moveaxis(image, 2, 0).copy())
        if channels in _FILE_CHANNELS and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
            return upright(Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image), channels)
    raise DataError(
        f"a picture array has shape {image.shape} and dtype {image.dtype}; it needs uint8 "
        + ("(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)" if channels in _FILE_CHANNELS else f"(H, W, {channels})")
    )


def _checked_tensor(image: Tensor, channels: int) -> Tensor:
    image = image.as_subclass(Tensor)
    colours = channels in (1, 3)
    if image.ndim == 2 and colours:
        image = image.unsqueeze(0)
    if image.ndim != 3 or image.shape[0] not in ((1, 3) if colours else (channels,)) or 0 in image.shape:
        raise DataError(
            f"a picture tensor has shape {tuple(image.shape)}; it needs "
            f"{'(H, W), (1, H, W) or (3, H, W)' if colours else f'({channels}, H, W)'}"
        )
    # One channel stays one where the network takes one, since turning three equal ones grey loses a level of 256.
    shape = (max(channels, image.shape[0]), -1, -1)
    if image.dtype == torch.uint8:
        return image.expand(shape)
    if not image.is_floating_point():
        raise DataError(f"a picture tensor has dtype {image.dtype}; it needs uint8 or a float in [0, 1]")
    low, high = image.aminmax()
    if low < -_OVERSHOOT:
        raise DataError(
            f"a picture tensor has values down to {low:.3g}, so it is already normalised; remove Normalize from the "
            "data set's transform and leave normalisation to transferkit, which takes it from the weights"
        )
    if not high <= 1 + _OVERSHOOT:
        raise DataError(f"a float picture tensor has values up to {high:.3g}; scale it to [0, 1] or hand it as uint8")
    return image.clamp(0, 1).expand(shape)
