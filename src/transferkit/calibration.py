"""How far confidences can be trusted: reliability, temperature, thresholds; and how far an accuracy: its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from transferkit.exceptions import DataError, SettingError
from transferkit.ranges import check_number, check_whole_number

__all__ = [
    "LEAST_PICTURES",
    "PRIOR",
    "TEMPERATURES",
    "Calibration",
    "ReliabilityBins",
    "Shares",
    "Threshold",
    "calibrate_logits",
    "choose_threshold",
    "confidences_of",
    "expected_calibration_error",
    "fit_temperature",
    "reliability",
    "temperature_for",
    "wilson_interval",
]

Shares = Tensor | NDArray[Any] | Sequence[float]
"""(N,) numbers from 0 to 1; of truths, 0 and 1."""

TEMPERATURES = (0.05, 20.0)
"""The lowest and the highest temperature that is fitted."""

PRIOR = 8.0
"""How much :func:`fit_temperature` prefers 1; anything from 4 to 16 did about as well."""

LEAST_PICTURES = 50
"""With fewer pictures to validate on, a run keeps no temperature but 1."""

_CLOSE, _MOST_STEPS = 1e-8, 100  # relative to the temperature; fewer than ten steps are usual
_BLOCK = 2**17  # logits at a time, by NumPy: they stay in the cache, and no threads wait for each other


@dataclass(frozen=True)
class ReliabilityBins:
    """Pictures by their confidence, in bins of equal width: what a reliability diagram draws.

    Attributes:
        edges: Where bins begin and end, from 0 to 1, one more than there are bins; a bin holds its upper edge.
        accuracy: Of each bin, the share of pictures that is right; not a number where it is empty.
        confidence: Of each bin, the mean confidence; not a number where it is empty.
        count: Of each bin, how many pictures.
    """

    edges: tuple[float, ...]
    accuracy: tuple[float, ...]
    confidence: tuple[float, ...]
    count: tuple[int, ...]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over all pictures of how far their bin's two figures are apart."""
        gaps = zip(self.count, self.accuracy, self.confidence, strict=True)
        return sum(count * abs(right - said) for count, right, said in gaps if count) / sum(self.count)


@dataclass(frozen=True)
class Threshold:
    """What accepting only confident answers gives.

    Attributes:
        confidence: Answers with this confidence or more are accepted.
        precision: Share of the accepted ones that is right.
        coverage: Share of all pictures whose answer is accepted.
    """

    confidence: float
    precision: float
    coverage: float


@dataclass(frozen=True)
class Calibration:
    """What dividing the logits by a temperature does to the confidences.

    Attributes:
        temperature: What the logits are divided by before they become probabilities; above 1 lowers confidences.
        ece_before: Expected calibration error with the logits as they are (temperature 1), 0 to 1.
        ece_after: With the temperature.
        nll_before: Mean negative log-likelihood of the right class in nats, with the logits as they are.
        nll_after: With the temperature.
        count: Number of pictures.
        threshold: The threshold that was asked for, on confidences with the temperature, or ``None``.
    """

    temperature: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    count: int
    threshold: Threshold | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def reliability(confidences: Shares, right: Shares, *, bins: int = 15) -> ReliabilityBins:
    """Sort pictures by confidence into bins of equal width, and say how often those of each bin are right.

    Args:
        confidences: (N,) probability of the likeliest class, 0 to 1.
        right: (N,) whether that class is the right one.
        bins: How many, 1 or more.

    Raises:
        SettingError: The two do not belong together, a confidence is outside 0 to 1, or there is no bin.
        DataError: There is no picture.

    Source: Guo et al. 2017, "On calibration of modern neural networks", §2.

    Example:
        >>> found = reliability([0.6, 0.7, 0.9, 1.0], [True, False, True, True], bins=2)
        >>> found.count, found.accuracy[1], round(found.confidence[1], 3)
        ((0, 4), 0.75, 0.8)
    """
    said, hits = _pairs(confidences, right)
    check_whole_number("bins", bins, at_least=1)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(said, edges[1:-1])
    count = torch.bincount(place, minlength=bins)
    accuracy, confidence = (torch.bincount(place, weights=each, minlength=bins) / count for each in (hits, said))
    return ReliabilityBins(
        tuple(edges.tolist()), tuple(accuracy.tolist()), tuple(confidence.tolist()), tuple(count.tolist())
    )


