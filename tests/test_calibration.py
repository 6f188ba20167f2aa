"""Confidences: bins as in scikit-learn, temperatures by brute force, intervals as in scipy, and where they go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from torch import Tensor
from torch.nn import functional as F

from transferkit.artifact_config import sealed
from transferkit.calibration import (
    LEAST_PICTURES,
    PRIOR,
    TEMPERATURES,
    calibrate_logits,
    choose_threshold,
    confidences_of,
    expected_calibration_error,
    fit_temperature,
    reliability,
    temperature_for,
    wilson_interval,
)
from transferkit.callbacks import BestCheckpoint
from transferkit.checkpoint import load_artifact, save_artifact, save_temperature
from transferkit.exceptions import ArtifactError, DataError, OutputError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.optim import build_optimizer, param_groups
from transferkit.prediction import predict
from transferkit.trainer import Trainer

SIZES = st.tuples(st.integers(1, 60), st.integers(2, 6), st.integers(0, 999), st.sampled_from([0.1, 1.0, 9.0]))


def drawn(count: int, classes: int, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Draw logits that know something of their labels, the more sure of it the larger the scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return scale * (torch.randn(count, classes, generator=generator) + 1.5 * F.one_hot(labels, classes)), labels


def nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return F.cross_entropy(logits.double() / temperature, labels).item()


# Reliability


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_bins_are_those_of_scikit_learn(count: int, bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidences, right = rng.random(count), rng.random(count) < 0.7
    right[:2] = [True, False][:count]  # scikit-learn wants to see both
    found = reliability(torch.from_numpy(confidences), torch.from_numpy(right), bins=bins)
    filled = [index for index in range(bins) if found.count[index]]
    if right.all() or not right.any():
        return
    accuracy, confidence = calibration_curve(right, confidences, n_bins=bins)
    assert [found.accuracy[index] for index in filled] == pytest.approx(accuracy.tolist())
    assert [found.confidence[index] for index in filled] == pytest.approx(confidence.tolist())
    assert found.count == tuple(np.histogram(confidences, bins=bins, range=(0, 1))[0].tolist())
    assert all(math.isnan(found.accuracy[index]) for index in set(range(bins)) - set(filled))
    weights = np.array([found.count[index] for index in filled]) / count
    assert found.error == pytest.approx(float(np.sum(weights * np.abs(accuracy - confidence))))


def test_an_upper_edge_belongs_to_its_bin_and_the_ends_belong_to_some() -> None:
    found = reliability([0.0, 0.2, 0.6, 1.0], [True] * 4, bins=5)
    assert found.count == (2, 0, 1, 0, 1)
    assert found.edges == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))


def test_the_calibration_error_is_what_confidence_promises_too_much() -> None:
    confidences, right = [0.9] * 10, [True] * 6 + [False] * 4
    assert expected_calibration_error(confidences, right) == pytest.approx(0.3)
    assert expected_calibration_error([0.6] * 10, right) == pytest.approx(0)


def test_what_is_no_confidence_is_refused() -> None:
    with pytest.raises(SettingError, match="confidences are 0 to 1, got -1 to 3; give probabilities"):
        reliability([-1.0, 3.0], [True, False])
    with pytest.raises(SettingError, match=r"confidences \(2,\) and right \(1,\) need one value each"):
        reliability([0.5, 0.5], [True])
    with pytest.raises(SettingError, match="bins must be 1 or more, got 0"):
        reliability([0.5], [True], bins=0)
    with pytest.raises(DataError, match="no pictures"):
        expected_calibration_error([], [])


# Temperature


@given(SIZES, st.sampled_from([0.0, PRIOR, 50.0]))
@settings(deadline=None, max_examples=40)
def test_the_temperature_is_the_best_of_a_fine_grid(sizes: tuple[int, int, int, float], prior: float) -> None:
    logits, labels = drawn(*sizes)

    def cost(temperature: float) -> float:
        preference = prior * (1 / temperature - 1 + math.log(temperature))
        return nll(logits, labels, temperature) + preference / len(labels)

    found = fit_temperature(logits, labels, prior=prior)
    low, high = TEMPERATURES
    assert low <= found <= high
    far = np.geomspace(low, high, 200)
    assert cost(found) <= min(map(cost, far)) + 1e-6
    if low * 1.02 < found < high / 1.02 and sizes[0] > 20:
        near = found * np.linspace(0.999, 1.001, 21)
        assert near[int(np.argmin([*map(cost, near)]))] == pytest.approx(found, rel=1.5e-4)


@given(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 7, 1000]), st.integers(0, 999), st.floats(0.01, 300.0)),
    st.sampled_from([0.0, PRIOR]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_the_temperature_is_the_one_that_a_slow_search_finds(
    sizes: tuple[int, int, int, float], prior: float, dtype: torch.dtype, block: int
) -> None:
    logits, labels = drawn(*sizes)
    logits = logits.to(dtype)

    def cost(inverse: float) -> float:
        loss = F.cross_entropy(logits.double() * inverse, labels, reduction="sum").item()
        return loss + prior * (inverse - 1 - math.log(inverse))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transferkit.calibration._BLOCK", block)  # however the pictures are cut up
        found = 1 / fit_temperature(logits, labels, prior=prior)
    least, most = (1 / each for each in reversed(TEMPERATURES))
    wanted = minimize_scalar(cost, bounds=(least, most), method="bounded", options={"xatol": 1e-12, "maxiter": 500}).x
    assert least * (1 - 1e-6) <= found <= most * (1 + 1e-6)
    assert cost(found) <= cost(wanted) + 1e-12 * (1 + cost(wanted))
    if prior:  # else it may be flat
        assert found == pytest.approx(wanted, rel=1e-5)


@given(SIZES)
@settings(deadline=None, max_examples=30)
def test_a_temperature_never_changes_the_answer_and_never_raises_the_loss(sizes: tuple[int, int, int, float]) -> None:
    logits, labels = drawn(*sizes)
    found = calibrate_logits(logits, labels)
    assert torch.equal((logits.double() / found.temperature).argmax(1), logits.argmax(1))
    assert found.nll_after <= found.nll_before + 1e-12
    assert found.nll_before == pytest.approx(nll(logits, labels, 1.0))
    assert found.nll_after == pytest.approx(nll(logits, labels, found.temperature))
    assert found.ece_before == expected_calibration_error(*confidences_of(logits, labels))
    assert found.ece_after == expected_calibration_error(*confidences_of(logits, labels, temperature=found.temperature))
    assert found.count == len(labels)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@given(SIZES, st.floats(0.3, 3.0))
@settings(deadline=None, max_examples=20)
def test_logits_that_are_multiplied_get_the_temperature_that_takes_it_back(
    sizes: tuple[int, int, int, float], factor: float
) -> None:
    logits, labels = drawn(*sizes)
    found, other = (fit_temperature(each, labels, prior=0) for each in (logits, logits.double() * factor))
    low, high = TEMPERATURES
    if low * 4 < found < high / 4:
        assert other == pytest.approx(found * factor, rel=1e-5)


def test_confidences_that_are_drawn_calibrated_need_no_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 3, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).flatten()
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.1)
    found = calibrate_logits(3 * logits, labels)
    assert found.ece_before > 0.1 > 0.02 > found.ece_after


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[2.0, 0.0]] * 5, [0] * 5, TEMPERATURES[0]),  # all right: no confidence is high enough
        ([[2.0, 0.0]] * 5, [1] * 5, TEMPERATURES[1]),  # all wrong: none is low enough
        ([[2.0, 0.0]], [0], TEMPERATURES[0]),
        ([[0.0, 0.0]] * 5, [0, 1, 0, 1, 1], 1.0),  # nothing to scale
        ([[3.0]] * 5, [0] * 5, 1.0),  # a single class
        ([[1e4, 0.0]] * 5, [0] * 5, 1.0),  # as sure as can be already
        ([[2.0, 0.0], [0.0, 2.0]] * 4, [0] * 8, TEMPERATURES[1]),  # one class, half of it right
    ],
)
def test_hopeless_cases_give_a_temperature_within_the_range(
    logits: list[list[float]], labels: list[int], expected: float
) -> None:
    given_logits, given_labels = torch.tensor(logits), torch.tensor(labels)
    assert fit_temperature(given_logits, given_labels, prior=0) == pytest.approx(expected, rel=1e-6)
    found = fit_temperature(given_logits, given_labels)  # the prior draws it near to 1
    assert min(1, expected) <= found <= max(1, expected)
    assert 0.4 < found < 2.5


def test_logits_as_sure_as_can_be_and_wrong_get_the_highest_temperature() -> None:
    logits, labels = torch.tensor([[1e4, 0.0]] * 5), torch.ones(5, dtype=torch.int64)
    assert fit_temperature(logits, labels, prior=0) == pytest.approx(TEMPERATURES[1])


@given(SIZES)
@settings(deadline=None, max_examples=20)
def test_the_prior_draws_to_1_and_fades_with_the_pictures(sizes: tuple[int, int, int, float]) -> None:
    logits, labels = drawn(*sizes)
    found = [abs(math.log(fit_temperature(logits, labels, prior=prior))) for prior in (0, 2, PRIOR, 50)]
    assert found == sorted(found, reverse=True) or found[0] == pytest.approx(found[-1], abs=1e-6)
    repeated = fit_temperature(logits.repeat(20, 1), labels.repeat(20), prior=20 * PRIOR)
    assert repeated == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(DataError, match="no pictures to calibrate on"):
        fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    with pytest.raises(SettingError, match=r"logits \(3, 2\) and labels \(2,\) do not belong together"):
        fit_temperature(torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(SettingError, match="prior must be 0 or more, got -1"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([0]), prior=-1)
    with pytest.raises(SettingError, match="a logit is no number"):
        fit_temperature(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


def test_a_run_keeps_1_where_there_are_too_few_pictures() -> None:
    logits, labels = drawn(LEAST_PICTURES, 3, 0, 9.0)
    assert temperature_for(logits, labels) == fit_temperature(logits, labels) > 1
    assert temperature_for(logits[1:], labels[1:]) == 1


# Thresholds


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=1, max_size=30))
def test_a_threshold_is_the_smallest_confidence_that_keeps_the_precision(pictures: list[tuple[float, bool]]) -> None:
    confidences, right = map(list, zip(*pictures, strict=True))

    def precision(threshold: float) -> float:
        accepted = [is_right for said, is_right in pictures if said >= threshold]
        return sum(accepted) / len(accepted)

    for asked in (0.5, 0.8, 1.0):
        enough = [each for each in confidences if precision(each) >= asked]
        if not enough:
            with pytest.raises(SettingError, match=f"no confidence gives precision={asked:g} on these pictures; "):
                choose_threshold(confidences, right, precision=asked)
            continue
        found = choose_threshold(confidences, right, precision=asked)
        assert found.confidence == min(enough)
        assert found.precision == pytest.approx(precision(found.confidence))
        assert found.coverage == sum(each >= found.confidence for each in confidences) / len(confidences)


@pytest.mark.parametrize("precision", [0.0, 1.01, math.nan])
def test_a_precision_outside_its_range_is_refused(precision: float) -> None:
    with pytest.raises(SettingError, match=r"precision must be .*above 0 and at most 1, got"):
        choose_threshold([0.5], [True], precision=precision)


# Intervals


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.95]))
@settings(deadline=None)
def test_the_interval_is_scipys(counts: tuple[int, int], confidence: float) -> None:
    expected = binomtest(*counts).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*counts, confidence=confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("right", "count", "confidence"), [(3, 2, 0.9), (-1, 2, 0.9), (0, 0, 0.9), (1, 2, 1.0)])
def test_impossible_counts_have_no_interval(right: int, count: int, confidence: float) -> None:
    with pytest.raises(SettingError):
        wilson_interval(right, count, confidence=confidence)


# In a model, and on disk


class Sure(BestCheckpoint):
    """Keeps the logits of the best epoch as well."""

    def on_validation_end(self, trainer: Trainer) -> None:
        before = self.best
        super().on_validation_end(trainer)
        if self.best is not before:
            self.logits = trainer.val_logits


def batches(seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def fitted(model: Any, *callbacks: Any, val: int = 60) -> Trainer:
    trainer = Trainer(model, build_optimizer("adamw", param_groups(model, lr=3e-3)), callbacks=callbacks, device="cpu")
    trainer.fit(batches(0, 8, 8), batches(1, val // 2, val // 2), epochs=3)
    return trainer


@pytest.mark.parametrize("saved", [True, False])
def test_training_keeps_the_temperature_of_the_best_epoch(
    tiny_model: Callable[..., Any], tmp_path: Path, saved: bool
) -> None:
    best = Sure(tmp_path / "best" if saved else None, monitor="val_loss")
    model = tiny_model()
    trainer = fitted(model, best)
    assert len(trainer.val_logits[1]) == 60
    assert model.temperature == fit_temperature(*best.logits) != 1
    if saved:
        assert load_artifact(tmp_path / "best").temperature == model.temperature
    other = BestCheckpoint(monitor="val_loss")
    other.load_state_dict(best.state_dict())
    assert other.temperature == model.temperature


def test_few_validation_pictures_leave_the_temperature_at_1(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    fitted(model, BestCheckpoint(), val=10)
    assert model.temperature == 1


def test_a_temperature_changes_confidences_and_neither_logits_nor_losses(
    tiny_model: Callable[..., Any], picture_folder: Path
) -> None:
    model = tiny_model().eval()
    images, labels = batches(2, 60)[0]
    before, trainer = model(images), Trainer(model, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    plain, first = predict(model, picture_folder / "val"), trainer.evaluate([(images, labels)])
    model.temperature = 4.0
    assert torch.equal(model(images), before)
    cooler, second = predict(model, picture_folder / "val"), trainer.evaluate([(images, labels)])
    assert (first.loss, first.accuracy, first.per_class) == (second.loss, second.accuracy, second.per_class)
    assert first.ece != second.ece
    assert [each.label for each in plain] == [each.label for each in cooler]
    for one, other in zip(plain, cooler, strict=True):
        shares = torch.tensor(list(one.probabilities.values())).double()
        expected = torch.softmax(shares.log() / 4, 0)
        assert list(other.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-5)
        assert other.confidence < one.confidence


def test_a_temperature_is_saved_loaded_and_replaced_alone(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model()
    model.temperature = 1.5
    save_artifact(model, tmp_path, extra={"note": "kept"})
    assert load_artifact(tmp_path).temperature == 1.5
    before = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    save_temperature(tmp_path, 0.75)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after["transferkit"].pop("temperature") == 0.75
    assert before["transferkit"].pop("temperature") == 1.5
    assert before["transferkit"].pop("config_sha256") != after["transferkit"].pop("config_sha256")
    assert before == after
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert {each.name for each in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load_artifact(tmp_path).temperature == 0.75


def test_an_artifact_without_a_temperature_has_1(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    save_artifact(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transferkit"].pop("temperature") == 1
    config = sealed(config, weights_sha256=config["transferkit"]["weights_sha256"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_artifact(tmp_path).temperature == 1


@pytest.mark.parametrize("temperature", [0, -1.0, "hot", None, 1e999, True])
def test_an_artifact_with_an_impossible_temperature_is_refused(
    tiny_model: Callable[..., Any], tmp_path: Path, temperature: object
) -> None:
    save_artifact(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transferkit"]["temperature"] = temperature
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"transferkit.temperature is .* and must be a number from 0.001 to 1,000"):
        load_artifact(tmp_path)


def test_an_impossible_temperature_is_neither_taken_nor_saved(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model()
    save_artifact(model, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for temperature in (0, -1.0, math.nan, math.inf):
        with pytest.raises(SettingError, match=r"temperature must be .*from 0.001 to 1,000"):
            model.temperature = temperature
        with pytest.raises(OutputError, match=r"temperature cannot be saved .* must be a number from 0.001 to 1,000"):
            save_temperature(tmp_path, temperature)
    assert model.temperature == load_artifact(tmp_path).temperature == 1
    assert (tmp_path / "config.json").read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(ArtifactError, match="holds no saved model"):
        save_temperature(tmp_path / "nothing", 1.0)


def test_calibrating_a_run_changes_its_model_and_its_config(picture_folder: Path, tmp_path: Path) -> None:
    settings = {"weights": None, "epochs": 2, "policy": "full", "image_size": 32, "batch_size": 8}
    tuner = Finetuner(
        "timm/test_efficientnet", **settings, num_workers=0, device="cpu", progress=False, output_dir=tmp_path / "run"
    )
    with pytest.raises(SettingError, match="no model yet"):
        tuner.calibrate()
    tuner.fit(picture_folder)
    assert tuner.model is not None
    assert tuner.model.temperature == 1  # 18 pictures to validate on
    loss = tuner.evaluate(picture_folder)["loss"]
    found = tuner.calibrate(precision=0.2)
    assert found.count == 18
    assert found.nll_before == pytest.approx(loss, rel=1e-6)
    assert found.threshold is not None
    assert tuner.model.temperature == found.temperature != 1
    assert tuner.evaluate(picture_folder)["ece"] == pytest.approx(found.ece_after, abs=1e-6)
    assert Finetuner.load(tmp_path / "run", device="cpu", num_workers=0).calibrate(picture_folder).count == 18
    assert load_artifact(tmp_path / "run").temperature == 1
    assert tuner.calibrate(picture_folder, directory=tmp_path / "run").temperature == pytest.approx(found.temperature)
    assert load_artifact(tmp_path / "run").temperature == pytest.approx(found.temperature)
    resumed = Finetuner(
        "timm/test_efficientnet", **settings, num_workers=0, progress=False, output_dir=tmp_path / "run"
    )
    resumed.fit(picture_folder, resume="auto")  # the run has ended
    assert resumed.model is not None
    assert resumed.model.temperature == pytest.approx(found.temperature)
    again = Finetuner.load(tmp_path / "run", device="cpu", num_workers=0)
    with pytest.raises(SettingError, match="which pictures"):
        again.calibrate()
