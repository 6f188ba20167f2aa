import json
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, classification_report, log_loss
from torch.nn import functional as F

from transferkit.calibration import expected_calibration_error
from transferkit.exceptions import ArtifactError, DataError, OutputError, SettingError
from transferkit.history import MONITORED, EpochRecord, History, improves
from transferkit.metrics import evaluate_logits, topk

NUMBERS = st.floats(allow_nan=False, width=64)
RECORDS = st.builds(EpochRecord, st.integers(1, 999), NUMBERS, NUMBERS, st.floats(0, 1), st.floats(0, 1e6))
IN_A_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def record(epoch=1, train_loss=1.0, val_loss=1.0, val_accuracy=0.5, seconds=0.1):
    return EpochRecord(epoch, train_loss, val_loss, val_accuracy, seconds)


# History


@IN_A_FOLDER
@given(records=st.lists(RECORDS, max_size=5))
def test_csv_gives_back_every_figure_bit_for_bit(tmp_path, records):
    path = tmp_path / "history.csv"
    History(records).save_csv(path)
    assert History.load_csv(path) == History(records)


@IN_A_FOLDER
@given(content=st.binary(max_size=200) | st.text(alphabet='epoch,train_loss\n\r"1.0\0', max_size=80).map(str.encode))
def test_any_file_is_either_a_history_or_an_artifact_error(tmp_path, content):
    path = tmp_path / "any.csv"
    path.write_bytes(content)
    with suppress(ArtifactError):
        assert isinstance(History.load_csv(path), History)


@pytest.mark.parametrize(
    "text",
    [
        "epoch,train_loss,val_loss,val_accuracy\n1,1.0,1.0,0.5\n",
        "epoch,train_loss,val_loss,val_accuracy,seconds\n1,1.0,much,0.5,1\n",
        "epoch,train_loss,val_loss,val_accuracy,seconds\n1,1.0\n",
        "epoch,train_loss,val_loss,val_accuracy,seconds,more\n1,1.0,1.0,0.5,1,2\n",
        "",
    ],
)
def test_a_damaged_csv_is_named(tmp_path, text):
    path = tmp_path / "history.csv"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"history.csv is no history of a run"):
        History.load_csv(path)


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"history.csv is no history of a run"):
        History.load_csv(tmp_path / "history.csv")


