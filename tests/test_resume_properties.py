"""Whatever the policy, the schedule and the instants of the interrupts: resumed equals uninterrupted."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase, given, settings, strategies as st
from torch import Tensor, nn

from resuming import Killed, Stop, assert_equal
from transferkit.callbacks import EMA, BestCheckpoint, Callback, EarlyStopping, LRScheduler, ResumeCheckpoint
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
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.schedules import Constant, Cosine, ExponentialDecay, OneCycle, Plateau, StepDecay
from transferkit.trainer import Trainer

STAGES = ("stem", "stage1", "stage2", "head")


class Block(nn.Sequential):
    """Convolution, batch norm, dropout."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout(0.2)
        )


class Network(nn.Module):
    """A classifier of four stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(4, 4), Block(4, 6)])
        self.fc = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


with seeded(0):
    MODEL = adapt(Network(), num_classes=3, preprocessing=Preprocessing(size=8, resize_size=8))


def batches(*sizes: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


TRAIN, VAL = batches(4, 4, 4, 3, seed=0), batches(5, 2, seed=1)

simple = st.one_of(
    st.sampled_from([FullFinetune(), LinearProbe(), FreezeMatching("stem|stage2"), FreezeMatching("stage1|head")]),
    st.integers(0, 4).map(FreezeFirst),
    st.integers(1, 4).map(TrainLast),
    st.sampled_from(STAGES).map(FreezeUntil),
    st.integers(1, 2).map(GradualUnfreezing),
)


@st.composite
def scheduled(draw: st.DrawFn) -> ScheduledUnfreeze:
    phases = {0: draw(simple), **draw(st.dictionaries(st.integers(1, 3), simple, max_size=2))}
    return ScheduledUnfreeze(phases, lr=draw(st.dictionaries(st.sampled_from(sorted(phases)), st.floats(1e-3, 1e-1))))


def freezes_nothing_for_good(policy: FreezePolicy) -> bool:
    """Whether something trains in every epoch."""
    return all(len(policy.frozen_stages(STAGES, epoch)) < len(STAGES) for epoch in range(4))


policies = st.one_of(simple, scheduled()).filter(freezes_nothing_for_good)
schedules = st.sampled_from(
    [
        Constant(warmup_epochs=0.5),
        StepDecay(every=1, gamma=0.5),
        ExponentialDecay(gamma=0.8),
        Cosine(),
        OneCycle(),
        Plateau(patience=1, factor=0.5, threshold=0.5),
    ]
)
runs = st.fixed_dictionaries(
    {
        "policy": policies,
        "schedule": schedules,
        "optimizer": st.sampled_from(["adamw", "sgd", torch.optim.RMSprop, torch.optim.Adagrad]),
        "layer_decay": st.sampled_from([1.0, 0.6]),
        "keep_statistics": st.booleans(),
        "ema": st.sampled_from([None, 0.5, 0.9]),
        "patience": st.sampled_from([1, 9]),
        "every": st.sampled_from([None, 1, 2]),
        "epochs": st.integers(1, 4),
        "trainer": st.fixed_dictionaries(
            {
                "accumulate": st.integers(1, 3),
                "mixup": st.sampled_from([0.0, 0.4]),
                "clip_grad_norm": st.sampled_from([None, 0.1]),
                "seed": st.integers(0, 9),
            }
        ),
    }
)
stops = st.lists(
    st.builds(
        Stop,
        st.sampled_from(
            [
                "on_train_epoch_start",
                "on_train_batch_start",
                "on_before_optimizer_step",
                "on_train_batch_end",
                "on_validation_start",
                "on_validation_end",
                "on_train_epoch_end",
            ]
        ),
        st.integers(0, 3),
        st.one_of(st.none(), st.integers(0, 3)),
        kill=st.booleans(),
    ),
    max_size=3,
)


class Invariants(Callback):
    """At every step: what trains is what the policy says, and what is frozen has not moved since its phase began."""

    def __init__(self) -> None:
        self.frozen: dict[str, Tensor] = {}
        self.last: Any = None

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        names = frozen_names(trainer)
        now = {key: value for key, value in trainer.model.network.state_dict().items() if key in names}
        self.frozen = {key: self.frozen.get(key, value).clone() for key, value in now.items()}

    def on_before_optimizer_step(self, trainer: Trainer) -> None:
        wanted = trainer.policy.frozen_stages(trainer.model.stage_names, trainer.epoch)
        for stage in trainer.model.stages:
            assert {each.requires_grad for each in stage.parameters} == {stage.name not in wanted}
            assert all((each.grad is None) or stage.name not in wanted for each in stage.parameters)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        self.check(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self.last = copy.deepcopy(trainer.state_dict())

    def check(self, trainer: Trainer) -> None:
        now = trainer.model.network.state_dict()
        assert_equal(self.frozen, {key: now[key] for key in self.frozen})
        everything = sorted(map(id, trainer.model.network.parameters()))
        assert sorted(id(each) for group in trainer.optimizer.param_groups for each in group["params"]) == everything


def frozen_names(trainer: Trainer) -> set[str]:
    wanted = trainer.policy.frozen_stages(trainer.model.stage_names, trainer.epoch)
    own = {id(each) for stage in trainer.model.stages if stage.name in wanted for each in stage.parameters}
    own |= {id(each) for stage in trainer.model.stages if stage.name in wanted for each in stage.buffers}
    return {key for key, value in trainer.model.network.state_dict(keep_vars=True).items() if id(value) in own}


def trainer_of(run: dict[str, Any], model: TransferModel, *callbacks: Callback) -> Trainer:
    model.keep_statistics = run["keep_statistics"]
    optimizer = build_optimizer(run["optimizer"], param_groups(model, lr=0.02, layer_decay=run["layer_decay"]))
    built_in = [LRScheduler(run["schedule"]), *([] if run["ema"] is None else [EMA(run["ema"])])]
    built_in += [BestCheckpoint(), EarlyStopping(patience=run["patience"])]
    return Trainer(
        model, optimizer, policy=run["policy"], callbacks=[*built_in, *callbacks], device="cpu", **run["trainer"]
    )


@given(run=runs, stops=stops)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would take minutes; the run and the stops are printed as they are
)
def test_a_resumed_run_is_the_uninterrupted_one(run: dict[str, Any], stops: list[Stop]) -> None:
    alone = Invariants()
    wanted = trainer_of(run, copy.deepcopy(MODEL), alone)
    wanted.fit(TRAIN, VAL, epochs=run["epochs"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run" / "resume"
        for stop in [*(each.again() for each in stops), None]:
            model, ended = copy.deepcopy(MODEL), Invariants()
            checkpoint = ResumeCheckpoint(folder, every=run["every"])
            trainer = trainer_of(run, model, ended, *([stop] if stop else []), checkpoint)
            if state := checkpoint.read():
                with torch.no_grad():  # nothing of the new network is left in the resumed one
                    for tensor in model.network.state_dict().values():
                        tensor.zero_()
                trainer.load_state_dict(state)
            try:
                trainer.fit(TRAIN, VAL, epochs=run["epochs"])
                break
            except Interrupted:
                continue
            except Killed:
                assert stop is not None
                stop.restore(folder.parent)
    assert_equal(trainer.model.network.state_dict(), wanted.model.network.state_dict())
    assert_equal(trainer.history.to_dicts(), wanted.history.to_dicts())
    if ended.last is not None:
        assert_equal(ended.last, alone.last)


def test_the_stages_that_the_policies_speak_of_are_those_of_the_network() -> None:
    assert tuple(MODEL.stage_names) == STAGES
