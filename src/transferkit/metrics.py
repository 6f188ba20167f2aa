"""What a classifier is worth on labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transferkit.calibration import confidences_of, expected_calibration_error, wilson_interval
from transferkit.exceptions import DataError
from transferkit.ranges import check_whole_number

__all__ = ["Evaluation", "evaluate_logits", "per_class", "topk"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation.

    Attributes:
        accuracy: Share of pictures whose largest logit is the right class, 0 to 1.
        accuracy_interval: Between which values it probably lies for pictures like these, at 95 % (Wilson); it tells how
            much so few pictures say, not whether they are like those to come.
        loss: Mean cross-entropy in nats, without smoothing, class weights or temperature.
        ece: Expected calibration error of the confidences, 0 to 1, in 15 bins, with the model's temperature.
        count: Number of pictures.
        per_class: By class name: ``precision``, ``recall``, ``f1`` (0 to 1; 0 where undefined) and ``count``.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    loss: float
    ece: float
    count: int
    per_class: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "loss": self.loss,
            "ece": self.ece,
            "count": self.count,
            "per_class": self.per_class,
        }


def evaluate_logits(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], *, temperature: float = 1.0
) -> Evaluation:
    """Compute accuracy with its interval, loss, calibration error and per-class figures.

    Args:
        logits: (N, num_classes) float.
        labels: (N,) int, indices into ``class_names``.
        class_names: One name per class.
        temperature: What the logits are divided by for the confidences, above 0.

    Raises:
        DataError: There is no picture.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> result = evaluate_logits(logits, torch.tensor([0, 1, 1]), ["a", "b"])
        >>> round(result.accuracy, 3), result.per_class["b"]["recall"], result.count
        (0.667, 0.5, 3)
    """
    if len(labels) == 0:
        raise DataError("there are no pictures to evaluate")
    predicted = logits.argmax(1)
    is_right = predicted == labels
    there, said, right = (
        torch.bincount(each, minlength=len(class_names)) for each in (labels, predicted, labels[is_right])
    )
    return Evaluation(
        accuracy=is_right.double().mean().item(),
        accuracy_interval=wilson_interval(int(is_right.sum()), len(labels)),
        loss=F.cross_entropy(logits.double(), labels).item(),
        ece=expected_calibration_error(*confidences_of(logits, labels, temperature=temperature)),
        count=len(labels),
        per_class=per_class(class_names, there=there, said=said, right=right),
    )


def per_class(class_names: Sequence[str], *, there: Tensor, said: Tensor, right: Tensor) -> dict[str, dict[str, float]]:
    """Return ``precision``, ``recall``, ``f1`` (0 to 1; 0 where undefined) and ``count`` by class name.

    Args:
        class_names: One name per class.
        there: (num_classes,) int, pictures of each class.
        said: (num_classes,) int, pictures that were taken for each class.
        right: (num_classes,) int, those of them that are of that class.

    Source: the definitions of scikit-learn's ``precision_recall_fscore_support``; importing it takes a second.

    Example:
        >>> there, said, right = torch.tensor([[1, 2], [2, 1], [1, 1]])
        >>> per_class(["a", "b"], there=there, said=said, right=right)["b"]["recall"]
        0.5
    """
    there, said, right = there.double(), said.double(), right.double()
    figures = {"precision": right / said, "recall": right / there, "f1": 2 * right / (said + there)}
    return {
        name: {
            **{figure: float(values[index].nan_to_num(0.0)) for figure, values in figures.items()},
            "count": int(there[index]),
        }
        for index, name in enumerate(class_names)
    }


def topk(probabilities: Tensor, class_names: Sequence[str], k: int) -> list[tuple[str, float]]:
    """Return the ``k`` likeliest classes of one picture, likeliest first, as (name, probability).

    Args:
        probabilities: (num_classes,) float.
        class_names: One name per class.
        k: How many, 1 or more; more than there are classes gives all of them.

    Raises:
        SettingError: ``k`` is no whole number, or below 1.
    """
    check_whole_number("k", k, at_least=1)
    values, indices = torch.topk(probabilities, min(k, len(class_names)))
    return [(class_names[index], value) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]
