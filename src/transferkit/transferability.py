"""How well a backbone's features suit some labelled pictures, without training anything: LogME and the H-score."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit.exceptions import SettingError

__all__ = ["h_score", "log_me"]

Array = NDArray[np.float64]

# Logarithms of the ratios of precisions that are tried, around the features' largest squared singular value.
_RATIOS = np.linspace(-25, 25, 101)


def log_me(features: Any, labels: Any) -> float:
    """Return the log of the maximum evidence per picture: how well a linear model could explain the labels.

    Each class is a target, 1 for its pictures and 0 for others, of a Bayesian linear regression on the features. The
    precisions of its weights and of its noise are those with the largest evidence, the probability of the target after
    all weights have been integrated out. Unlike the fit of a trained head, it does not grow with features that only
    learn the pictures by heart.

    The evidence is that of the normal distribution of the target, exactly, also with more features than pictures. The
    published code leaves out a term there. Of the two precisions, one has a closed form where their ratio is given, and
    the ratio is searched for: what the published fixed point comes to, without a start that it depends on.

    Args:
        features: (N, D) numbers, an array or a tensor on the CPU: what the head receives of each training picture.
        labels: (N,) the class of each, of two classes or more.

    Returns:
        The mean over the classes of the log evidence divided by N, in nats; higher is better. It is the same for
        features that are rotated, or all multiplied by one number.

    Raises:
        SettingError: The shapes do not fit, a number is not finite, or there are fewer than two classes.

    Source: You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning"; You et al. 2022,
        "Ranking and Tuning Pre-trained Models".

    Example:
        >>> features = np.array([[3.0, 0.1], [2.9, -0.2], [-3.1, 0.1], [-3.0, 0.2]])
        >>> good, bad = log_me(features, [0, 0, 1, 1]), log_me(features, [0, 1, 0, 1])
        >>> good > bad
        True
    """
    from scipy.optimize import minimize_scalar

    vectors, indices = _checked(features, labels)
    count = len(vectors)
    targets = np.eye(indices.max() + 1)[indices]
    spectrum, explained, rest = _spectrum(vectors, targets)
    largest = np.log(spectrum.max()) if spectrum.any() else 0.0
    ratios = _RATIOS + largest
    step = ratios[1] - ratios[0]
    # It may have several peaks, so that a search alone could climb the wrong one.
    around = ratios[_evidence(ratios, spectrum, explained, rest, count).argmax(0)]
    lowest = []
    for target, best in enumerate(around):
        own = (spectrum, explained[:, [target]], rest[[target]], count)
        found = minimize_scalar(
            lambda ratio, own=own: -_evidence(np.array([ratio]), *own).item(),
            bounds=(best - step, best + step),
            method="bounded",
        )
        lowest.append(found.fun)
    return -float(np.mean(lowest))


def h_score(features: Any, labels: Any, *, regularised: bool | None = None) -> float:
    """Return the H-score: how much of the features' spread lies between the classes, direction by direction.

    It is the trace of the inverse covariance of the features times the covariance of their class means. With no more
    pictures than features it is the number of classes minus 1 whatever the features are, and with few more it still
    favours wide ones. The regularised score takes Ledoit and Wolf's covariance instead, shrunk towards a multiple of
    the identity; only scores of one kind can be compared with each other.

    Args:
        features: (N, D) numbers, an array or a tensor on the CPU: what the head receives of each training picture.
        labels: (N,) the class of each, of two classes or more.
        regularised: Which of the two; ``None`` for the regularised one where there are no more pictures than features.

    Returns:
        From 0 to the number of classes minus 1, or to D where that is less; higher is better. It is the same for
        features under any invertible linear map, where it is not regularised.

    Raises:
        SettingError: The shapes do not fit, a number is not finite, or there are fewer than two classes.

    Source: Bao et al. 2019, "An Information-Theoretic Approach to Transferability in Task Transfer Learning"; Ibrahim
        et al. 2021, "Newer is not always better: Rethinking transferability metrics, their peculiarities, stability and
        performance"; ``sklearn.covariance.ledoit_wolf``.

    Example:
        >>> features = np.array([[3.0, 0.1], [2.9, -0.2], [-3.1, 0.1], [-3.0, 0.2]])
        >>> round(h_score(features, [0, 0, 1, 1]), 3), round(h_score(features, [0, 1, 0, 1]), 3)
        (1.0, 0.195)
    """
    vectors, indices = _checked(features, labels)
    count, width = vectors.shape
    centred = vectors - vectors.mean(0)
    # Orthonormal columns, so that products with them are sums over a class.
    classes = np.eye(indices.max() + 1)[indices] / np.sqrt(np.bincount(indices))
    if not (count <= width if regularised is None else regularised):
        basis, scales, _ = np.linalg.svd(centred, full_matrices=False)
        basis = basis[:, scales > scales.max() * max(count, width) * np.finfo(float).eps]
        return float(((basis.T @ classes) ** 2).sum())
    if not centred.any():
        return 0.0
    from sklearn.covariance import ledoit_wolf

    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    means = centred.T @ classes / np.sqrt(count)
    return float((1 - shrinkage) * (means * np.linalg.solve(covariance, means)).sum())


def _checked(features: Any, labels: Any) -> tuple[Array, NDArray[np.int64]]:
    """Return features and the number of each picture's class, 0, 1, …, with none left out."""
    vectors, given = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if vectors.ndim != 2 or given.shape != (len(vectors),):
        raise SettingError(
            f"features of shape {vectors.shape} with labels of shape {given.shape}; they can be (N, D) and (N,)"
        )
    if not np.isfinite(vectors).all():
        raise SettingError("some features are infinite or no numbers, so nothing can be said of them")
    classes, indices = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise SettingError(f"labels of {len(classes)} class(es); a score needs pictures of two classes or more")
    return vectors, indices.astype(np.int64)


def _evidence(ratios: Array, spectrum: Array, explained: Array, rest: Array, count: int) -> Array:
    """Return the log evidence per picture, (ratios, classes), for logarithms of the weights' by the noise's precision.

    The precision of the noise is the best one for each.
    """
    gains = spectrum / np.exp(ratios[:, None])
    residuals = (1 / (1 + gains)) @ explained + rest
    volumes = np.log1p(gains).sum(1, keepdims=True)
    evidence: Array = -0.5 * (1 + np.log(2 * np.pi * residuals / count) + volumes / count)
    return evidence


def _spectrum(vectors: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Return squared singular values (K,), what each explains of each target (K, C), and what none explains (C,)."""
    count, width = vectors.shape
    if count <= width:
        values, basis = np.linalg.eigh(vectors @ vectors.T)
        return _without_noise(values, count), (basis.T @ targets) ** 2, np.zeros(targets.shape[1])
    values, directions = np.linalg.eigh(vectors.T @ vectors)
    kept = _without_noise(values, count) > 0
    values, directions = values[kept], directions[:, kept]
    explained = (directions.T @ (vectors.T @ targets)) ** 2 / values[:, None]
    return values, explained, np.maximum((targets**2).sum(0) - explained.sum(0), 0)


def _without_noise(values: Array, count: int) -> Array:
    return np.where(values > values.max() * count * np.finfo(float).eps, values, 0.0)
