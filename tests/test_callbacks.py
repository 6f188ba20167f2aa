import csv
import io
import json
import logging
import math
import traceback
from contextlib import ExitStack

import pytest
import torch
from rich.console import Console

import transferkit.callbacks
from transferkit.activations import ActivationCache
from transferkit.callbacks import (
    EMA,
    HOOKS,
    BestCheckpoint,
    Callback,
    CSVLogger,
    EarlyStopping,
    LRScheduler,
    Progress,
    ResumeCheckpoint,
    StepRecorder,
    Tracker,
    UnfreezeLogger,
)
from transferkit.checkpoint import load_artifact
from transferkit.exceptions import CallbackError, OutputError, SettingError
from transferkit.freezing import FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.history import EpochRecord, History
from transferkit.loading import loader
from transferkit.optim import build_optimizer, param_groups
from transferkit.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    OneCycle,
    Plateau,
    Progress as StepsDone,
    StepDecay,
)
from transferkit.trainer import Trainer

MAKE = {
    "EMA": lambda folder: EMA(),
    "BestCheckpoint": lambda folder: BestCheckpoint(folder / "best"),
    "CSVLogger": lambda folder: CSVLogger(folder / "deep" / "history.csv"),
    "Callback": lambda folder: Callback(),
    "EarlyStopping": lambda folder: EarlyStopping(patience=1),
    "LRScheduler": lambda folder: LRScheduler(Cosine()),
    "Progress": lambda folder: Progress(Console(file=io.StringIO())),
    "ResumeCheckpoint": lambda folder: ResumeCheckpoint(folder / "resume"),
    "StepRecorder": lambda folder: StepRecorder(),
    "Tracker": lambda folder: Tracker("tensorboard", folder),
    "UnfreezeLogger": lambda folder: UnfreezeLogger(),
}
EVERY = pytest.mark.parametrize("name", [name for name in transferkit.callbacks.__all__ if name != "HOOKS"])


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def trainer_of(model, *callbacks, groups=None, **settings):
    groups = param_groups(model, lr=0.01, weight_decay=0.1, layer_decay=0.5) if groups is None else groups
    return Trainer(model, build_optimizer("sgd", groups), callbacks=callbacks, device="cpu", **settings)


def fitted(model, *callbacks, epochs=2, **settings):
    trainer = trainer_of(model, *callbacks, **settings)
    if trainer.policy == LinearProbe():  # activations are kept of batches from loader() alone
        pictures = [pair for images, labels in batches(4, 4) for pair in zip(images, labels.tolist(), strict=True)]
        loaded = [loader(pictures, torch.clone, batch_size=4, train=train) for train in (True, False)]
        trainer.fit(*loaded, epochs=epochs)
    else:
        trainer.fit(batches(4, 4), batches(4), epochs=epochs)
    return trainer


class Break(Callback):
    """Breaks training off in the named hook."""

    def __init__(self, hook):
        setattr(self, hook, self.raise_error)

    def raise_error(self, trainer):
        raise ZeroDivisionError


# The contract


@EVERY
def test_every_callback_has_every_hook_and_survives_a_fit(name, tiny_model, tmp_path):
    callback = MAKE[name](tmp_path)
    assert isinstance(callback, Callback)
    assert all(callable(getattr(callback, hook)) for hook in HOOKS)
    assert fitted(tiny_model(), callback).history.records


@EVERY
def test_every_callback_can_be_told_of_an_error_at_any_time(name, tiny_model, tmp_path):
    callback = MAKE[name](tmp_path)
    callback.on_exception(trainer_of(tiny_model()))
    for hook in HOOKS[:-1]:
        frozen = {"policy": LinearProbe(), "activations": ActivationCache()} if "frozen" in hook else {}
        with pytest.raises(CallbackError):
            fitted(tiny_model(), MAKE[name](tmp_path), Break(hook), **frozen)
    fitted(tiny_model(), callback)
    callback.on_exception(trainer_of(tiny_model()))


@EVERY
def test_every_callbacks_state_goes_through_json(name, tiny_model, tmp_path):
    callback, other = MAKE[name](tmp_path / "a"), MAKE[name](tmp_path / "b")
    fitted(tiny_model(), callback)
    other.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert other.state_dict() == callback.state_dict()


