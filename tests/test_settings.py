"""Every number that can be set has a range and is refused by name outside it, as are settings that do not agree."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import transferkit
from transferkit import Finetuner
from transferkit.calibration import choose_threshold
from transferkit.check import check_data
from transferkit.cli import app
from transferkit.exceptions import DataError, SettingError, TransferkitError, UnknownStageError
from transferkit.freezing import FreezeUntil, FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.heads import Head
from transferkit.loading import loader
from transferkit.lr_finder import find_lr
from transferkit.optim import build_optimizer, param_groups
from transferkit.prediction import predict
from transferkit.preprocessing import Preprocessing
from transferkit.ranges import check_number, check_whole_number
from transferkit.sampling import EpochSampler
from transferkit.schedules import Progress
from transferkit.sources import PictureData
from transferkit.trainer import Trainer
from transferkit.transforms import cifar_train

BATCHES = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
PICTURES = [(Image.new("RGB", (8, 8)), 0), (Image.new("RGB", (8, 8)), 1)]
SMALL = Preprocessing(8, 8)


@cache
def plain_model() -> transferkit.TransferModel:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    return transferkit.adapt(network, num_classes=2, preprocessing=SMALL)


def trainer(**settings: Any) -> Trainer:
    model = plain_model()
    optimizer = build_optimizer("sgd", param_groups(model, lr=0.1))
    return Trainer(model, optimizer, device="cpu", **settings)


def sweep(**settings: Any) -> None:
    model = plain_model()
    find_lr(model, build_optimizer("sgd", param_groups(model, lr=0.1)), BATCHES, device="cpu", **settings)


# What is called with one setting, and what else it needs. Those that only store may be called with good values too.
STORES: dict[str, Callable[..., Any]] = {
    "ActivationCache": transferkit.ActivationCache,
    "Constant": transferkit.Constant,
    "Cosine": transferkit.Cosine,
    "EMA": transferkit.EMA,
    "EarlyStopping": transferkit.EarlyStopping,
    "EpochSampler": lambda **given: EpochSampler(**{"count": 2_000_000, "shuffle": True, "world_size": 9, **given}),
    "ExponentialDecay": transferkit.ExponentialDecay,
    "Finetuner": lambda **given: Finetuner("torchvision/resnet18", **given),
    "FreezeFirst": transferkit.FreezeFirst,
    "GradualUnfreezing": transferkit.GradualUnfreezing,
    "Head": lambda **given: Head(**{"num_classes": 2, **given}),
    "OneCycle": transferkit.OneCycle,
    "Plateau": transferkit.Plateau,
    "Preprocessing": lambda **given: Preprocessing(**{"size": 1, "resize_size": 1_048_576, **given}),
    "Progress": lambda **given: Progress(**{"step": 1, "steps": 1, "steps_per_epoch": 1, **given}),
    "ResumeCheckpoint": lambda **given: transferkit.ResumeCheckpoint("nowhere", **given),
    "StepDecay": transferkit.StepDecay,
    "TrainLast": transferkit.TrainLast,
    "Trainer": trainer,
    "cifar_train": lambda **given: cifar_train(SMALL, **given),
    "param_groups": lambda **given: param_groups(plain_model(), **{"lr": 0.1, **given}),
}
WORKS: dict[str, Callable[..., Any]] = {
    "Trainer.fit": lambda **given: trainer().fit(BATCHES, BATCHES, **given),
    "adapt": lambda **given: transferkit.adapt(nn.Linear(1, 2), **{"num_classes": 2, **given}),
    "check_data": lambda **given: check_data(Path(__file__).parent, remember=False, **given),
    "choose_threshold": lambda **given: choose_threshold([0.9], [True], **given),
    "create_model": lambda **given: transferkit.create_model("no/such", **{"num_classes": 2, **given}),
    "find_lr": sweep,
    "image_folder": lambda **given: transferkit.image_folder(Path(__file__).parent, **given),
    "loader": lambda **given: loader(PICTURES, torch.clone, **{"batch_size": 1, "train": True, **given}),
    "predict": lambda **given: predict(plain_model(), PICTURES[0][0], **given),
}


@dataclass(frozen=True)
class Rule:
    """Values that a setting takes, and values that it does not."""

    good: Sequence[Any]
    bad: Sequence[Any]


def whole(least: int, most: int | None = None, *, none: bool = False) -> Rule:
    good = [least, np.int64(least), *([None] if none else []), *([] if most is None else [most])]
    bad = [least - 1, float(least), least + 0.5, True, str(least), [least], math.nan, math.inf, Path("x")]
    return Rule(good, [*bad, *([] if none else [None]), *([] if most is None else [most + 1, 10**30])])


def real(inside: Sequence[float], outside: Sequence[float] = (), *, none: bool = False) -> Rule:
    good = [*inside, np.float32(inside[0]), *([None] if none else [])]
    bad = [*outside, math.nan, math.inf, -math.inf, 10**400, True, str(inside[0]), [inside[0]], 1j]
    return Rule(good, [*bad, *([] if none else [None])])


SEED = whole(0, 2**63 - 1)
CLASSES = Rule([1], [value for value in whole(1, 1_000_000).bad if value is not None])
POSITIVE = [1e-9, 1, 1e30], [0, -0.1]
LEAST_0 = [0, 0.0, 1e30], [-1e-9, -1]
FROM_0_TO_1 = [0, 0.5, 1], [-1e-9, 1.001]
ABOVE_0_TO_1 = [1e-9, 1], [0, 1.001]
BELOW_1 = [0, 0.999], [-1e-9, 1, 1.5]
BETWEEN_0_AND_1 = [0.001, 0.999], [0, 1, 1.5, -0.1]
WEIGHTS = Rule(
    [None, [1.0, 2], (0.1, np.float64(3))], [[1.0, 0.0], [1.0, -1], [1.0, math.nan], [True, 1.0], ["1", 1.0], 3.0]
)
BUDGET = Rule(
    [None, 0, "256MiB", "1.5GB", np.int64(7)],
    ["12 bananas", "", "GB", "-1GB", "infGB", "nanGB", -1, 0.5, math.nan, True, [1]],
)

RULES: dict[str, Rule] = {
    "ActivationCache.budget": BUDGET,
    "ActivationCache.views": whole(0, none=True),
    "Constant.warmup_epochs": real([0, 0.5, 1_000_000], [-0.1, 1_000_001]),
    "Cosine.final": real(*FROM_0_TO_1),
    "Cosine.warmup_epochs": real([0, 0.5, 1_000_000], [-0.1, 1_000_001]),
    "EMA.decay": real(*BELOW_1),
    "EarlyStopping.patience": whole(1),
    "EpochSampler.rank": Rule([0, 8, np.int64(1)], [-1, 9, 1.0, True, "1", None]),
    "EpochSampler.seed": SEED,
    "EpochSampler.world_size": Rule([1, 9, 2_000_000], [0, -1, 1.0, True, "1", None]),
    "ExponentialDecay.every": whole(1),
    "ExponentialDecay.gamma": real(*ABOVE_0_TO_1),
    "Finetuner.accumulate": whole(1, 1_000_000),
    "Finetuner.batch_size": whole(1, 1_000_000),
    "Finetuner.cache_budget": BUDGET,
    "Finetuner.checkpoint_every": whole(1, none=True),
    "Finetuner.checkpoint_interval": real(*LEAST_0),
    "Finetuner.class_weights": WEIGHTS,
    "Finetuner.clip_grad_norm": real(*POSITIVE, none=True),
    "Finetuner.cutmix": real(*LEAST_0),
    "Finetuner.dropout": real(*BELOW_1),
    "Finetuner.ema": real(*BELOW_1, none=True),
    "Finetuner.epochs": whole(1, 1_000_000),
    "Finetuner.head_lr_multiplier": real(*POSITIVE, none=True),
    "Finetuner.hidden_size": whole(1, 1_000_000, none=True),
    "Finetuner.image_size": whole(1, 16_384, none=True),
    "Finetuner.in_chans": whole(1, 1_000, none=True),
    "Finetuner.label_smoothing": real(*BELOW_1, none=True),
    "Finetuner.layer_decay": real(*ABOVE_0_TO_1, none=True),
    "Finetuner.lr": real(*POSITIVE, none=True),
    "Finetuner.mixup": real(*LEAST_0),
    "Finetuner.num_workers": whole(0, 1_024, none=True),
    "Finetuner.patience": whole(1, none=True),
    "Finetuner.seed": SEED,
    "Finetuner.val_fraction": real(*BETWEEN_0_AND_1),
    "Finetuner.views": whole(0, none=True),
    "Finetuner.weight_decay": real(*LEAST_0, none=True),
    "FreezeFirst.count": whole(0),
    "GradualUnfreezing.every": whole(1),
    "Head.dropout": real(*BELOW_1),
    "Head.hidden_size": whole(1, 1_000_000, none=True),
    "Head.num_classes": whole(1, 1_000_000),
    "OneCycle.final": real(*FROM_0_TO_1),
    "OneCycle.peak_at": real(*FROM_0_TO_1),
    "OneCycle.start": real(*FROM_0_TO_1),
    "Plateau.factor": real(*BETWEEN_0_AND_1),
    "Plateau.min_factor": real(*FROM_0_TO_1),
    "Plateau.patience": whole(0),
    "Plateau.threshold": real(*BELOW_1),
    "Preprocessing.mean": Rule(
        [(0.5, 0, -1)], [(0.5, 0.5), (), (math.nan,) * 3, (math.inf,) * 3, ("a",) * 3, (True,) * 3]
    ),
    "Preprocessing.resize_size": whole(1, 1_048_576),
    "Preprocessing.size": whole(1, 16_384),
    "Preprocessing.std": Rule(
        [(0.5, 1, 2)], [(0.5, 0.5), (0, 1, 1), (-1, 1, 1), (math.nan,) * 3, ("a",) * 3, (True,) * 3]
    ),
    "Progress.step": Rule([0, 1], [-1, 2, 0.5, True, "1", None]),
    "Progress.steps": whole(1),
    "Progress.steps_per_epoch": whole(1),
    "ResumeCheckpoint.every": whole(1, none=True),
    "ResumeCheckpoint.min_interval": real(*LEAST_0),
    "StepDecay.every": whole(1),
    "StepDecay.gamma": real(*ABOVE_0_TO_1),
    "TrainLast.count": whole(1),
    "Trainer.accumulate": whole(1, 1_000_000),
    "Trainer.class_weights": WEIGHTS,
    "Trainer.clip_grad_norm": real(*POSITIVE, none=True),
    "Trainer.cutmix": real(*LEAST_0),
    "Trainer.fit.epochs": whole(1, 1_000_000),
    "Trainer.label_smoothing": real(*BELOW_1),
    "Trainer.mixup": real(*LEAST_0),
    "Trainer.seed": SEED,
    "adapt.dropout": real(*BELOW_1),
    "adapt.hidden_size": whole(1, 1_000_000, none=True),
    "adapt.num_classes": CLASSES,
    "adapt.seed": whole(0, 2**63 - 1, none=True),
    "check_data.seed": SEED,
    "check_data.val_fraction": real(*BETWEEN_0_AND_1),
    "cifar_train.jitter": real(*LEAST_0),
    "cifar_train.rotation": real([0, 180], [-1, 180.1]),
    "choose_threshold.precision": real(*ABOVE_0_TO_1),
    "create_model.dropout": real(*BELOW_1),
    "create_model.hidden_size": whole(1, 1_000_000, none=True),
    "create_model.image_size": whole(1, 16_384, none=True),
    "create_model.in_chans": whole(1, 1_000, none=True),
    "create_model.num_classes": CLASSES,
    "create_model.seed": whole(0, 2**63 - 1, none=True),
    "find_lr.highest": real([1.0], [0, -1, 1e-9]),
    "find_lr.lowest": real([1e-9], [0, -1, 11]),
    "find_lr.seed": SEED,
    "find_lr.steps": whole(10, 1_000_000),
    "image_folder.seed": SEED,
    "image_folder.val_fraction": real(*BETWEEN_0_AND_1),
    "loader.batch_size": whole(1, 1_000_000),
    "loader.num_workers": whole(0, 1_024),
    "loader.rank": Rule([0], [-1, 1, 1.0, True, "1", None]),
    "loader.seed": SEED,
    "loader.world_size": Rule([1], [0, -1, 1.0, True, "1", None]),
    "param_groups.head_lr_multiplier": real(*POSITIVE),
    "param_groups.layer_decay": real(*ABOVE_0_TO_1),
    "param_groups.lr": real(*POSITIVE),
    "param_groups.weight_decay": real(*LEAST_0),
    "predict.batch_size": whole(1, 1_000_000),
    "predict.min_confidence": real(*FROM_0_TO_1),
    "predict.num_workers": whole(0, 1_024),
}


def numeric(thing: Callable[..., Any]) -> Iterator[str]:
    """Yield the parameters whose annotation speaks of numbers."""
    for name, parameter in inspect.signature(thing).parameters.items():
        annotation = str(parameter.annotation)
        if not annotation.startswith("Callable") and re.search(r"\b(int|float)\b", annotation):
            yield name


def settings_of(owner: str) -> set[str]:
    places = {"check_data": "check", "EpochSampler": "sampling", "Head": "heads", "Progress": "schedules"}
    places |= {"choose_threshold": "calibration", "cifar_train": "transforms"}
    home = importlib.import_module("transferkit" + (f".{places[owner]}" if owner in places else ""))
    thing = getattr(home, owner.partition(".")[0])
    for name in owner.split(".")[1:]:
        thing = getattr(thing, name)
    return {f"{owner}.{name}" for name in numeric(thing)}


@pytest.mark.parametrize("owner", [*STORES, *WORKS])
def test_every_number_that_can_be_set_has_a_rule(owner: str) -> None:
    """A new one fails here until it has a range."""
    ruled = {name for name in RULES if name.rpartition(".")[0] == owner}
    without = {"EpochSampler.count", "EpochSampler.labels"}  # what is counted, not what is chosen
    assert ruled == settings_of(owner) - without


def test_every_schedule_policy_and_callback_with_numbers_is_in_the_table() -> None:
    for module in ("schedules", "freezing", "callbacks"):
        home = importlib.import_module(f"transferkit.{module}")
        classes = [getattr(home, name) for name in home.__all__ if inspect.isclass(getattr(home, name))]
        owners = {each.__name__ for each in classes if set(numeric(each))}
        # an lr is checked for each phase, below
        assert owners - {"ScheduledUnfreeze"} <= set(STORES), module


@pytest.mark.parametrize("name", RULES)
def test_a_number_outside_its_range_is_refused_with_its_name_and_value(name: str) -> None:
    owner, _, setting = name.rpartition(".")
    for value in RULES[name].bad:
        with pytest.raises(SettingError) as refused:
            {**STORES, **WORKS}[owner](**{setting: value})
        message = str(refused.value)
        known = {"budget": "cache_budget"}.get(setting, setting)
        assert known in message, (value, message)
        assert re.search("must be|can be|need", message), (value, message)
        assert "\n" not in message
        assert len(message) < 250


@pytest.mark.parametrize("name", [name for name in RULES if name.rpartition(".")[0] in STORES])
def test_a_number_within_its_range_is_taken(name: str) -> None:
    owner, _, setting = name.rpartition(".")
    for value in RULES[name].good:
        STORES[owner](**{setting: value})


def test_phases_begin_at_whole_numbers_and_have_learning_rates_above_0() -> None:
    for begin in (-1, 0.5, "1", math.nan):
        with pytest.raises(SettingError, match=r"a phase begins must be (a whole number, )?0 or more, got"):
            ScheduledUnfreeze({0: LinearProbe(), begin: FullFinetune()})  # type: ignore[dict-item]
    for lr in (0, -1.0, math.nan, math.inf, True, "0.1"):
        with pytest.raises(SettingError, match=r"the lr of the phase at epoch 0 must be .*above 0, got"):
            ScheduledUnfreeze({0: LinearProbe()}, lr={0: lr})  # type: ignore[dict-item]


# The two checks, whatever the number

KIND = "n must be a whole number"

ANYTHING = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.none(), st.complex_numbers())


@given(value=ANYTHING, least=st.integers(-50, 50), size=st.none() | st.integers(0, 50))
def test_a_whole_number_is_taken_if_and_only_if_it_is_one_and_within_its_range(
    value: Any, least: int, size: int | None
) -> None:
    most = None if size is None else least + size
    fits = type(value) is int and value >= least and (most is None or value <= most)
    if fits:
        check_whole_number("it", value, at_least=least, at_most=most)
        return
    with pytest.raises(SettingError, match=r"^it must be "):
        check_whole_number("it", value, at_least=least, at_most=most)


@given(value=ANYTHING, low=st.floats(-10, 0), high=st.floats(0, 10), open_below=st.booleans(), open_above=st.booleans())
def test_a_number_is_taken_if_and_only_if_it_is_finite_and_within_its_range(
    value: Any, low: float, high: float, open_below: bool, open_above: bool
) -> None:
    bounds = {"above" if open_below else "at_least": low, "below" if open_above else "at_most": high}
    fits = type(value) in (int, float) and low <= value <= high
    fits = fits and not (open_below and value == low) and not (open_above and value == high)
    if fits:
        check_number("it", value, **bounds)
        return
    with pytest.raises(SettingError, match=r"^it must be "):
        check_number("it", value, **bounds)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_whole_number("n", 0, at_least=1), "n must be 1 or more, got 0"),
        (lambda: check_whole_number("n", 5.0, at_least=1), f"{KIND}, 1 or more, got 5.0"),
        (lambda: check_whole_number("n", 0, at_least=1, at_most=9000), "n must be from 1 to 9,000, got 0"),
        (lambda: check_whole_number("n", True, at_least=1, or_none=True), f"{KIND}, 1 or more, or None, got True"),
        (lambda: check_whole_number("n", 0, at_least=1, hint="2 is usual"), "n must be 1 or more, got 0; 2 is usual"),
        (lambda: check_number("x", 1, at_least=0, below=1), "x must be at least 0 and below 1, got 1"),
        (lambda: check_number("x", 0, above=0, at_most=1), "x must be above 0 and at most 1, got 0"),
        (lambda: check_number("x", 2, at_least=0, at_most=1), "x must be from 0 to 1, got 2"),
        (lambda: check_number("x", math.inf, above=0), "x must be a finite number, above 0, got inf"),
        (lambda: check_number("x", "a" * 99), "x must be a number, got 'aaaaaaaaaaaa...aaaaaaaaaaaaa'"),
        (lambda: check_number("x", math.nan), "x must be a finite number, got nan"),
        (lambda: check_number("x", None, above=0), "x must be a number, above 0, got None"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_with_name_range_and_value(check: Callable[[], None], message: str) -> None:
    with pytest.raises(SettingError) as refused:
        check()
    assert str(refused.value) == message


# The settings of a run


def test_every_setting_is_explained() -> None:
    explained = set(re.findall(r"^        (\w+): ", Finetuner.__doc__ or "", re.MULTILINE))
    assert explained - {"SettingError"} == {each.name for each in fields(Finetuner)}


def test_settings_that_were_changed_after_construction_are_checked_when_they_are_used(tmp_path: Path) -> None:
    tuner = Finetuner("torchvision/resnet18")
    tuner.epochs = 2.5  # type: ignore[assignment]
    for use in (tuner.fit, tuner.find_lr):
        with pytest.raises(SettingError, match=r"epochs must be a whole number, from 1 to 1,000,000, got 2\.5"):
            use(tmp_path / "missing")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 4, "mixup": 0.2}, "views would have no effect, since mixup and cutmix mix pictures .* leave out"),
        ({"cache_dir": "kept", "cutmix": 1.0}, "cache_dir would have no effect, since mixup and cutmix mix"),
        ({"cache_dir": "kept", "cache_budget": "1GB", "views": 0}, "cache_budget and cache_dir would .* views=0 keeps"),
        ({"views": 2, "policy": "full"}, r"views would have no effect, since FullFinetune\(\) freezes nothing"),
        ({"views": 2, "small_images": "stem"}, r"views would have no effect, since FullFinetune\(\) freezes nothing"),
        ({"views": 2, "shard": True}, "views would have no effect, since shard spreads the network"),
        ({"engine": "onnxruntime", "shard": True}, "engine='onnxruntime' computes with a copy .* use engine='eager'"),
        ({"balanced": True, "class_weights": "balanced"}, "both even out the classes; choose one"),
        ({"image_size": 32, "preprocessing": SMALL}, "image_size=32 and preprocessing for 8 contradict each other"),
        ({"in_chans": 1, "preprocessing": SMALL}, "in_chans=1 and preprocessing for 3 contradict each other"),
        ({"in_chans": 2, "train_preset": "trivial_augment"}, "2 channels have no colours to change; choose .* light"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Finetuner("torchvision/resnet18", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"views": 0, "mixup": 0.2},
        {"views": 0, "policy": "full"},
        {"views": 3},
        {"views": 3, "policy": "gradual"},
        {"cache_dir": "kept", "policy": "until:stage3"},
        {"cache_budget": 0},
        {"patience": 9, "epochs": 3},
        {"image_size": 8, "in_chans": 3, "preprocessing": SMALL},
    ],
    ids=str,
)
def test_settings_that_go_together_are_taken(settings: dict[str, Any]) -> None:
    Finetuner("torchvision/resnet18", **settings)


# What the data or the network has to tell: before the network is loaded, or before anything is trained

NOWHERE = "timm/no_such_network"


def data_of(*labels: int, names: Sequence[str] = ("a", "b")) -> PictureData:
    source = [(Image.new("RGB", (40, 40), (60 * label, 0, index)), label) for index, label in enumerate(labels)]
    return PictureData(source, source, tuple(names))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (data_of(0, 0, names=["a"]), {}, DataError, "only one class, 'a', in the data; a classifier needs two or more"),
        (data_of(0, 0, names=["a"]), {"cutmix": 1.0}, DataError, "only one class"),
        (data_of(names=[]), {}, DataError, "no class in the data"),
        (data_of(0, 1), {"class_weights": [1.0, 2.0, 3.0]}, SettingError, "one weight for each of 2 classes, got 3"),
        (data_of(0, 0), {"class_weights": "balanced"}, DataError, "there are none of 'b'; add some, or give a list"),
        ("missing", {"device": "cuda:77"}, SettingError, "device='cuda:77' is not there; this machine has"),
    ],
)
def test_what_the_data_tells_is_told_before_the_network_is_loaded(
    data: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Finetuner(NOWHERE, **settings).fit(data)


TINY = {"weights": None, "image_size": 32, "num_workers": 0, "progress": False, "device": "cpu", "epochs": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5}, "batch_size=5 is more than the 4 training pictures, so that an epoch is a single step"),
        (
            {"batch_size": 2, "accumulate": 3},
            "accumulate=3 is more than the 2 batches of an epoch, so that an epoch is",
        ),
        ({"batch_size": 4}, None),
        ({"batch_size": 2, "accumulate": 2}, None),
    ],
)
def test_more_in_a_step_than_there_is_in_an_epoch_is_said_and_trained_on(
    settings: dict[str, Any], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "transferkit"):
        history = Finetuner("timm/test_efficientnet", **{**TINY, **settings}).fit(data_of(0, 1, 0, 1))
    assert len(history) == 1
    said = [entry for entry in caplog.messages if "takes more steps" in entry]
    assert [entry[: len(message or "")] for entry in said] == ([] if message is None else [message])


@pytest.mark.parametrize("policy", ["until:stage99", ScheduledUnfreeze({0: LinearProbe(), 3: FreezeUntil("stage99")})])
def test_a_stage_that_does_not_exist_is_told_with_the_nearest_before_anything_is_trained(policy: Any) -> None:
    tuner = Finetuner("timm/test_efficientnet", **{**TINY, "policy": policy, "epochs": 4})
    with pytest.raises(UnknownStageError, match=r"no stage named 'stage99'; .* did you mean 'stage"):
        tuner.fit(data_of(0, 1))
    assert len(tuner.history) == 0


def test_how_many_pictures_to_draw_is_checked_before_a_model_is_asked_for() -> None:
    with pytest.raises(SettingError, match=r"count must be a whole number, 1 or more, got 2\.5"):
        Finetuner("torchvision/resnet18").plot_predictions(count=2.5)  # type: ignore[arg-type]


# The terminal

RENAMED = {"workers": "num_workers"}


def numeric_options(command: Callable[..., Any]) -> Iterator[str]:
    """Yield the options and arguments of a command that are numbers, under the names of its function."""
    for name, kind in get_type_hints(command).items():
        if {int, float} & {kind, *get_args(kind)}:
            yield name


COMMANDS = {str(info.callback.__name__): info.callback for info in app.registered_commands if info.callback}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_a_command_is_a_setting_with_a_range(command: str) -> None:
    ruled = {name.rpartition(".")[2] for name in RULES}
    by_the_terminal = {"top"}  # typer's own min
    found = {RENAMED.get(name, name) for name in numeric_options(COMMANDS[command])}
    assert found - ruled - by_the_terminal == set()
    assert len(found) > 10 or command != "finetune"


@pytest.mark.parametrize("value", ["-1", "nan"])
@pytest.mark.parametrize("name", list(numeric_options(COMMANDS["finetune"])))
def test_a_wrong_number_in_the_terminal_ends_with_2_and_names_the_option(name: str, value: str, tmp_path: Path) -> None:
    option = f"--{name.replace('_', '-')}"
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "missing"), f"{option}={value}"])
    if isinstance(result.exception, TransferkitError):  # the command prints its sentence and ends with 2
        assert isinstance(result.exception, SettingError)
        assert RENAMED.get(name, name) in str(result.exception)
    else:
        assert result.exit_code == 2
        assert option in result.stderr
