"""The record of every step equals what the trainer did, also where a run was broken off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resuming import Killed, Stop
from transferkit.callbacks import Callback, LRScheduler, ResumeCheckpoint, StepRecorder
from transferkit.exceptions import CallbackError
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.plots import plot_lrs, plot_steps
from transferkit.schedules import Cosine
from transferkit.trainer import Trainer

SIZES = (4, 2, 3, 4)
POLICY = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune(), 2: LinearProbe()})

Make = Callable[..., TransferModel]


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


class Watch(Callback):
    """Keeps the loss of each batch and the rates of all groups, as a callback that may wait for the device."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[str, float | None]] = []
        self._before = torch.zeros(2)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self._before = torch.zeros(2)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        loss, weight = (trainer.loss_sums - self._before).tolist()
        self.losses.append(loss / weight)
        self._before = trainer.loss_sums.clone()
        rates = {group["stage"]: group["lr"] for group in trainer.optimizer.param_groups}
        self.rates.append({name: None if name in trainer.model.frozen else lr for name, lr in rates.items()})


def trainer_of(model: TransferModel, *callbacks: Callback, **settings: Any) -> Trainer:
    groups = param_groups(model, lr=0.01, weight_decay=0.1, layer_decay=0.5)
    callbacks = (LRScheduler(Cosine()), *callbacks)
    return Trainer(model, build_optimizer("sgd", groups), callbacks=callbacks, device="cpu", policy=POLICY, **settings)


def fitted(model: TransferModel, *callbacks: Callback, **settings: Any) -> Trainer:
    trainer = trainer_of(model, *callbacks, **settings)
    trainer.fit(batches(*SIZES), batches(4), epochs=3)
    return trainer


def test_the_losses_of_an_epochs_steps_have_its_mean(tiny_model: Make) -> None:
    recorder = StepRecorder()
    trainer = fitted(tiny_model(), recorder)
    assert len(recorder.losses) == trainer.step == 12
    for epoch, record in enumerate(trainer.history):
        losses = recorder.losses[4 * epoch : 4 * epoch + 4]
        mean = sum(loss * size for loss, size in zip(losses, SIZES, strict=True)) / sum(SIZES)
        assert mean == pytest.approx(record.train_loss, rel=1e-5)


def test_the_first_loss_is_that_of_the_model_before_training(tiny_model: Make) -> None:
    recorder, model = StepRecorder(), tiny_model()
    images, labels = batches(*SIZES)[0]
    with torch.no_grad():  # the head alone trains, so dropout and statistics are those of eval mode
        expected = torch.nn.functional.cross_entropy(tiny_model().eval()(images), labels)
    fitted(model, recorder)
    assert recorder.losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_trainers_sums_tell_a_callback_each_loss_and_the_epochs_mean(tiny_model: Make) -> None:
    recorder, watch = StepRecorder(), Watch()
    trainer = fitted(tiny_model(), recorder, watch)
    assert watch.losses == pytest.approx(recorder.losses, rel=1e-6)
    epochs = [watch.losses[first : first + 4] for first in (0, 4, 8)]
    means = [sum(loss * size for loss, size in zip(each, SIZES, strict=True)) / sum(SIZES) for each in epochs]
    assert means == pytest.approx(trainer.history["train_loss"], rel=1e-5)


def test_a_step_over_several_batches_is_one_loss(tiny_model: Make) -> None:
    recorder = StepRecorder()
    trainer = fitted(tiny_model(), recorder, accumulate=3)
    assert len(recorder.losses) == trainer.step == 6
    mean = (recorder.losses[0] * sum(SIZES[:3]) + recorder.losses[1] * SIZES[3]) / sum(SIZES)
    assert mean == pytest.approx(trainer.history.records[0].train_loss, rel=1e-5)


def test_rates_are_those_of_each_step_and_none_where_a_stage_is_frozen(tiny_model: Make) -> None:
    recorder, watch = StepRecorder(), Watch()
    trainer = fitted(tiny_model(), recorder, watch)
    assert list(recorder.lrs) == list(trainer.model.stage_names)
    for name, rates in recorder.lrs.items():
        assert rates == [seen[name] for seen in watch.rates]
    assert recorder.lrs["stem"][:4] == [None] * 4
    assert recorder.lrs["stem"][4] is not None
    assert recorder.unfreeze_steps == [5]


