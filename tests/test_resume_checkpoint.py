"""What a trainer's state holds, when it is written, and that a trainer goes on from it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resuming import Killed, Stop, assert_equal
from transferkit.callbacks import BestCheckpoint, Callback, EarlyStopping, LRScheduler, ResumeCheckpoint
from transferkit.exceptions import ArtifactError
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.interrupts import Interrupted
from transferkit.optim import build_optimizer, param_groups
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