def test_hooks_come_in_their_order_with_the_trainer(tiny_model):
    calls = []

    def record(hook):
        return lambda self, trainer: calls.append((hook, type(trainer).__name__))

    recorder = type("Recorder", (Callback,), {hook: record(hook) for hook in HOOKS})()
    fitted(tiny_model(), recorder, epochs=2)
    epoch = [
        "on_train_epoch_start",
        *["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"] * 2,
        "on_validation_start",
        "on_validation_end",
        "on_train_epoch_end",
    ]
    assert calls == [(hook, "Trainer") for hook in ["on_fit_start", *epoch, *epoch, "on_fit_end"]]


def test_a_method_that_is_no_hook_fails_when_the_class_is_defined():
    with pytest.raises(TypeError, match=r"Wrong.on_epoch_end is no hook — did you mean 'on_train_epoch_end'"):
        type("Wrong", (Callback,), {"on_epoch_end": lambda self, trainer: None})
    with pytest.raises(TypeError, match="on_validation is no hook"):

        class Deeper(EarlyStopping):
            def on_validation(self, trainer):
                pass


# Best weights and early stopping


def record(epoch, val_loss, val_accuracy=0.5):
    return EpochRecord(epoch, 1.0, val_loss, val_accuracy, 0.1)


def replay(callback, trainer, losses):
    """Let a callback see these validation losses, without training; returns the epochs that were run."""
    trainer.history, trainer.should_stop = History(), False
    for epoch, loss in enumerate(losses):
        trainer.epoch = epoch
        callback.on_train_epoch_start(trainer)
        trainer.history.records.append(record(epoch + 1, loss))
        callback.on_validation_end(trainer)
        if trainer.should_stop:
            return epoch + 1
    return len(losses)


def test_early_stopping_bears_as_many_epochs_as_its_patience(tiny_model):
    trainer = trainer_of(tiny_model())
    assert replay(EarlyStopping(patience=2), trainer, [1.0, 0.9, 0.95, 0.9, 0.8, 0.7]) == 4
    assert replay(EarlyStopping(patience=2), trainer, [1.0, 0.9, 0.95, 0.8, 0.81, 0.79]) == 6
    assert replay(EarlyStopping(patience=1, mode="max"), trainer, [1.0, 1.1, 1.05]) == 3


def test_early_stopping_counts_anew_when_stages_are_unfrozen(tiny_model):
    losses = [1.0, 1.1, 1.1, 1.1, 1.1, 1.1]
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})
    assert replay(EarlyStopping(patience=2), trainer_of(tiny_model()), losses) == 3
    assert replay(EarlyStopping(patience=2), trainer_of(tiny_model(), policy=policy), losses) == 4


def test_early_stopping_goes_on_counting_where_it_was_interrupted(tiny_model):
    trainer = trainer_of(tiny_model())
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    replay(first, trainer, [1.0, 1.1, 1.1])
    second.load_state_dict(first.state_dict())
    assert second.waited == 2
    assert replay(second, trainer, [1.1, 1.1]) == 1


def test_early_stopping_takes_a_loss_that_is_no_number_for_no_improvement(tiny_model):
    assert replay(EarlyStopping(patience=2), trainer_of(tiny_model()), [1.0, math.nan, math.nan, 0.5]) == 3


@pytest.mark.parametrize("make", [BestCheckpoint, EarlyStopping])
def test_monitored_figures_and_directions_must_exist(make):
    with pytest.raises(SettingError, match=r"monitor='val_acc'; it can be .* — did you mean 'val_accuracy'"):
        make(monitor="val_acc")
    with pytest.raises(SettingError, match="mode='up'; it can be min or max"):
        make(mode="up")


def test_patience_below_one_is_refused():
    with pytest.raises(SettingError, match="patience must be 1 or more, got 0"):
        EarlyStopping(patience=0)


@pytest.mark.parametrize(("monitor", "mode", "expected"), [("val_loss", None, 2), ("val_loss", "max", 3)])
def test_best_checkpoint_keeps_the_best_epoch_of_any_figure_and_direction(tiny_model, monitor, mode, expected):
    best = BestCheckpoint(monitor=monitor, mode=mode)
    replay(best, trainer_of(tiny_model()), [1.0, 0.5, 1.5, 0.6])
    assert best.best.epoch == expected


