"""What a trainer's state holds, when it is written, and that a trainer goes on from it."""

from __future__ import annotations

import copy
import functools
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from resuming import Killed, Stop, assert_equal
from transferkit.callbacks import BestCheckpoint, Callback, EarlyStopping, LRScheduler, ResumeCheckpoint, StepRecorder
from transferkit.create import adapt
from transferkit.exceptions import ArtifactError, TransferkitError
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.resume import ResumeStore
from transferkit.schedules import OneCycle
from transferkit.trainer import Trainer

UNFREEZE = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}, lr={1: 2e-3})
TRAIN = [
    (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 3) for seed in range(3)
]
VAL = TRAIN[:1]


def trainer_of(model: Any, *callbacks: Callback, policy: Any = None, lr: float = 1e-2, **settings: Any) -> Trainer:
    optimizer = build_optimizer("adamw", param_groups(model, lr=lr))
    callbacks = (LRScheduler(OneCycle()), *callbacks)
    return Trainer(model, optimizer, policy=policy, callbacks=callbacks, device="cpu", **settings)


def trained(tiny_model: Any, *callbacks: Callback, epochs: int = 2, **settings: Any) -> Trainer:
    trainer = trainer_of(tiny_model(), *callbacks, **settings)
    trainer.fit(TRAIN, VAL, epochs=epochs)
    return trainer


def test_states_keep_their_distance_but_an_interrupt_is_always_saved(tiny_model: Any, tmp_path: Path) -> None:
    checkpoint = ResumeCheckpoint(tmp_path / "often", every=1, min_interval=3600.0)
    trained(tiny_model, checkpoint)
    state = checkpoint.read()
    assert state is not None
    assert (state["history"], state["batch"]) == ([], 0)
    with pytest.raises(Interrupted):
        trained(tiny_model, Stop("on_train_batch_end", 1, 1), ResumeCheckpoint(tmp_path / "run", min_interval=3600.0))
    state = ResumeCheckpoint(tmp_path / "run").read()
    assert state is not None
    assert (len(state["history"]), state["batch"]) == (1, 1)


