"""The whole job on pictures that need no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from transferkit.exceptions import OutputError
from transferkit.finetuner import Finetuner
from transferkit.history import History
from transferkit.prediction import Prediction

__all__ = ["BACKBONE", "DemoResult", "run_demo", "write_digits"]

BACKBONE = "timm/mobilenetv2_050"
EPOCHS = 4
TRAIN_PER_CLASS, VAL_PER_CLASS = 30, 20
_MARK = ".transferkit-demo"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        folder: Where everything was written.
        pretrained: History of the run from the bundled weights.
        random: History of the same run from random weights.
        prediction: What the saved model says of one validation picture.
    """

    folder: Path
    pretrained: History
    random: History
    prediction: Prediction

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "output": str(self.folder),
            "pretrained": self.pretrained.best().to_dict(),
            "random": self.random.best().to_dict(),
            "prediction": {
                "path": self.prediction.path,
                "label": self.prediction.label,
                "confidence": self.prediction.confidence,
            },
        }


def write_digits(folder: Path, *, train_per_class: int = TRAIN_PER_CLASS, val_per_class: int = VAL_PER_CLASS) -> Path:
    """Write handwritten digits as an ordinary picture folder: ``train/`` and ``val/``, one folder per class.

    Args:
        folder: Where to write; made if missing.
        train_per_class: Training pictures of each digit; with ``val_per_class`` at most 174.
        val_per_class: Validation pictures of each digit.

    Returns:
        The folder. The pictures are greyscale PNG files of 32 × 32 pixels.

    Source: the UCI "Optical Recognition of Handwritten Digits" test set, as scikit-learn ships it.
    """
    digits = load_digits()
    for digit in range(10):
        chosen = digits.images[digits.target == digit][: train_per_class + val_per_class]
        for index, pixels in enumerate(chosen):
            part = "train" if index < train_per_class else "val"
            target = folder / part / str(digit) / f"{index:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((255 - pixels * (255 / 16)).astype(np.uint8))
            picture.resize((32, 32), Image.Resampling.BICUBIC).save(target)
    return folder


def run_demo(folder: Path, *, progress: bool = True) -> DemoResult:
    """Fine-tune the bundled backbone on digits, and the same network from random weights with the same budget.

    Args:
        folder: Where to write pictures, runs and plots; an earlier demo there is replaced.
        progress: Whether plan and progress are shown on standard error.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (folder / _MARK).exists():
                raise OutputError(f"{folder} holds other files; choose another folder for the demo (--output)")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).touch()
        data = write_digits(folder / "digits")
    except OSError as error:
        raise OutputError(f"the demo cannot write to {folder}: {error}") from error

    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "image_size": 64,
        "train_preset": "none",  # a mirrored digit is another sign
        # Pen strokes are far from photos: the whole network learns at the head's rate, its batch norms included.
        "head_lr_multiplier": 1.0,
        "keep_statistics": False,
        "progress": progress,
    }
    tuner = Finetuner(BACKBONE, weights="bundled", output_dir=folder / "run", **settings)
    pretrained = tuner.fit(data)
    random = Finetuner(BACKBONE, weights=None, output_dir=folder / "random", **settings).fit(data)
    tuner.plot_history(folder / "curves.png", compare={"random weights": random.to_dicts()})
    tuner.plot_predictions(folder / "predictions.png")
    picture = sorted((data / "val" / "7").iterdir())[0]
    return DemoResult(folder, pretrained, random, Finetuner.load(folder / "run").predict(picture)[0])