# Learning rates


class RecordLRs(Callback):
    def __init__(self):
        self.lrs = []

    def on_train_batch_end(self, trainer):
        self.lrs.append([group["lr"] for group in trainer.optimizer.param_groups])


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(),
        Constant(warmup_epochs=1),
        StepDecay(every=2),
        ExponentialDecay(),
        Cosine(warmup_epochs=1),
        OneCycle(),
        Plateau(patience=0, monitor="val_accuracy", mode="max", threshold=0.9),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_keep_the_ratio_of_the_groups_and_are_followed_at_every_step(tiny_model, schedule, accumulate):
    lrs = RecordLRs()
    trainer = trainer_of(tiny_model(), LRScheduler(schedule), lrs, accumulate=accumulate)
    own = torch.tensor([group["lr"] for group in trainer.optimizer.param_groups])
    assert len(own.unique()) == len(trainer.model.stages)
    history = trainer.fit(batches(2, 2, 2), batches(4), epochs=4)
    steps = 3 if accumulate == 1 else 2
    assert trainer.step == 4 * steps
    for batch, seen in enumerate(lrs.lrs):
        epoch, index = divmod(batch, 3)
        if isinstance(schedule, Plateau):
            factor = schedule.factor_from(history["val_accuracy"][:epoch])
        else:
            factor = schedule.factor(StepsDone(epoch * steps + index // accumulate, 4 * steps, steps))
        torch.testing.assert_close(torch.tensor(seen), own * factor)
    if isinstance(schedule, Plateau):
        assert lrs.lrs[-1] != lrs.lrs[0]


def test_a_phase_with_its_own_lr_starts_the_schedule_anew_at_that_lr(tiny_model):
    lrs = RecordLRs()
    policy = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune(), 3: LinearProbe()}, lr={1: 0.004})
    trainer = fitted(tiny_model(), LRScheduler(Cosine(warmup_epochs=0)), lrs, policy=policy, epochs=4)
    factor = Cosine(warmup_epochs=0).factor
    expected = [0.01 * factor(StepsDone(step, 2, 2)) for step in range(2)]
    expected += [0.004 * factor(StepsDone(step, 6, 2)) for step in range(6)]
    assert [seen[-1] for seen in lrs.lrs] == pytest.approx(expected)
    ratios = [[lr / seen[-1] for lr in seen] for seen in lrs.lrs]
    assert all(each == pytest.approx(ratios[0]) for each in ratios)
    assert trainer.step == 8


def test_a_plateau_looks_only_at_the_epochs_of_its_phase(tiny_model):
    lrs = RecordLRs()
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}, lr={2: 0.004})
    never = Plateau(patience=0, monitor="val_accuracy", mode="max", threshold=0.99)
    fitted(tiny_model(), LRScheduler(never), lrs, policy=policy, epochs=3)
    assert lrs.lrs[-1][-1] == pytest.approx(0.004)


@pytest.mark.parametrize("multiplier", [0.1, 10.0])
def test_the_lr_of_a_phase_is_that_of_the_head(tiny_model, multiplier):
    model, lrs = tiny_model(), RecordLRs()
    groups = param_groups(model, lr=0.01, head_lr_multiplier=multiplier)
    groups.reverse()
    policy = ScheduledUnfreeze({0: FullFinetune()}, lr={0: 0.005})
    fitted(model, LRScheduler(Constant()), lrs, policy=policy, groups=groups, epochs=1)
    assert lrs.lrs[0][0] == pytest.approx(0.005)
    assert lrs.lrs[0][-1] == pytest.approx(0.005 / multiplier)


def test_a_second_fit_starts_from_the_groups_own_rates(tiny_model):
    lrs = RecordLRs()
    trainer = fitted(tiny_model(), LRScheduler(Cosine(warmup_epochs=0, final=0.5)), lrs, epochs=1)
    trainer.fit(batches(4, 4), batches(4), epochs=2)
    assert lrs.lrs[2][-1] == pytest.approx(0.01 * Cosine(warmup_epochs=0, final=0.5).factor(StepsDone(2, 4, 2)))


def test_a_phase_beyond_the_last_epoch_changes_nothing(tiny_model):
    lrs = RecordLRs()
    policy = ScheduledUnfreeze({0: LinearProbe(), 9: FullFinetune()}, lr={9: 0.5})
    fitted(tiny_model(), LRScheduler(Constant()), lrs, policy=policy)
    assert {seen[-1] for seen in lrs.lrs} == {0.01}


