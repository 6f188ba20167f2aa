"""Classifying pictures that have no label: all at once, one after the other, or into a table."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from transferkit.bad_pictures import check_on_bad_image, unreadable
from transferkit.evaluation import logits_by_batch
from transferkit.exceptions import DataError, OutputError, PictureError
from transferkit.loading import loader
from transferkit.metrics import topk
from transferkit.model import TransferModel
from transferkit.pictures import as_picture, decode_picture, list_pictures, read_picture
from transferkit.ranges import MOST_PER_BATCH, MOST_WORKERS, check_number, check_whole_number
from transferkit.tta import tta_views

__all__ = ["Pictures", "Prediction", "predict", "save_predictions", "stream_predictions"]

log = logging.getLogger("transferkit")

Pictures = str | os.PathLike[str] | Image.Image | Tensor | Sequence["str | os.PathLike[str] | Image.Image | Tensor"]
"""What can be predicted: a file, a folder, a PIL image, a tensor (C, H, W), or a list of these."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet computes instead of showing it
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        path: The file, or ``None`` for a picture in memory.
        label: The likeliest class.
        confidence: Its probability, 0 to 1, calibrated by the model's temperature.
        probabilities: Probability by class name, in the order of the model's classes.
        min_confidence: The confidence that was asked for, 0 to 1.
    """

    path: str | None
    label: str
    confidence: float
    probabilities: dict[str, float]
    min_confidence: float = 0.0

    @property
    def accepted(self) -> bool:
        """Whether the model is as confident as was asked for."""
        return self.confidence >= self.min_confidence

    def top(self, k: int) -> list[tuple[str, float]]:
        """Return the ``k`` likeliest classes, likeliest first, as (name, probability).

        Args:
            k: How many, 1 or more; more than there are classes gives all of them.

        Raises:
            SettingError: ``k`` is below 1.
        """
        return topk(torch.tensor(list(self.probabilities.values()), dtype=torch.float64), list(self.probabilities), k)


def predict(
    model: TransferModel,
    pictures: Pictures,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | None = None,
    engine: str = "eager",
    on_bad_image: str = "raise",
    min_confidence: float = 0.0,
    tta: str | None = None,
) -> list[Prediction]:
    """Classify pictures with exactly the transform that validation uses.

    Args:
        model: A trained model; its training mode is left as it was.
        pictures: A file, a folder (searched through), a PIL image, a uint8 or float tensor (C, H, W) not normalised
            (see :func:`transferkit.pictures.as_picture`), or a list of these. They are read in the model's channels:
            a model with 4 sees the transparency, one with 5 or more takes tensors alone.
        batch_size: Pictures per batch.
        num_workers: Processes that read and transform, while this one computes; none for a single batch.
        device: Where to compute; ``None`` for where the model is.
        engine: What computes, one of :data:`~transferkit.inference.ENGINES`.
        on_bad_image: What happens to files that cannot be read: ``"raise"`` names them; ``"skip"`` leaves them out and
            logs them.
        min_confidence: Predictions below it are not :attr:`~Prediction.accepted`, 0 to 1;
            :func:`~transferkit.calibration.choose_threshold` finds one.
        tta: Test-time augmentation: ``"flip"`` averages over the picture and its mirror image, ``"crops"`` over its
            centre and corners; ``None`` looks once.

    Returns:
        One prediction per picture that can be read, in the order given; a folder's pictures are sorted.

    Raises:
        DataError: A path does not exist, there is no picture, or it does not have the model's channels.
        PictureError: A picture cannot be read, and none may be left out or none is left.
        SettingError: A setting is outside its range.
    """
    return list(
        stream_predictions(
            model,
            pictures,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            engine=engine,
            on_bad_image=on_bad_image,
            min_confidence=min_confidence,
            tta=tta,
        )
    )


def stream_predictions(
    model: TransferModel,
    pictures: Pictures,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: torch.device | None = None,
    engine: str = "eager",
    on_bad_image: str = "raise",
    min_confidence: float = 0.0,
    tta: str | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Iterator[Prediction]:
    """Classify pictures one after the other: what is kept in memory is a few batches, however many there are.

    Args:
        model: As for :func:`predict`, and so are all others.
        pictures: The paths of a folder's files are listed at the beginning.
        batch_size: Pictures per batch.
        num_workers: Processes that read and transform.
        device: Where to compute.
        engine: What computes.
        on_bad_image: ``"raise"`` stops at the first batch with a file that cannot be read, and names all such files.
        min_confidence: Predictions below it are not accepted.
        tta: Test-time augmentation.
        on_progress: Called after each batch with the number of pictures that are done, and of all.

    Returns:
        An iterator over the predictions, in the order of the pictures. Settings and paths have been checked when it is
        there; pictures are read as it goes on.

    Raises:
        DataError: A path does not exist, there is no picture, or it does not have the model's channels.
        PictureError: A picture cannot be read, and none may be left out or none is left.
        SettingError: A setting is outside its range.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=["ant", "bee"], image_size=32)
        >>> pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "gold")]
        >>> [prediction.label in model.class_names for prediction in stream_predictions(model, pictures)]
        [True, True]
    """
    check_on_bad_image(on_bad_image)
    check_whole_number("batch_size", batch_size, at_least=1, at_most=MOST_PER_BATCH)
    check_whole_number("num_workers", num_workers, at_least=0, at_most=MOST_WORKERS)
    check_number("min_confidence", min_confidence, at_least=0, at_most=1)
    transform, views = tta_views(tta, model.eval_preset, model.preprocessing)
    if device is not None:
        model.to(device)
    source = _Unlabelled(_listed(pictures))
    count = len(source)
    lost: dict[str, str] | None = {} if on_bad_image == "skip" else None
    batches = loader(
        source,
        transform,
        batch_size=batch_size,
        train=False,
        num_workers=min(num_workers, (count - 1) // max(1, batch_size)),
        lost=lost,
    )

    def run() -> Iterator[Prediction]:
        said = 0
        try:
            for logits, indices in logits_by_batch(
                model.network, batches, next(model.parameters()).device, engine=engine, views=views
            ):
                shares = torch.softmax(logits.double() / model.temperature, dim=1)
                likeliest = shares.argmax(1).tolist()
                for index, row, best in zip(indices.tolist(), shares.tolist(), likeliest, strict=True):
                    said += 1
                    probabilities = dict(zip(model.class_names, row, strict=True))
                    yield Prediction(
                        source.path(index), model.class_names[best], row[best], probabilities, min_confidence
                    )
                if on_progress is not None:
                    on_progress(int(indices[-1]) + 1, count)
        except PictureError:
            unreadable(source.files(), others=count - len(source.files()))  # which names all of them
            raise
        if not said:
            unreadable(source.files(), on_bad_image=on_bad_image)

    return run()


def save_predictions(predictions: Iterable[Prediction], path: str | os.PathLike[str], *, top: int = 1) -> int:
    """Write predictions into a CSV file as they come.

    The columns are ``path``, ``label`` (empty where the prediction is not accepted) and ``confidence``, then with
    ``top`` above 1 ``class_1``, ``probability_1`` and so on. Rows go into ``NAME.partial`` beside the file, which is
    moved there when all are written; after an error or an interrupt it stays, with the rows that were done.

    A spreadsheet would compute a cell that begins with ``=``, ``+``, ``-`` or ``@``. Such a path is written with ``./``
    in front, which is the same file; such a class name, unless it is a number, with an apostrophe.

    Args:
        predictions: :func:`stream_predictions`, for example.
        path: The file; its folder is made if missing.
        top: How many classes to write of each picture, 1 or more; with 1 the label says it.

    Returns:
        How many were written.

    Raises:
        OutputError: The file cannot be written.
        SettingError: ``top`` is below 1.

    Source: OWASP, "CSV injection".

    Example:
        >>> import tempfile
        >>> said = Prediction("bee.jpg", "bees", 0.75, {"ants": 0.25, "bees": 0.75})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "said.csv"
        ...     save_predictions([said], file), file.read_text().split()
        (1, ['path,label,confidence', 'bee.jpg,bees,0.750000'])
    """
    check_whole_number("top", top, at_least=1)
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    ranks = range(1, top + 1) if top > 1 else range(0)
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Line by line, so that a process that is killed leaves whole rows. A name may be no valid text.
        with partial.open("w", buffering=1, newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            titles = [title for rank in ranks for title in (f"class_{rank}", f"probability_{rank}")]
            writer.writerow(["path", "label", "confidence", *titles])
            for each in predictions:
                writer.writerow(_row(each, top=len(ranks)))
                written += 1
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    except BaseException:
        log.warning("%d predictions were written before this ended, into %s", written, partial)
        raise
    return written


def _row(said: Prediction, *, top: int) -> list[str]:
    row = [
        _inert(said.path or "", "./"),
        _inert_name(said.label) if said.accepted else "",
        f"{said.confidence:.6f}",
    ]
    for name, share in said.top(top) if top else []:
        row += [_inert_name(name), f"{share:.6f}"]
    return row + [""] * (3 + 2 * top - len(row))  # where there are fewer classes


def _inert(text: str, before: str) -> str:
    return before + text if text.startswith(_FORMULA) else text


def _inert_name(name: str) -> str:
    return name if _NUMBER.fullmatch(name) else _inert(name, "'")


def _listed(pictures: Pictures) -> list[str | Image.Image | Tensor]:
    items = [pictures] if isinstance(pictures, str | os.PathLike | Image.Image | Tensor) else pictures
    images: list[str | Image.Image | Tensor] = []
    for item in items:
        images += [item] if isinstance(item, Image.Image | Tensor) else list_pictures(item)
    if not images:
        raise DataError("there are no pictures to predict")
    return images


@dataclass(frozen=True, eq=False)
class _Unlabelled:
    """A source of files and pictures in memory; in place of a label each has its own index."""

    images: Sequence[str | Image.Image | Tensor]
    channels: int = 3
    least_side: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        return self._read(index, read_picture)

    def decode(self, index: int) -> tuple[Image.Image | Tensor, int]:
        return self._read(index, decode_picture)

    def _read(self, index: int, read: Callable[..., Image.Image]) -> tuple[Image.Image | Tensor, int]:
        image = self.images[index]
        if isinstance(image, str):
            return read(image, channels=self.channels, at_least=self.least_side), index
        return as_picture(image, channels=self.channels), index

    def labels(self) -> list[int]:
        return list(range(len(self.images)))

    def path(self, index: int) -> str | None:
        image = self.images[index]
        return image if isinstance(image, str) else None

    def files(self) -> list[str]:
        return [image for image in self.images if isinstance(image, str)]

    def name(self, index: int) -> str:
        return self.path(index) or f"image {index}"

    def with_channels(self, channels: int) -> Self:
        return replace(self, channels=channels)

    def with_least_side(self, pixels: int) -> Self:
        return replace(self, least_side=pixels)