def test_a_csv_that_fails_half_way_leaves_the_old_one(tmp_path, small_files):
    path = tmp_path / "history.csv"
    History([record()]).save_csv(path)
    with small_files(100), pytest.raises(OutputError, match=r"history.csv cannot be written"):
        History([record(epoch) for epoch in range(1, 99)]).save_csv(path)
    assert len(History.load_csv(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_history_is_read_by_figure_by_record_and_as_json():
    history = History([record(1, val_loss=0.7), record(2, val_loss=0.4)])
    assert history["val_loss"] == [0.7, 0.4]
    assert [each.epoch for each in history] == [1, 2]
    assert json.loads(json.dumps(history.to_dicts())) == [each.to_dict() for each in history]
    with pytest.raises(SettingError, match=r"no figure 'val_los' in the history; .* did you mean 'val_loss'"):
        history["val_los"]


def test_an_empty_history_has_no_best_epoch():
    with pytest.raises(SettingError, match="no epoch has ended yet"):
        History().best()


@given(st.lists(RECORDS, min_size=1, max_size=8), st.sampled_from(sorted(MONITORED)), st.sampled_from(["min", "max"]))
def test_best_is_the_extreme_of_the_figure_the_loss_and_the_order(records, monitor, mode):
    sign = 1 if mode == "min" else -1
    expected = min(records, key=lambda each: (sign * getattr(each, monitor), each.val_loss))
    best = History(records).best(monitor, mode)
    assert best is expected


@pytest.mark.parametrize("monitor", sorted(MONITORED))
def test_a_number_is_better_than_none(monitor):
    number, none = record(), replace(record(), **{monitor: math.nan})
    assert improves(number, none, monitor)
    assert not improves(none, number, monitor)
    assert not improves(none, none, monitor)


def test_an_equal_epoch_is_no_improvement():
    assert not improves(record(2), record(1))


def test_without_a_mode_each_figure_has_its_own_direction():
    assert improves(record(val_accuracy=0.6), record(val_accuracy=0.5), "val_accuracy")
    assert improves(record(val_loss=0.5), record(val_loss=0.6), "val_loss")
    assert improves(record(train_loss=0.5), record(train_loss=0.6), "train_loss")
    assert not improves(record(val_accuracy=0.6), record(val_accuracy=0.5), "val_accuracy", "min")


# Metrics


def drawn(count=40, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_figures_equal_those_of_scikit_learn(count, classes, seed):
    logits, labels = drawn(count, classes, seed)
    names = [f"class {index}" for index in range(classes)]
    result = evaluate_logits(logits, labels, names)
    said, shares = logits.argmax(1), torch.softmax(logits.double(), 1)
    assert result.accuracy == pytest.approx(accuracy_score(labels, said))
    assert result.loss == pytest.approx(log_loss(labels, shares, labels=range(classes)))
    report = classification_report(
        labels, said, labels=range(classes), target_names=names, output_dict=True, zero_division=0
    )
    assert result.count == count == sum(each["count"] for each in result.per_class.values())
    for name in names:
        own = result.per_class[name]
        expected = report[name]
        assert (own["precision"], own["recall"], own["f1"], own["count"]) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )


def test_the_interval_holds_the_accuracy_and_narrows_with_the_pictures():
    few, many = (evaluate_logits(*drawn(count), list("abcd")) for count in (40, 4000))
    for result in (few, many):
        low, high = result.accuracy_interval
        expected = binomtest(round(result.accuracy * result.count), result.count).proportion_ci(0.95, "wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high))
        assert low < result.accuracy < high
    assert np.ptp(many.accuracy_interval) < np.ptp(few.accuracy_interval) / 5


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_the_calibration_error_is_that_of_the_confidences_with_the_temperature(temperature):
    logits, labels = drawn(300)
    confidences, said = torch.softmax(logits.double() / temperature, 1).max(1)
    result = evaluate_logits(logits, labels, list("abcd"), temperature=temperature)
    assert result.ece == expected_calibration_error(confidences, said == labels)
    assert result.loss == evaluate_logits(logits, labels, list("abcd")).loss


def test_evaluation_is_json():
    result = evaluate_logits(*drawn(), ["a", "b", "c", "d"])
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_a_class_without_pictures_has_zeros():
    result = evaluate_logits(torch.tensor([[1.0, 0.0, -9.0]]), torch.tensor([0]), ["a", "b", "never"])
    assert result.per_class["never"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}


def test_huge_logits_give_a_finite_loss():
    result = evaluate_logits(torch.tensor([[1e30, 0.0]]), torch.tensor([1]), ["a", "b"])
    assert math.isfinite(result.loss)


def test_no_pictures_cannot_be_evaluated():
    with pytest.raises(DataError, match="no pictures to evaluate"):
        evaluate_logits(torch.empty(0, 2), torch.empty(0, dtype=torch.int64), ["a", "b"])


def test_loss_does_not_depend_on_how_pictures_were_batched():
    logits, labels = drawn(1000)
    sums = [F.cross_entropy(x.double(), y, reduction="sum") for x, y in zip(logits.split(7), labels.split(7))]  # noqa: B905
    assert evaluate_logits(logits, labels, list("abcd")).loss == pytest.approx(float(sum(sums)) / 1000, rel=1e-12)


@given(st.integers(1, 9))
def test_topk_is_sorted_and_never_longer_than_the_classes(k):
    shares = torch.softmax(drawn(1, 5)[0][0], 0)
    top = topk(shares, list("abcde"), k)
    order = np.argsort(-shares.numpy())[:k]
    assert top == [("abcde"[index], float(shares[index])) for index in order]


def test_topk_of_less_than_one_is_refused():
    with pytest.raises(SettingError, match="k must be 1 or more, got 0"):
        topk(torch.tensor([0.5, 0.5]), ["a", "b"], 0)