# Logging


@pytest.mark.parametrize("width", [20, 80, 200])
def test_progress_writes_one_line_per_epoch(tiny_model, width):
    text = io.StringIO()
    trainer = fitted(tiny_model(), Progress(Console(file=text, width=width)), epochs=3)
    lines = [line for line in text.getvalue().splitlines() if line.strip()]
    assert len(lines) == 3
    for line, row in zip(lines, trainer.history, strict=True):
        assert line.startswith(f"epoch {row.epoch}/3  train_loss {row.train_loss:.4f}  val_loss {row.val_loss:.4f}")
        assert f"val_accuracy {row.val_accuracy:.4f}" in line
    assert lines[0].endswith("best")


def test_progress_shows_a_bar_in_a_terminal_and_takes_it_away(tiny_model):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    fitted(tiny_model(), Progress(console), epochs=2)
    assert "━" in text.getvalue()
    assert not console._live_stack


def test_progress_takes_its_bar_away_after_an_error(tiny_model):
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(CallbackError):
        fitted(tiny_model(), Progress(console), Break("on_train_batch_end"))
    fitted(tiny_model(), Progress(console))  # rich refuses a second live bar


def test_progress_keeps_standard_output_free(tiny_model, capsys):
    fitted(tiny_model(), Progress())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 2/2" in shown.err


def test_csv_equals_the_history(tiny_model, tmp_path):
    path = tmp_path / "run" / "history.csv"
    trainer = fitted(tiny_model(), CSVLogger(path), epochs=3)
    assert History.load_csv(path) == trainer.history
    with path.open(newline="") as file:
        assert [float(row["val_loss"]) for row in csv.DictReader(file)] == trainer.history["val_loss"]
    assert [each.name for each in path.parent.iterdir()] == ["history.csv"]


def test_a_csv_that_cannot_be_written_is_an_output_error(tiny_model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fitted(tiny_model(), CSVLogger(tmp_path / "file" / "history.csv"))


def test_unfreezing_is_logged_once_per_change(tiny_model, caplog):
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})
    with caplog.at_level(logging.INFO, "transferkit"):
        fitted(tiny_model(), UnfreezeLogger(), policy=policy, epochs=4)
    assert [message for message in caplog.messages if message.startswith("epoch")] == [
        "epoch 1: training head",
        "epoch 3: training stem, stage1, stage2, stage3, stage4, stage5, head",
    ]


# Callbacks that fail


def kept(hook):
    """Settings with which a fit calls the hook."""
    return {"policy": LinearProbe(), "activations": ActivationCache()} if "frozen" in hook else {}


@pytest.mark.parametrize("hook", HOOKS[:-1])
def test_an_error_of_a_callback_names_its_class_and_hook_and_is_the_cause(hook, tiny_model):
    with pytest.raises(CallbackError, match=rf"^Break\.{hook} has failed \(ZeroDivisionError\)$") as failed:
        fitted(tiny_model(), Break(hook), **kept(hook))
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert any(entry.name == "raise_error" for entry in traceback.extract_tb(failed.value.__cause__.__traceback__))


def test_what_a_callbacks_error_says_is_told_in_one_line(tiny_model):
    class Wordy(Callback):
        def on_fit_start(self, trainer):
            raise OSError("no\n  such  server")

    with pytest.raises(CallbackError, match=r"^Wordy\.on_fit_start has failed \(OSError: no such server\)$"):
        fitted(tiny_model(), Wordy())


class Hear(Callback):
    """Notes every hook."""

    def __init__(self):
        self.heard = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, hook=hook: self.heard.append(hook))


BEHIND = {
    "on_validation_end": ["on_validation_end", "on_train_epoch_end", "on_exception"],
    "on_train_epoch_end": ["on_validation_end", "on_train_epoch_end", "on_exception"],
    "on_fit_end": ["on_validation_end", "on_train_epoch_end", "on_fit_end", "on_exception"],
}
"""What a callback behind the one that fails hears after the validation has begun."""