def test_a_trainer_with_the_best_weights_in_memory_is_resumed(tiny_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "resume"

    def callbacks() -> list[Callback]:
        return [BestCheckpoint(monitor="val_loss"), EarlyStopping(patience=2), ResumeCheckpoint(folder, every=1)]

    settings = {"epochs": 4, "policy": UNFREEZE, "mixup": 0.2}
    wanted = trained(tiny_model, BestCheckpoint(monitor="val_loss"), EarlyStopping(patience=2), **settings)
    for stop in (Stop("on_train_batch_end", 1, 2, kill=True), Stop("on_validation_start", 3)):
        trainer = trainer_of(tiny_model(seed=9), stop, *callbacks(), policy=UNFREEZE, mixup=0.2)
        if state := ResumeCheckpoint(folder).read():
            trainer.load_state_dict(state)
        else:
            trainer.model.network.load_state_dict(tiny_model().network.state_dict())
        with pytest.raises((Killed, Interrupted)):
            trainer.fit(TRAIN, VAL, epochs=4)
    trainer = trainer_of(tiny_model(seed=9), *callbacks(), policy=UNFREEZE, mixup=0.2)
    trainer.load_state_dict(ResumeCheckpoint(folder).read() or {})
    history = trainer.fit(TRAIN, VAL, epochs=4)
    assert_equal(trainer.model.network.state_dict(), wanted.model.network.state_dict())
    assert_equal(history.to_dicts(), wanted.history.to_dicts())


def test_a_state_of_other_callbacks_or_another_network_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    trained(tiny_model, EarlyStopping(), ResumeCheckpoint(tmp_path))
    state = ResumeCheckpoint(tmp_path).read()
    assert state is not None
    with pytest.raises(ArtifactError, match=r"saved with the callbacks .*EarlyStopping 1, and is to go on with"):
        trainer_of(tiny_model()).load_state_dict(state)
    with pytest.raises(ArtifactError, match=r"another network than timm/test_resnet: .* differs"):
        trainer_of(tiny_model(name="timm/test_resnet"), EarlyStopping()).load_state_dict(state)


@dataclass(repr=False)
class Saved:
    """A folder for a state, the state of a run, and a trainer that could go on with it."""

    folder: Path
    state: dict[str, Any]
    trainer: Trainer

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on with another state, written by somebody who knows how it is signed."""
        ResumeStore(self.folder).write(state, constant={}, version="odd")
        self.trainer.load_state_dict(ResumeCheckpoint(self.folder).read() or {})


def small_model() -> TransferModel:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
    )
    return adapt(network, num_classes=3, preprocessing=Preprocessing(32, 32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    checkpoint = ResumeCheckpoint(tmp_path_factory.mktemp("saved"))
    trainer = trained(small_model, StepRecorder(), EarlyStopping(), checkpoint)
    state = checkpoint.read()
    assert state is not None
    return Saved(checkpoint.store.path, state, trainer)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(tree[key], (*path, key))


ODD = st.sampled_from([..., None, True, -1, 10**30, 0.5, "", "text", [], [0], {}, {"a": 1}, {0: []}, torch.ones(3)])


@given(st.integers(0, 10**6), ODD)
@settings(deadline=None, max_examples=60)
def test_a_state_with_any_value_in_any_place_is_gone_on_with_or_refused_in_one_sentence(
    saved: Saved, place: int, value: Any
) -> None:
    state, sentence = copy.deepcopy(saved.state), ""
    ways = list(places(state))
    *way, last = ways[place % len(ways)]
    holder = functools.reduce(operator.getitem, way, state)
    holder[last] = value
    if value is ...:
        del holder[last]
    try:
        saved.go_on(state)
    except TransferkitError as error:
        sentence = str(error)
    assert sentence == "" or (sentence.isprintable() and len(sentence) < 1000)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"batch": "3"}, "the state has a str as 'batch', unlike a run that was saved"),
        ({"batch": -3}, "it is after batch -3 of 3"),
        ({"history": [{"epoch": 1}]}, "missing 4 required positional arguments"),
        ({"optimizer": {}}, "there is no 'state'"),
        ({"sums": torch.tensor(1.0)}, "0-d tensor"),
    ],
)
def test_what_no_run_has_saved_is_named(saved: Saved, changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ArtifactError, match=rf"the saved run cannot be used \(.*{wanted}.*\); start anew with"):
        saved.go_on({**saved.state, **changes})


def test_a_callback_that_has_nothing_to_remember_at_first_is_resumed(tiny_model: Any, tmp_path: Path) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.losses: dict[int, float] = {}

        def on_validation_end(self, trainer: Trainer) -> None:
            self.losses[trainer.epoch] = trainer.history.records[-1].val_loss

        def state_dict(self) -> dict[Any, Any]:
            return dict(self.losses)

        def load_state_dict(self, state: dict[Any, Any]) -> None:
            self.losses = dict(state)

    wanted, got = Losses(), Losses()
    trained(tiny_model, wanted)
    with pytest.raises(Killed):
        trained(
            tiny_model,
            Losses(),
            Stop("on_train_batch_start", 1, kill=True),
            ResumeCheckpoint(tmp_path / "run" / "resume"),
        )
    trainer = trainer_of(tiny_model(), got)
    trainer.load_state_dict(ResumeCheckpoint(tmp_path / "run" / "resume").read() or {})
    trainer.fit(TRAIN, VAL, epochs=2)
    assert got.losses == wanted.losses


def test_a_new_run_in_the_folder_of_another_does_not_take_over_its_frozen_tensors(
    tiny_model: Any, tmp_path: Path
) -> None:
    for seed in (1, 2):
        trainer = trainer_of(tiny_model(seed=seed), ResumeCheckpoint(tmp_path), policy=LinearProbe())
        trainer.fit(TRAIN, VAL, epochs=1)
        state = ResumeCheckpoint(tmp_path).read()
        assert state is not None
        assert_equal(state["network"], trainer.model.network.state_dict())


def test_a_fit_that_was_interrupted_goes_on_when_it_is_called_again(tiny_model: Any) -> None:
    stop, alone = Stop("on_train_batch_end", 0, 2), trained(tiny_model)
    trainer = trainer_of(tiny_model(), stop)
    with pytest.raises(Interrupted, match="interrupted after step 2 of 3 in epoch 1 of 2"):
        trainer.fit(TRAIN, VAL, epochs=2)
    trainer.fit(TRAIN, VAL, epochs=2)
    assert_equal(trainer.model.network.state_dict(), alone.model.network.state_dict())


class Noisy:
    """Batches whose order and augmentation come from the global generators."""

    def __len__(self) -> int:
        return len(TRAIN)

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(TRAIN)).tolist():
            images, labels = TRAIN[index]
            yield images + torch.randn_like(images) * random.random() + np.random.rand(), labels  # noqa: NPY002


def test_batches_of_ones_own_that_draw_from_global_generators_are_the_same_within_an_epoch_too(
    tiny_model: Any, tmp_path: Path
) -> None:
    wanted = trainer_of(tiny_model())
    wanted.fit(Noisy(), VAL, epochs=2)
    with pytest.raises(Interrupted):
        trainer_of(tiny_model(), Stop("on_train_batch_end", 1, 2), ResumeCheckpoint(tmp_path)).fit(
            Noisy(), VAL, epochs=2
        )
    torch.rand(7)
    checkpoint = ResumeCheckpoint(tmp_path)
    resumed = trainer_of(tiny_model(), checkpoint)
    resumed.load_state_dict(checkpoint.read() or {})
    resumed.fit(Noisy(), VAL, epochs=2)
    assert_equal(resumed.model.network.state_dict(), wanted.model.network.state_dict())
    assert_equal(resumed.history.to_dicts(), wanted.history.to_dicts())
