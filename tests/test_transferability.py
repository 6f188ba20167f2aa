"""LogME and H-score against direct implementations, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import BayesianRidge

from transferkit.exceptions import SettingError
from transferkit.transferability import h_score, log_me

WIDE, TALL = (12, 30), (80, 6)


def sample(
    count: int, width: int, *, classes: int = 3, apart: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make features of clusters so far apart, and labels; every class has pictures."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    centres = apart * rng.normal(size=(classes, width))
    return centres[labels] + rng.normal(size=(count, width)), labels


def evidence_of(target: np.ndarray, features: np.ndarray, weights: float, noise: float) -> float:
    """Density of a target after the weights of a linear model were integrated out, by its definition."""
    covariance = np.eye(len(target)) / noise + features @ features.T / weights
    return float(multivariate_normal.logpdf(target, cov=covariance))


def direct_log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """Maximise that density over both precisions, from several starts, without any decomposition."""
    found = []
    for label in np.unique(labels):
        target = (labels == label).astype(float)
        searches = [
            minimize(
                lambda logs, target=target: -evidence_of(target, features, *np.exp(logs)),
                (start, 1.0),
                method="Nelder-Mead",
                bounds=((-20, 20), (-20, 20)),  # with more features than pictures noise may be best at nothing
                options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 2000},
            )
            for start in (-4.0, 0.0, 4.0)
        ]
        found.append(-min(search.fun for search in searches) / len(labels))
    return float(np.mean(found))


def direct_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """The trace of the inverse covariance times that of the class means, as it is printed."""
    means = np.stack([features[labels == label].mean(0) for label in labels])
    inverse = np.linalg.pinv(np.cov(features, rowvar=False), rcond=1e-12)
    return float(np.trace(inverse @ np.cov(means, rowvar=False)))


@pytest.mark.parametrize("apart", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_log_me_is_the_largest_evidence(shape: tuple[int, int], apart: float) -> None:
    features, labels = sample(*shape, apart=apart)
    assert log_me(features, labels) == pytest.approx(direct_log_me(features, labels), abs=2e-4)


def test_log_me_is_that_of_scikit_learns_evidence_maximisation() -> None:
    features, labels = sample(80, 6)
    scores = []
    for label in range(3):
        ridge = BayesianRidge(
            fit_intercept=False,
            alpha_1=0,
            alpha_2=0,
            lambda_1=0,
            lambda_2=0,
            compute_score=True,
            tol=1e-10,
            max_iter=3000,
        ).fit(features, (labels == label).astype(float))
        scores.append(ridge.scores_[-1] / len(labels))
    assert log_me(features, labels) == pytest.approx(np.mean(scores), abs=1e-5)


@pytest.mark.parametrize(
    ("count", "width", "published"), [(80, 6, -0.71259654), (400, 50, -0.19968717), (200, 150, 0.07734953)]
)
def test_log_me_is_what_the_published_code_gives(count: int, width: int, published: float) -> None:
    assert log_me(*sample(count, width, apart=0.5)) == pytest.approx(published, abs=1e-7)


def test_log_me_of_features_that_say_nothing_is_that_of_noise_alone() -> None:
    labels = np.arange(60) % 2
    alone = -0.5 * (1 + np.log(2 * np.pi * 0.5))  # a target that is 1 for half of the pictures
    assert log_me(np.zeros((60, 4)), labels) == pytest.approx(alone)
    assert log_me(np.zeros((60, 100)), labels) == pytest.approx(alone)


@pytest.mark.parametrize("shape", [(80, 6), (40, 1), (50, 49)], ids=["tall", "one feature", "nearly square"])
def test_h_score_is_the_trace_that_defines_it(shape: tuple[int, int]) -> None:
    features, labels = sample(*shape, apart=0.5)
    if shape[1] == 1:
        means = np.stack([features[labels == label].mean(0) for label in labels])
        expected = float(means.var() / features.var())
    else:
        expected = direct_h_score(features, labels)
    assert h_score(features, labels) == pytest.approx(expected, rel=1e-6)


def test_h_score_of_features_in_a_plane_is_that_of_the_plane() -> None:
    features, labels = sample(60, 2, apart=0.5)
    wide = features @ np.random.default_rng(1).normal(size=(2, 9))
    assert h_score(wide, labels, regularised=False) == pytest.approx(h_score(features, labels), rel=1e-9)


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_the_regularised_h_score_is_the_trace_with_a_shrunk_covariance(shape: tuple[int, int]) -> None:
    features, labels = sample(*shape)
    estimate = LedoitWolf().fit(features)
    means = np.stack([features[labels == label].mean(0) for label in labels])
    between = (1 - estimate.shrinkage_) * np.cov(means, rowvar=False, bias=True)
    expected = np.trace(np.linalg.inv(estimate.covariance_) @ between)
    assert h_score(features, labels, regularised=True) == pytest.approx(expected, rel=1e-9)


def test_without_regularisation_wide_features_all_score_the_same() -> None:
    noise, labels = sample(12, 30, apart=0.0)
    clusters, _ = sample(12, 30, apart=3.0)
    plain = [h_score(features, labels, regularised=False) for features in (noise, clusters)]
    assert plain == pytest.approx([2.0, 2.0])
    assert h_score(noise, labels) < 0.8 * h_score(clusters, labels)  # regularised, since there are more features


def test_constant_features_have_no_spread_between_classes() -> None:
    for shape in (WIDE, TALL):
        assert h_score(np.ones(shape), np.arange(shape[0]) % 2) == 0.0


samples = st.builds(
    sample,
    st.integers(6, 40),
    st.integers(1, 50),
    classes=st.integers(2, 4),
    apart=st.floats(0.0, 3.0),
    seed=st.integers(0, 1000),
)


@settings(max_examples=25)
@given(samples, st.integers(0, 1000))
def test_scores_do_not_depend_on_the_order_of_pictures_or_the_numbers_of_classes(
    drawn: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    features, labels = drawn
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(labels)), rng.permutation(100)
    for score in (log_me, h_score):
        assert score(features[order], names[labels[order]]) == pytest.approx(
            score(features, labels), rel=1e-5, abs=1e-6
        )


@settings(max_examples=25)
@given(samples, st.floats(0.01, 100.0), st.integers(0, 1000))
def test_scores_do_not_depend_on_rotation_and_scale(
    drawn: tuple[np.ndarray, np.ndarray], scale: float, seed: int
) -> None:
    features, labels = drawn
    width = features.shape[1]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    moved = scale * features @ rotation
    assert log_me(moved, labels) == pytest.approx(log_me(features, labels), rel=1e-5, abs=1e-6)
    assert h_score(moved, labels) == pytest.approx(h_score(features, labels), rel=1e-5, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_the_plain_h_score_does_not_depend_on_any_invertible_map(seed: int, width: int) -> None:
    features, labels = sample(40, width, seed=seed)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
    moved = features @ (rotation * rng.uniform(0.2, 5.0, width)) + rng.normal(size=width)
    assert h_score(moved, labels) == pytest.approx(h_score(features, labels), rel=1e-6)


@settings(max_examples=25)
@given(samples)
def test_the_h_score_lies_between_nothing_and_the_number_of_classes_minus_one(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = drawn
    most = min(len(set(labels.tolist())) - 1, features.shape[1]) + 1e-9
    assert 0 <= h_score(features, labels) <= most
    assert 0 <= h_score(features, labels, regularised=True) <= most


@settings(max_examples=15)
@given(st.sampled_from([WIDE, TALL]), st.integers(0, 1000))
def test_both_scores_rise_with_the_distance_of_the_classes(shape: tuple[int, int], seed: int) -> None:
    for score in (log_me, lambda *given: h_score(*given, regularised=True)):
        near, far = (score(*sample(*shape, apart=apart, seed=seed)) for apart in (0.1, 4.0))
        assert near < far


def test_tensors_are_taken_as_arrays_are() -> None:
    features, labels = sample(*TALL)
    tensors = torch.from_numpy(features), torch.from_numpy(labels)
    assert log_me(*tensors) == log_me(features, labels)
    assert h_score(*tensors) == h_score(features, labels)


@pytest.mark.parametrize("score", [log_me, h_score])
@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (np.zeros(4), [0, 1, 0, 1], "shape"),
        (np.zeros((4, 2)), [0, 1], "shape"),
        (np.zeros((4, 2)), [1, 1, 1, 1], "two classes or more"),
        (np.full((4, 2), np.nan), [0, 1, 0, 1], "infinite or no numbers"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, features: np.ndarray, labels: list[int], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        score(features, labels)
