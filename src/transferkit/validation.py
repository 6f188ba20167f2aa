"""What a model said of each picture that it was validated on: judged once, kept as a table beside the model."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from transferkit.exceptions import ArtifactError, OutputError

__all__ = ["Judgement", "confusion_matrix", "judge", "load_judgements", "save_judgements"]


@dataclass(frozen=True)
class Judgement:
    """One picture.

    Args:
        picture: Its file, or its place in a data set.
        actual: The class that it is of.
        predicted: The likeliest class.
        confidence: The model's probability for that, 0 to 1.
        loss: Cross-entropy in nats, 0 or more: how little the model thought of the actual class.
    """

    picture: str
    actual: str
    predicted: str
    confidence: float
    loss: float

    @property
    def is_right(self) -> bool:
        """Whether the likeliest class is the actual one."""
        return self.actual == self.predicted


def judge(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], pictures: Sequence[str], *, temperature: float = 1.0
) -> list[Judgement]:
    """Say of each picture what logits say of it.

    Args:
        logits: (N, num_classes) float.
        labels: (N,) int, indices into ``class_names``.
        class_names: One name per class.
        pictures: One name per picture.
        temperature: What logits are divided by before they become probabilities, above 0.

    Example:
        >>> judge(torch.tensor([[2.0, 0.0]]), torch.tensor([1]), ["ants", "bees"], ["1.jpg"])[0].predicted
        'ants'
    """
    shares = torch.softmax(logits.double() / temperature, dim=1)
    losses = F.cross_entropy(logits.double() / temperature, labels, reduction="none")
    confidences, predicted = shares.max(dim=1)
    columns = zip(pictures, labels.tolist(), predicted.tolist(), confidences.tolist(), losses.tolist(), strict=True)
    return [
        Judgement(picture, class_names[actual], class_names[said], confidence, loss)
        for picture, actual, said, confidence, loss in columns
    ]


def confusion_matrix(judgements: Iterable[Judgement], class_names: Sequence[str]) -> Tensor:
    """Count pictures by actual class (row) and predicted class (column).

    Args:
        judgements: Of these classes.
        class_names: One name per class.

    Returns:
        (num_classes, num_classes) int64.

    Source: the convention of scikit-learn's ``confusion_matrix``.

    Example:
        >>> said = [Judgement("1.jpg", "bees", "ants", 0.9, 2.3)]
        >>> confusion_matrix(said, ["ants", "bees"]).tolist()
        [[0, 0], [1, 0]]
    """
    place = {name: index for index, name in enumerate(class_names)}
    counts = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    for each in judgements:
        counts[place[each.actual], place[each.predicted]] += 1
    return counts


def save_judgements(judgements: Iterable[Judgement], path: str | os.PathLike[str]) -> None:
    """Write a table, a row per picture.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(Judgement)])
            writer.writerows(astuple(each) for each in judgements)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def load_judgements(path: str | os.PathLike[str]) -> list[Judgement]:
    """Read what :func:`save_judgements` wrote.

    Raises:
        ArtifactError: The file is missing or damaged.

    Example:
        >>> load_judgements("no/such/validation.csv")
        Traceback (most recent call last):
        transferkit.exceptions.ArtifactError: no/such/validation.csv is no table of judged pictures: ...
    """
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [
                Judgement(row["picture"], row["actual"], row["predicted"], float(row["confidence"]), float(row["loss"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} is no table of judged pictures: {error}") from error