def expected_calibration_error(confidences: Shares, right: Shares, *, bins: int = 15) -> float:
    """Say how far confidence and accuracy are apart on average, 0 to 1; 0 is calibrated.

    The figure depends on the bins, and few pictures make it larger than it is.

    Args:
        confidences: (N,) probability of the likeliest class, 0 to 1.
        right: (N,) whether that class is the right one.
        bins: How many, 1 or more.

    Raises:
        SettingError: The two do not belong together, a confidence is outside 0 to 1, or there is no bin.
        DataError: There is no picture.

    Source: Guo et al. 2017, "On calibration of modern neural networks", §2.

    Example:
        >>> round(expected_calibration_error([0.6, 0.6, 0.9, 0.9], [True, False, True, True], bins=10), 3)
        0.1
    """
    return reliability(confidences, right, bins=bins).error


def confidences_of(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what the functions here take: each picture's confidence, and whether the likeliest class is right.

    Args:
        logits: (N, num_classes) float.
        labels: (N,) int.
        temperature: What the logits are divided by, above 0.

    Returns:
        (N,) float64 and (N,) bool.

    Example:
        >>> confidences_of(torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]), torch.tensor([2, 1]))[1].tolist()
        [True, False]
    """
    confidences, said = torch.softmax(logits.double() / temperature, 1).max(1)
    return confidences, said == labels


def fit_temperature(logits: Tensor, labels: Tensor, *, prior: float = PRIOR) -> float:
    """Find the temperature that makes the right classes most likely when the logits are divided by it.

    The order of the classes does not change, and so neither does the accuracy. Few pictures with few mistakes say
    little about confidences; if all are right, no confidence is high enough for them. So 1 is preferred as long as
    pictures are few: ``prior * (1 / T - 1 + log(T))`` is added to the sum of their losses. Their loss never rises.

    Args:
        logits: (N, num_classes) float, of pictures that were not trained on.
        labels: (N,) int.
        prior: How much 1 is preferred, 0 or more; 0 takes the pictures at their word.

    Returns:
        The temperature, within :data:`TEMPERATURES`; 1 where no other is better.

    Raises:
        DataError: There is no picture.
        SettingError: Logits and labels do not belong together, a logit is no number, or ``prior`` is below 0.

    Source: Guo et al. 2017, "On calibration of modern neural networks", §4.2. The prior is a gamma distribution of
    1 / T with its mode at 1; how much of it was measured (``benchmarks/results/calibration.md``).

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1]), prior=0), 3)  # 3 in 4: 4 / T is log 3
        3.641
    """
    _check_logits(logits, labels)
    check_number("prior", prior, at_least=0)
    weight = prior / len(labels)
    behind = logits.detach().cpu().to(torch.float64, copy=True).numpy()
    behind -= behind.max(1, keepdims=True)
    right = float(np.take_along_axis(behind, labels.cpu().numpy()[:, None], 1).mean())
    rows = max(1, _BLOCK // behind.shape[1])
    blocks = [behind[first : first + rows] for first in range(0, len(behind), rows)]
    # Newton's steps on 1 / T, in which loss and prior are convex; halving where one leaves what is known of its place.
    low, high = (1 / each for each in reversed(TEMPERATURES))
    scale = 1.0
    for _ in range(_MOST_STEPS):
        means, variances = zip(*(_moments(block, scale) for block in blocks), strict=True)
        slope = float(np.concatenate(means).mean()) - right + weight * (1 - 1 / scale)
        curvature = float(np.concatenate(variances).mean()) + weight / scale**2
        if slope == 0:
            break
        low, high = (scale, high) if slope < 0 else (low, scale)
        step = scale - slope / curvature if curvature > 0 else math.inf
        before, scale = scale, step if low < step < high else math.sqrt(low * high)
        if abs(scale - before) < _CLOSE * scale:
            break
    return 1 / scale


def _moments(behind: NDArray[Any], scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return mean and variance of each row under its softmax at a scale; the largest number of a row is 0."""
    weights = np.exp(behind * scale)
    total = weights.sum(1)
    weights *= behind
    means = weights.sum(1) / total
    return means, np.einsum("ij,ij->i", weights, behind) / total - means**2


