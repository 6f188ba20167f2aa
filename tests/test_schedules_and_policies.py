"""Every schedule with every policy in a short training: rates, ratios, phases, and what must survive an unfreezing.

torch's own schedulers, on the same groups, say what the rates must be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from transferkit.callbacks import EMA, BestCheckpoint, Callback, EarlyStopping, LRScheduler
from transferkit.create import adapt
from transferkit.freezing import (
    FreezeFirst,
    FreezeMatching,
    FreezePolicy,
    FreezeUntil,
    FullFinetune,
    GradualUnfreezing,
    LinearProbe,
    ScheduledUnfreeze,
    TrainLast,
)
from transferkit.history import History
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    MetricSchedule,
    OneCycle,
    Plateau,
    Progress,
    Schedule,
    StepDecay,
)
from transferkit.trainer import Trainer

LR, LAYER_DECAY, EPOCHS, STEPS = 0.01, 0.5, 6, 2

SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(),
    "warm-up": Constant(warmup_epochs=1),
    "step": StepDecay(every=2, gamma=0.1),
    "exponential": ExponentialDecay(gamma=0.8),
    "cosine": Cosine(warmup_epochs=0.5),
    "one cycle": OneCycle(),
    "plateau": Plateau(patience=0, factor=0.5, threshold=0.9),
}
NESTED = ScheduledUnfreeze({0: TrainLast(1), 2: FullFinetune()}, lr={2: 0.002})
# Each policy with the spans over which the schedule runs, and the head's own lr in each.
POLICIES: dict[str, tuple[FreezePolicy, list[tuple[int, int, float]]]] = {
    "full": (FullFinetune(), [(0, 6, LR)]),
    "head": (LinearProbe(), [(0, 6, LR)]),
    "until": (FreezeUntil("stage2"), [(0, 6, LR)]),
    "first": (FreezeFirst(1), [(0, 6, LR)]),
    "last": (TrainLast(1), [(0, 6, LR)]),
    "matching": (FreezeMatching("stage1"), [(0, 6, LR)]),
    "gradual": (GradualUnfreezing(), [(0, 6, LR)]),
    "two phases": (ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}), [(0, 6, LR)]),
    "two rates": (
        ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune(), 4: LinearProbe()}, lr={2: 0.004}),
        [(0, 2, LR), (2, 6, 0.004)],
    ),
    "three rates": (
        ScheduledUnfreeze({0: LinearProbe(), 2: NESTED, 5: TrainLast(1)}, lr={0: 0.02, 2: 0.004, 5: 0.001}),
        [(0, 2, 0.02), (2, 4, 0.004), (4, 5, 0.002), (5, 6, 0.001)],
    ),
}


def small_model(*, norm: bool = True) -> TransferModel:
    """Four stages of a few hundred parameters at 8 px."""

    def block(channels: int, width: int) -> nn.Module:
        norms = [nn.BatchNorm2d(width)] if norm else []
        return nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), *norms, nn.ReLU())

    with seeded(0):
        body = [block(3, 4), block(4, 6), block(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        network = nn.Sequential(*body, nn.Linear(8, 3))
        return adapt(network, num_classes=3, preprocessing=Preprocessing(size=8, resize_size=8))


def batches(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    images = torch.randn(sum(sizes), 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


TRAIN, VAL = batches(6, 4), batches(8, seed=1)


def trainer_of(*callbacks: Callback, optimizer: str = "sgd", norm: bool = True, **settings: Any) -> Trainer:
    model = small_model(norm=norm)
    assert model.stage_names == ("stem", "stage1", "stage2", "head")
    groups = param_groups(model, lr=LR, layer_decay=LAYER_DECAY, weight_decay=0.1)
    return Trainer(model, build_optimizer(optimizer, groups), callbacks=callbacks, device="cpu", **settings)


def weights(model: TransferModel) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.network.state_dict().items()}


class Watch(Callback):
    """Keeps each step's rates and moments, and each epoch's first and last weights."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.trained: list[set[str]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.states: list[dict[int, dict[str, int]]] = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.before.append(weights(trainer.model))
        stages = trainer.model.stages
        self.trained.append({each.name for each in stages if all(one.requires_grad for one in each.parameters)})

    def on_before_optimizer_step(self, trainer: Trainer) -> None:
        self.lrs.append([group["lr"] for group in trainer.optimizer.param_groups])

    def on_train_batch_end(self, trainer: Trainer) -> None:
        moments = trainer.optimizer.state
        self.states.append(
            {
                id(each): {name: id(value) for name, value in moments[each].items() if isinstance(value, Tensor)}
                for each in trainer.model.parameters()
                if each in moments
            }
        )

    def on_validation_start(self, trainer: Trainer) -> None:
        self.after.append(weights(trainer.model))