@pytest.mark.parametrize("hook", BEHIND)
def test_callbacks_behind_one_that_fails_still_end_the_epoch_and_the_run(hook, tiny_model):
    hear = Hear()
    with pytest.raises(CallbackError):
        fitted(tiny_model(), Break(hook), hear, epochs=1)
    assert hear.heard[hear.heard.index("on_validation_start") + 1 :] == BEHIND[hook]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS[:-1] if hook not in BEHIND])
def test_callbacks_behind_one_that_fails_within_an_epoch_hear_of_the_error_alone(hook, tiny_model):
    hear = Hear()
    with pytest.raises(CallbackError):
        fitted(tiny_model(), Break(hook), hear, epochs=1, **kept(hook))
    assert hook not in hear.heard
    assert hear.heard[-1] == "on_exception"


def test_of_several_that_fail_the_first_is_told(tiny_model):
    class Second(Break):
        pass

    with pytest.raises(CallbackError, match=r"Break\.on_fit_end"):
        fitted(tiny_model(), Break("on_fit_end"), Second("on_fit_end"))


def test_a_callback_that_fails_where_it_is_told_of_an_error_does_not_hide_it(tiny_model, caplog):
    hear = Hear()
    with pytest.raises(CallbackError, match=r"Break\.on_train_batch_end"):
        fitted(tiny_model(), Break("on_exception"), Break("on_train_batch_end"), hear)
    assert hear.heard[-1] == "on_exception"
    assert "Break.on_exception has failed (ZeroDivisionError)" in caplog.text


@pytest.mark.parametrize("error", [OutputError("the disk is full"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_fit_end"])
def test_errors_that_are_ours_and_wishes_to_end_go_through_as_they_are(hook, error, tiny_model):
    class Raise(Break):
        def raise_error(self, trainer):
            raise error

    hear = Hear()
    with pytest.raises(type(error)) as raised:
        fitted(tiny_model(), Raise(hook), hear, epochs=1)
    assert raised.value is error
    assert hook not in hear.heard
    assert hear.heard[-1] == "on_exception"


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_a_state_that_a_callback_cannot_give_or_take_is_named(method, tiny_model, tmp_path):
    class Forgetful(Callback):
        def state_dict(self):
            return {"seen": 1 // (method != "state_dict")}

        def load_state_dict(self, state):
            raise KeyError("saw")

    checkpoint = ResumeCheckpoint(tmp_path)

    def save_and_load():
        fitted(tiny_model(), Forgetful(), checkpoint, epochs=1)
        trainer_of(tiny_model(), Forgetful(), checkpoint).load_state_dict(checkpoint.read())

    with pytest.raises(CallbackError, match=rf"^Forgetful\.{method} has failed"):
        save_and_load()


def test_a_trainer_whose_callback_has_failed_goes_on_after_the_epochs_that_are_done(tiny_model):
    class Once(Callback):
        armed = True

        def on_validation_end(self, trainer):
            if trainer.epoch == 1 and self.armed:
                self.armed = False
                raise ZeroDivisionError

    whole, parts = tiny_model(), tiny_model()
    fitted(whole, epochs=3)
    trainer = trainer_of(parts, Once())
    with pytest.raises(CallbackError):
        trainer.fit(batches(4, 4), batches(4), epochs=3)
    assert len(trainer.history) == 2
    trainer.fit(batches(4, 4), batches(4), epochs=3)
    first, second = whole.network.state_dict(), parts.network.state_dict()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_best_model_that_could_not_be_saved_is_not_taken_for_saved(tiny_model, tmp_path, small_files):
    class Full(Callback):
        def on_validation_start(self, trainer):
            if trainer.epoch == 1:
                stack.enter_context(small_files(1000))

    best = BestCheckpoint(tmp_path / "best", monitor="train_loss")
    trainer = trainer_of(tiny_model(), best, Full())
    with ExitStack() as stack, pytest.raises(OutputError, match=r"the model cannot be saved in .*File too large"):
        trainer.fit(batches(4, 4), batches(4), epochs=3)
    assert len(trainer.history) == 2
    assert best.best == trainer.history.records[0]
    saved = load_artifact(tmp_path / "best")
    assert sorted(each.name for each in (tmp_path / "best").iterdir()) == ["config.json", "model.safetensors"]
    best.restore(trainer)
    first, second = saved.network.state_dict(), trainer.model.network.state_dict()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