def temperature_for(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature that a run keeps with its model: 1 with fewer than :data:`LEAST_PICTURES`.

    Args:
        logits: (N, num_classes) float, of the validation pictures.
        labels: (N,) int.

    Example:
        >>> temperature_for(torch.tensor([[4.0, 0.0]]), torch.tensor([1]))
        1.0
    """
    return fit_temperature(logits, labels) if len(labels) >= LEAST_PICTURES else 1.0


def calibrate_logits(logits: Tensor, labels: Tensor, *, precision: float | None = None) -> Calibration:
    """Fit a temperature, and say what it does to the confidences of the same pictures.

    Args:
        logits: (N, num_classes) float, of pictures that were not trained on.
        labels: (N,) int.
        precision: Share of accepted answers that should be right, to choose a threshold for; ``None`` for none.

    Raises:
        DataError: There is no picture.
        SettingError: Logits and labels do not belong together, or no threshold reaches ``precision``.

    Source: Guo et al. 2017, "On calibration of modern neural networks".

    Example:
        >>> logits, labels = torch.tensor([[4.0, 0.0]]).repeat(400, 1), torch.arange(400) // 300
        >>> found = calibrate_logits(logits, labels)
        >>> round(found.ece_before, 2), round(found.ece_after, 2)
        (0.23, 0.01)
    """
    temperature = fit_temperature(logits, labels)
    before, after = (confidences_of(logits, labels, temperature=each) for each in (1.0, temperature))
    nll_before, nll_after = (F.cross_entropy(logits.double() / each, labels).item() for each in (1.0, temperature))
    return Calibration(
        temperature=temperature,
        ece_before=expected_calibration_error(*before),
        ece_after=expected_calibration_error(*after),
        nll_before=nll_before,
        nll_after=nll_after,
        count=len(labels),
        threshold=None if precision is None else choose_threshold(*after, precision=precision),
    )


def choose_threshold(confidences: Shares, right: Shares, *, precision: float) -> Threshold:
    """Find the smallest confidence from which on answers are right as often as is asked.

    Args:
        confidences: (N,) probability of the likeliest class, 0 to 1.
        right: (N,) whether that class is the right one.
        precision: Share of the accepted answers that should be right, above 0, at most 1.

    Returns:
        The threshold, and what it gives on these pictures. On others it will be a little less.

    Raises:
        SettingError: ``precision`` is outside its range, or no threshold reaches it.
        DataError: There is no picture.

    Example:
        >>> choose_threshold([0.9, 0.8, 0.7, 0.6], [True, True, False, True], precision=0.75)
        Threshold(confidence=0.6, precision=0.75, coverage=1.0)
        >>> choose_threshold([0.9, 0.8, 0.7, 0.6], [True, True, False, True], precision=0.9)
        Threshold(confidence=0.8, precision=1.0, coverage=0.5)
    """
    said, hits = _pairs(confidences, right)
    check_number("precision", precision, above=0, at_most=1)
    said, order = said.sort(descending=True)
    accepted = torch.arange(1, len(said) + 1)
    reached = hits[order].cumsum(0) / accepted
    whole = torch.cat([said[1:] != said[:-1], torch.tensor([True])])  # equal confidences are accepted together
    places = (whole & (reached >= precision)).nonzero().flatten()
    if not len(places):
        best = float(reached[whole].max())
        raise SettingError(f"no confidence gives precision={precision:g} on these pictures; {best:.3f} is the most")
    place = int(places[-1])
    return Threshold(float(said[place]), float(reached[place]), (place + 1) / len(said))


def wilson_interval(right: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Say between which values the true accuracy probably lies, given how many pictures were right.

    Args:
        right: How many were right.
        count: Of how many, 1 or more.
        confidence: How often such an interval holds the true accuracy, above 0, below 1.

    Returns:
        Lower and upper end, 0 to 1.

    Raises:
        SettingError: A value is outside its range.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Example:
        >>> [round(each, 3) for each in wilson_interval(146, 153)]
        [0.909, 0.978]
    """
    if not 0 <= right <= count or count < 1:
        raise SettingError(f"{right} of {count} pictures cannot be right")
    check_number("confidence", confidence, above=0, below=1)
    share, z = right / count, NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At the ends the two are equal, but for rounding.
    return 0.0 if right == 0 else middle - half, 1.0 if right == count else middle + half


def _pairs(confidences: Shares, right: Shares) -> tuple[Tensor, Tensor]:
    said, hits = (torch.as_tensor(each, dtype=torch.float64) for each in (confidences, right))
    if said.ndim != 1 or said.shape != hits.shape:
        raise SettingError(
            f"confidences {tuple(said.shape)} and right {tuple(hits.shape)} need one value each per picture, (N,)"
        )
    if not len(said):
        raise DataError("there are no pictures whose confidence could be looked at")
    if bool(((said < 0) | (said > 1)).any()):
        raise SettingError(f"confidences are 0 to 1, got {said.min():.3g} to {said.max():.3g}; give probabilities")
    return said, hits


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise SettingError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together; "
            "they need (N, num_classes) and (N,)"
        )
    if not len(labels):
        raise DataError("there are no pictures to calibrate on")
    if not bool(torch.isfinite(logits).all()):
        raise SettingError("a logit is no number, so no temperature can be fitted; look at the model's output first")
