"""What the examples share: their command line, and made pictures for ``--smoke``. The work is in each file itself."""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from transferkit.folders import list_parts

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def command_line(
    doc: str | None, *, model: str | None = None, epochs: int | None = None, image_size: int | None = None
) -> argparse.ArgumentParser:
    """Return the options of every example; ``parse`` reads them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/ or test/, or with one folder per class")
    if model is not None:
        parser.add_argument("--model", default=model, help=f"torchvision/NAME or timm/NAME; {model} by default")
        parser.add_argument("--weights", default="default", help="default, a tag, a path, bundled, or none")
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the training pictures; {epochs}")
    parser.add_argument("--image-size", type=int, default=image_size, help="input side in pixels")
    parser.add_argument("--per-class", type=int, help="use only the first so many pictures of each class and part")
    parser.add_argument(
        "--output", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="folder to write into"
    )
    parser.add_argument("--smoke", action="store_true", help="try it: made pictures, a tiny network, no network access")
    return parser


def parse(
    parser: argparse.ArgumentParser,
    *,
    smoke_model: str = "timm/test_efficientnet",
    smoke_epochs: int = 1,
    smoke_parts: Sequence[str] = ("train", "val"),
) -> argparse.Namespace:
    """Read the options. ``options.settings`` is what a ``Finetuner`` takes of them beside the model."""
    options = parser.parse_args()
    if options.smoke:
        options.data = made_pictures(smoke_parts)
        options.model, options.weights, options.epochs, options.image_size = smoke_model, "none", smoke_epochs, 32
    elif options.data is None:
        parser.error("say where the pictures are with --data FOLDER, or try --smoke")
    elif options.per_class is not None:
        options.data = first_of_each_class(options.data, options.per_class)
    weights = getattr(options, "weights", None)
    options.weights = None if weights == "none" else weights
    options.settings = {
        "weights": options.weights,
        "epochs": getattr(options, "epochs", None),
        "image_size": options.image_size,
        "output_dir": options.output,
        "overwrite": True,
    }
    return options


def made_pictures(parts: Sequence[str]) -> Path:
    """Write noise of three colours, a class each; ``parts=("",)`` puts the classes into the folder itself."""
    root = _temporary_folder()
    rng = np.random.default_rng(0)
    for part in parts:
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(5):
                pixels = np.array(colour) + rng.normal(0, 60, (40, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg")
    return root


def first_of_each_class(data: Path, count: int) -> Path:
    """Link the first pictures of each class of each part into a folder of their own."""
    root = _temporary_folder()
    for part, listed in list_parts(data).items():
        for name, pictures in listed.pictures.items():
            folder = root / ("" if part == "all" else part) / name
            folder.mkdir(parents=True)
            for number, picture in enumerate(pictures[:count]):
                (folder / f"{number:05d}-{Path(picture).name}").symlink_to(Path(picture).resolve())
    return root


def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="transferkit-example-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