def expected_head_lrs(schedule: Schedule, spans: list[tuple[int, int, float]], history: History) -> list[float]:
    """Written out span by span, as a person would."""
    lrs = []
    for start, end, lr in spans:
        for step in range((end - start) * STEPS):
            if isinstance(schedule, MetricSchedule):
                seen = history[schedule.monitor][start : start + step // STEPS]
                lrs.append(lr * schedule.factor_from(seen))
            else:
                lrs.append(lr * schedule.factor(Progress(step, (end - start) * STEPS, STEPS)))
    return lrs


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("schedule_name", SCHEDULES)
def test_every_schedule_runs_with_every_policy(schedule_name: str, policy_name: str) -> None:
    schedule, (policy, spans) = SCHEDULES[schedule_name], POLICIES[policy_name]
    watch = Watch()
    trainer = trainer_of(LRScheduler(schedule), watch, policy=policy)
    own = [group["lr"] for group in trainer.optimizer.param_groups]
    stages = [group["stage"] for group in trainer.optimizer.param_groups]
    assert own == [LR * LAYER_DECAY ** (3 - trainer.model.stage_names.index(stage)) for stage in stages]
    history = trainer.fit(TRAIN, VAL, epochs=EPOCHS)
    names = trainer.model.stage_names

    head = [lrs[-1] for lrs in watch.lrs]
    assert head == pytest.approx(expected_head_lrs(schedule, spans, history), rel=1e-9)
    for lrs in watch.lrs:  # layer-wise decay holds at every single step
        assert [lr / lrs[-1] for lr in lrs] == pytest.approx([lr / own[-1] for lr in own], rel=1e-9)
    for start, end, lr in spans:
        top = max(head[start * STEPS : end * STEPS])
        # torch's one-cycle passes its peak between two steps, where a span is that short
        assert top <= lr if schedule_name == "one cycle" else top == pytest.approx(lr)

    assert watch.trained == [set(names) - policy.frozen_stages(names, epoch) for epoch in range(EPOCHS)]
    keys = {
        stage.name: {
            key
            for key, value in trainer.model.network.state_dict(keep_vars=True).items()
            if any(value is each for each in (*stage.parameters, *stage.buffers))
        }
        for stage in trainer.model.stages
    }
    for trained, before, after in zip(watch.trained, watch.before, watch.after, strict=True):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved <= set().union(*(keys[name] for name in trained))
        assert all(moved & keys[name] for name in trained)


# torch's schedulers on the same groups


def torch_run(
    make: Callable[[torch.optim.Optimizer], Any], *, epochs: int, each_step: bool = False
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The textbook loop with a torch scheduler; returns each step's rates and the last weights."""
    model = small_model()
    groups = param_groups(model, lr=LR, layer_decay=LAYER_DECAY, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    scheduler, lrs = make(optimizer), []
    model.network.train()
    for _ in range(epochs):
        for images, labels in TRAIN:
            lrs.append([group["lr"] for group in optimizer.param_groups])
            F.cross_entropy(model.network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if each_step:
                scheduler.step()
        if not each_step:
            scheduler.step()
    return lrs, weights(model)


OWN = [group["lr"] for group in param_groups(small_model(), lr=LR, layer_decay=LAYER_DECAY, weight_decay=0.1)]


@pytest.mark.parametrize(
    ("schedule", "epochs", "make", "each_step"),
    [
        (StepDecay(7, 0.1), 16, lambda each: lr_scheduler.StepLR(each, 7, 0.1), False),
        (ExponentialDecay(0.9), 6, lambda each: lr_scheduler.ExponentialLR(each, 0.9), False),
        (ExponentialDecay(0.92, every=2), 7, lambda each: lr_scheduler.StepLR(each, 2, 0.92), False),
        (Cosine(warmup_epochs=0), 5, lambda each: lr_scheduler.CosineAnnealingLR(each, T_max=10), True),
        (
            OneCycle(),
            5,
            lambda each: lr_scheduler.OneCycleLR(each, max_lr=OWN, total_steps=10, cycle_momentum=False),
            True,
        ),
        (
            OneCycle(peak_at=0.4),
            3,
            lambda each: lr_scheduler.OneCycleLR(each, max_lr=OWN, total_steps=6, pct_start=0.4, cycle_momentum=False),
            True,
        ),
    ],
    ids=["StepDecay", "ExponentialDecay", "ExponentialDecay every 2", "Cosine", "OneCycle", "OneCycle peak 0.4"],
)
def test_rates_and_weights_equal_those_of_torchs_scheduler(
    schedule: Schedule, epochs: int, make: Callable[[torch.optim.Optimizer], Any], each_step: bool
) -> None:
    watch = Watch()
    trainer = trainer_of(LRScheduler(schedule), watch)
    trainer.fit(TRAIN, VAL, epochs=epochs)
    lrs, theirs = torch_run(make, epochs=epochs, each_step=each_step)
    torch.testing.assert_close(torch.tensor(watch.lrs), torch.tensor(lrs), rtol=1e-6, atol=0)
    mine = weights(trainer.model)
    for key in theirs:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "min"), ("val_accuracy", "max")])
def test_a_plateau_multiplies_each_groups_own_rate_as_torchs_does(monitor: str, mode: str) -> None:
    watch, epochs = Watch(), 8
    schedule = Plateau(monitor=monitor, mode=mode, factor=0.5, patience=1, threshold=0.2, min_factor=0.1)
    trainer = trainer_of(LRScheduler(schedule), watch)
    history = trainer.fit(TRAIN, VAL, epochs=epochs)
    optimizer = torch.optim.SGD(param_groups(small_model(), lr=LR, layer_decay=LAYER_DECAY, weight_decay=0.1))
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.5, patience=1, threshold=0.2, min_lr=[0.1 * lr for lr in OWN], eps=0
    )
    for epoch in range(epochs):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert watch.lrs[epoch * STEPS] == watch.lrs[epoch * STEPS + 1] == pytest.approx(lrs)
        theirs.step(history[monitor][epoch])
    assert watch.lrs[-1][-1] < LR