def test_what_is_recorded_can_be_drawn(tiny_model: Make) -> None:
    recorder = StepRecorder()
    fitted(tiny_model(), recorder)
    assert len(plot_steps(recorder.losses, unfreeze_steps=recorder.unfreeze_steps).axes[0].lines) == 3
    assert plot_lrs(recorder.lrs, unfreeze_steps=recorder.unfreeze_steps).axes


@pytest.mark.parametrize(("epoch", "batch"), [(0, 2), (1, 4)])
def test_a_run_that_is_interrupted_and_goes_on_has_the_same_record(tiny_model: Make, epoch: int, batch: int) -> None:
    whole = StepRecorder()
    fitted(tiny_model(), whole)
    first = StepRecorder()
    trainer = trainer_of(tiny_model(), first, Stop("on_train_batch_end", epoch, batch))
    with pytest.raises(Interrupted):
        trainer.fit(batches(*SIZES), batches(4), epochs=3)
    state = trainer.state_dict()
    assert json.loads(json.dumps(first.state_dict())) == first.state_dict()
    second = StepRecorder()
    other = trainer_of(tiny_model(), second)
    other.load_state_dict(state)
    other.fit(batches(*SIZES), batches(4), epochs=3)
    assert second.lrs == whole.lrs
    assert second.losses == whole.losses

    trainer.fit(batches(*SIZES), batches(4), epochs=3)  # and the interrupted one can go on itself
    assert (first.losses, first.lrs) == (whole.losses, whole.lrs)


def test_a_killed_run_goes_on_from_the_disk_with_the_same_record(tiny_model: Make, tmp_path: Path) -> None:
    whole = StepRecorder()
    fitted(tiny_model(), whole)
    stop = Stop("on_train_batch_end", 1, 3, kill=True)
    trainer = trainer_of(tiny_model(), StepRecorder(), stop, ResumeCheckpoint(tmp_path / "run" / "resume", every=2))
    with pytest.raises(Killed):
        trainer.fit(batches(*SIZES), batches(4), epochs=3)
    stop.restore(tmp_path / "run")
    recorder, checkpoint = StepRecorder(), ResumeCheckpoint(tmp_path / "run" / "resume", every=2)
    other = trainer_of(tiny_model(), recorder, checkpoint)
    other.load_state_dict(checkpoint.read())
    other.fit(batches(*SIZES), batches(4), epochs=3)
    assert (recorder.losses, recorder.lrs) == (whole.losses, whole.lrs)


class Fail(Callback):
    """Breaks one fit off by an error."""

    armed = True

    def on_train_batch_end(self, trainer: Trainer) -> None:
        if self.armed and trainer.epoch == 1 and trainer.batch == 2:
            self.armed = False
            raise ZeroDivisionError


def test_steps_of_an_epoch_that_begins_again_after_an_error_are_not_there_twice(tiny_model: Make) -> None:
    recorder = StepRecorder()
    trainer = trainer_of(tiny_model(), recorder, Fail())
    with pytest.raises(CallbackError, match="Fail"):
        trainer.fit(batches(*SIZES), batches(4), epochs=3)
    trainer.fit(batches(*SIZES), batches(4), epochs=3)
    assert len(recorder.losses) == 12
    assert all(len(rates) == 12 for rates in recorder.lrs.values())


def test_a_recorder_that_joins_later_knows_which_steps_it_has_not_seen(tiny_model: Make) -> None:
    trainer = trainer_of(tiny_model())
    trainer.fit(batches(*SIZES), batches(4), epochs=1)
    recorder = StepRecorder()
    trainer.callbacks.append(recorder)
    trainer.fit(batches(*SIZES), batches(4), epochs=2)
    losses, rates = torch.tensor(recorder.losses), torch.tensor(recorder.lrs["stem"])
    assert losses.isnan().tolist() == rates.isnan().tolist() == [True] * 4 + [False] * 4
    assert recorder.unfreeze_steps == []
