"""Schedules against torch's own schedulers, for whole runs and two groups of different learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.optim import lr_scheduler

from transferkit.exceptions import SettingError
from transferkit.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    MetricSchedule,
    OneCycle,
    Plateau,
    Progress,
    StepDecay,
    StepSchedule,
    schedule_by_name,
)

LRS = (0.1, 0.003)

shares = st.floats(0.0, 1.0)
step_schedules = st.one_of(
    st.builds(Constant, warmup_epochs=st.floats(0, 5)),
    st.builds(StepDecay, every=st.integers(1, 9), gamma=st.floats(0.01, 1)),
    st.builds(ExponentialDecay, every=st.integers(1, 9), gamma=st.floats(0.01, 1)),
    st.builds(Cosine, warmup_epochs=st.floats(0, 5), final=shares),
    st.builds(OneCycle, peak_at=shares, start=shares, final=shares),
)


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in LRS])


def torch_lrs(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[list[float]]:
    """The learning rates torch uses for ``count`` steps (or epochs), one list per group."""
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    used = []
    for _ in range(count):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if len(used) < count:
            scheduler.step()
    return [list(each) for each in zip(*used, strict=True)]


def our_lrs(schedule: StepSchedule, *, steps: int, steps_per_epoch: int) -> list[list[float]]:
    factors = [schedule.factor(Progress(step, steps, steps_per_epoch)) for step in range(steps)]
    return [[lr * factor for factor in factors] for lr in LRS]


def assert_same(ours: list[list[float]], theirs: list[list[float]]) -> None:
    for our_group, their_group in zip(ours, theirs, strict=True):
        assert our_group == pytest.approx(their_group, rel=1e-6, abs=1e-12)


@given(every=st.integers(1, 5), gamma=st.floats(0.1, 1.0), epochs=st.integers(1, 12), per_epoch=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_step_decay_equals_torch_step_lr(every: int, gamma: float, epochs: int, per_epoch: int) -> None:
    theirs = torch_lrs(lambda optimizer: lr_scheduler.StepLR(optimizer, every, gamma), epochs)
    ours = our_lrs(StepDecay(every, gamma), steps=epochs * per_epoch, steps_per_epoch=per_epoch)
    assert_same(ours, [[lr for lr in group for _ in range(per_epoch)] for group in theirs])


def test_exponential_decay_equals_torch_exponential_lr() -> None:
    theirs = torch_lrs(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8), 10)
    assert_same(our_lrs(ExponentialDecay(0.8), steps=10, steps_per_epoch=1), theirs)


def test_exponential_decay_every_n_epochs_holds_in_between() -> None:
    ours = our_lrs(ExponentialDecay(0.5, every=3), steps=7, steps_per_epoch=1)[0]
    assert ours == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025])


@given(steps=st.integers(1, 60), final=shares)
@settings(max_examples=30, deadline=None)
def test_cosine_without_warmup_equals_torch_cosine_annealing(steps: int, final: float) -> None:
    ours = our_lrs(Cosine(warmup_epochs=0, final=final), steps=steps, steps_per_epoch=7)
    for lr, our_group in zip(LRS, ours, strict=True):
        # torch has one eta_min for all groups, so each group has its own oracle
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=final * lr)
        theirs = []
        for _ in range(steps):
            theirs.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
        assert our_group == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@given(steps=st.integers(4, 80), peak_at=st.floats(0.3, 0.9))
@settings(max_examples=30, deadline=None)
def test_one_cycle_equals_torch_one_cycle(steps: int, peak_at: float) -> None:
    theirs = torch_lrs(
        lambda optimizer: lr_scheduler.OneCycleLR(
            optimizer, max_lr=list(LRS), total_steps=steps, pct_start=peak_at, cycle_momentum=False
        ),
        steps,
    )
    assert_same(our_lrs(OneCycle(peak_at), steps=steps, steps_per_epoch=5), theirs)


def test_one_cycle_reaches_the_groups_own_learning_rate_once() -> None:
    factors = [OneCycle(peak_at=0.3).factor(Progress(step, 100, 10)) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors.index(max(factors)) == 29
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(1e-4 / 25)


@given(
    values=st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=30),
    mode=st.sampled_from(["min", "max"]),
    factor=st.floats(0.05, 0.95),
    patience=st.integers(0, 4),
    min_factor=st.floats(0.0, 1.0),
    threshold=st.floats(0.0, 0.5),
)
@settings(max_examples=100, deadline=None)
def test_plateau_equals_torch_reduce_on_plateau(
    values: list[float], mode: Any, factor: float, patience: int, min_factor: float, threshold: float
) -> None:
    optimizer = make_optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode,
        factor=factor,
        patience=patience,
        threshold=threshold,
        min_lr=[min_factor * lr for lr in LRS],
        eps=0.0,
    )
    ours = Plateau("val_loss", mode, factor, patience, min_factor, threshold)
    for count, value in enumerate(values, start=1):
        scheduler.step(value)
        share = ours.factor_from(values[:count])
        assert [lr * share for lr in LRS] == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-6)


def test_plateau_without_epochs_keeps_the_learning_rate() -> None:
    assert Plateau().factor_from([]) == 1.0


def test_a_metric_schedule_is_no_step_schedule() -> None:
    # Plateau has a number named factor, so a structural check would take it for a step schedule
    assert isinstance(Plateau(), MetricSchedule)
    assert not isinstance(Plateau(), StepSchedule)


@given(schedule=step_schedules, steps=st.integers(1, 50), per_epoch=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_the_factor_is_a_share_at_every_step(schedule: StepSchedule, steps: int, per_epoch: int) -> None:
    factors = [schedule.factor(Progress(step, steps, per_epoch)) for step in range(steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)


@given(
    make=st.sampled_from([Constant, Cosine]), warmup=st.floats(0.1, 4), epochs=st.integers(1, 6), per=st.integers(1, 20)
)
@settings(max_examples=100, deadline=None)
def test_warm_up_rises_from_above_zero_to_the_full_learning_rate(
    make: type[Constant] | type[Cosine], warmup: float, epochs: int, per: int
) -> None:
    steps, warmup_steps = epochs * per, round(warmup * per)
    rising = [make(warmup_epochs=warmup).factor(Progress(step, steps, per)) for step in range(min(warmup_steps, steps))]
    assert all(low < high for low, high in itertools.pairwise(rising))
    assert all(factor > 0 for factor in rising)
    if 0 < warmup_steps <= steps:
        assert rising[-1] == 1.0


def test_cosine_falls_from_the_end_of_the_warm_up_to_its_final_share() -> None:
    factors = [Cosine(warmup_epochs=1, final=0.2).factor(Progress(step, 40, 10)) for step in range(41)]
    assert factors[9] == factors[10] == 1.0
    assert all(high > low for high, low in itertools.pairwise(factors[10:]))
    assert factors[40] == pytest.approx(0.2)


def test_constant_without_warm_up_never_changes() -> None:
    assert {Constant().factor(Progress(step, 9, 3)) for step in range(10)} == {1.0}


def test_a_span_of_one_step_has_a_factor_in_every_schedule() -> None:
    for name in ("constant", "step", "exponential", "cosine", "one_cycle"):
        schedule = schedule_by_name(name)
        assert isinstance(schedule, StepSchedule)
        assert 0 <= schedule.factor(Progress(0, 1, 1)) <= 1


def test_progress_counts_whole_epochs() -> None:
    assert [Progress(step, 6, 3).epoch for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("constant", Constant),
        ("step", StepDecay),
        ("exponential", ExponentialDecay),
        ("cosine", Cosine),
        ("one_cycle", OneCycle),
        ("plateau", Plateau),
    ],
)
def test_each_name_makes_its_schedule_with_defaults(name: str, kind: type) -> None:
    assert schedule_by_name(name) == kind()


@pytest.mark.parametrize("schedule", [Constant(), StepDecay(), ExponentialDecay(), Cosine(), OneCycle(), Plateau()])
def test_a_schedule_prints_as_the_code_that_makes_it_and_cannot_change(schedule: Any) -> None:
    assert eval(repr(schedule)) == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.gamma = 0.5


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(SettingError, match=r"no schedule named 'cosin'.*did you mean 'cosine'"):
        schedule_by_name("cosin")


@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [
        (Constant, "warmup_epochs", -1),
        (StepDecay, "every", 0),
        (StepDecay, "gamma", 0.0),
        (ExponentialDecay, "gamma", 1.5),
        (ExponentialDecay, "every", 0),
        (Cosine, "warmup_epochs", math.inf),
        (Cosine, "final", 1.5),
        (OneCycle, "peak_at", math.nan),
        (OneCycle, "start", -0.1),
        (OneCycle, "final", 2.0),
        (Plateau, "mode", "best"),
        (Plateau, "factor", 1.0),
        (Plateau, "patience", -1),
        (Plateau, "min_factor", 2.0),
        (Plateau, "threshold", 1.0),
    ],
)
def test_a_setting_outside_its_range_is_named(make: Any, setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"^{setting}(=| must be).*{value!r}"):
        make(**{setting: value})


@pytest.mark.parametrize(
    ("values", "setting"), [((0, 0, 1), "steps"), ((-1, 1, 1), "step"), ((3, 2, 1), "step"), ((0, 1, 0), "steps_per")]
)
def test_progress_outside_its_span_is_refused(values: tuple[int, int, int], setting: str) -> None:
    with pytest.raises(SettingError, match=setting):
        Progress(*values)