# What survives an unfreezing


def identities(trainer: Trainer) -> list[list[int]]:
    return [[id(each) for each in group["params"]] for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizer_and_its_state_are_the_same_objects_through_every_phase(optimizer: str) -> None:
    watch, policy = Watch(), POLICIES["three rates"][0]
    trainer = trainer_of(LRScheduler(OneCycle()), watch, optimizer=optimizer, policy=policy)
    same, held = trainer.optimizer, identities(trainer)
    trainer.fit(TRAIN, VAL, epochs=EPOCHS)
    assert trainer.optimizer is same
    assert identities(trainer) == held
    for before, after in itertools.pairwise(watch.states):
        assert before.items() <= after.items()
    assert len(watch.states[0]) == 2 < len(watch.states[-1]) == len(list(trainer.model.parameters()))


def test_a_stage_that_is_frozen_again_keeps_its_momentum_until_it_is_freed() -> None:
    policy = ScheduledUnfreeze({0: FullFinetune(), 1: LinearProbe(), 2: FullFinetune()})
    momenta: list[Tensor] = []

    class Momentum(Callback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            if trainer.epoch:
                stem = trainer.model.stages[0].parameters[0]
                momenta.append(trainer.optimizer.state[stem]["momentum_buffer"].clone())

    trainer_of(LRScheduler(Cosine()), Momentum(), policy=policy).fit(TRAIN, VAL, epochs=3)
    assert torch.equal(momenta[0], momenta[1])
    assert momenta[0].any()


def test_the_average_of_the_weights_goes_on_through_an_unfreezing() -> None:
    ema, averages = EMA(0.5, warmup=False), []

    class Averages(Callback):
        def on_train_batch_end(self, trainer: Trainer) -> None:
            head = trainer.model.stages[-1].parameters[0]
            averages.append((ema.updates, head.detach().clone(), _head_average(ema, trainer)))

    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}, lr={2: 0.004})
    trainer_of(LRScheduler(Cosine()), ema, Averages(), policy=policy).fit(TRAIN, VAL, epochs=4)
    assert [updates for updates, _, _ in averages] == list(range(1, 4 * STEPS + 1))
    for (_, _, before), (_, head, after) in itertools.pairwise(averages):
        torch.testing.assert_close(after, (before + head) / 2)


def _head_average(ema: EMA, trainer: Trainer) -> Tensor:
    (key,) = (
        key
        for key, value in trainer.model.network.named_parameters()
        if value is trainer.model.stages[-1].parameters[0]
    )
    average: Tensor = ema.state_dict()["averages"][key].clone()
    return average


def test_patience_counts_anew_at_an_unfreezing_and_the_best_epoch_stays() -> None:
    stopping, best = EarlyStopping(patience=3), BestCheckpoint(monitor="val_loss")
    schedule = Constant()
    trainer = trainer_of(LRScheduler(schedule), best, stopping, norm=False, policy=GradualUnfreezing(every=2))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-30  # nothing gets better
    history = trainer.fit(TRAIN, VAL, epochs=20)
    # freed after 2, 4 and 6 epochs; then three are borne
    assert len(history) == 9
    assert best.best == stopping.best == history.records[0]


def test_the_best_epoch_is_one_of_the_whole_run() -> None:
    watch, best = Watch(), BestCheckpoint(monitor="val_loss")
    policy = ScheduledUnfreeze({0: LinearProbe(), 3: FullFinetune()}, lr={3: 50.0})  # the second phase is a wreck
    trainer = trainer_of(LRScheduler(Constant()), best, watch, norm=False, policy=policy, clip_grad_norm=1.0)
    history = trainer.fit(TRAIN, VAL, epochs=5)
    assert best.best == history.best("val_loss")
    assert best.best.epoch <= 3
    assert min(history["val_loss"][3:]) > best.best.val_loss
    kept = weights(trainer.model)
    assert all(torch.equal(kept[key], value) for key, value in watch.after[best.best.epoch - 1].items())
    assert math.isfinite(history["val_loss"][-1])
