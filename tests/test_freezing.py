"""Freeze policies are pure functions of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings, strategies as st

from transferkit.exceptions import SettingError, UnknownStageError
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
    policy_from_text,
)

NAMES = ("stem", "stage1", "stage2", "stage3", "head")
BODY = {"stem", "stage1", "stage2", "stage3"}


@pytest.mark.parametrize(
    ("policy", "epoch", "frozen"),
    [
        (FullFinetune(), 0, set()),
        (FullFinetune(), 9, set()),
        (LinearProbe(), 0, BODY),
        (LinearProbe(), 9, BODY),
        (FreezeUntil("stem"), 0, set()),
        (FreezeUntil("stage2"), 0, {"stem", "stage1"}),
        (FreezeUntil("head"), 5, BODY),
        (FreezeFirst(0), 0, set()),
        (FreezeFirst(1), 3, {"stem"}),
        (FreezeFirst(3), 0, {"stem", "stage1", "stage2"}),
        (FreezeFirst(99), 0, BODY),
        (TrainLast(1), 7, {"stem", "stage1", "stage2"}),
        (TrainLast(3), 0, {"stem"}),
        (TrainLast(4), 0, set()),
        (TrainLast(99), 0, set()),
        (FreezeMatching("stage[13]"), 0, {"stage1", "stage3"}),
        (FreezeMatching("stem"), 4, {"stem"}),
        (FreezeMatching("stage2|head"), 0, {"stage2", "head"}),
        (GradualUnfreezing(), 0, BODY),
        (GradualUnfreezing(), 1, BODY - {"stage3"}),
        (GradualUnfreezing(), 3, {"stem"}),
        (GradualUnfreezing(), 4, set()),
        (GradualUnfreezing(), 40, set()),
        (GradualUnfreezing(every=3), 2, BODY),
        (GradualUnfreezing(every=3), 3, BODY - {"stage3"}),
        (ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}), 4, BODY),
        (ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}), 5, set()),
        (ScheduledUnfreeze({5: FullFinetune(), 0: LinearProbe()}), 50, set()),
        (ScheduledUnfreeze({0: FullFinetune(), 2: GradualUnfreezing()}), 2, BODY),
        (ScheduledUnfreeze({0: FullFinetune(), 2: GradualUnfreezing()}), 4, {"stem", "stage1"}),
    ],
)
def test_what_a_policy_freezes(policy: FreezePolicy, epoch: int, frozen: set[str]) -> None:
    assert policy.frozen_stages(NAMES, epoch) == frozen


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        (LinearProbe(), ()),
        (GradualUnfreezing(every=2), (2, 4, 6, 8)),
        (ScheduledUnfreeze({0: LinearProbe(), 3: TrainLast(1), 5: FullFinetune()}), (3, 5)),
        (ScheduledUnfreeze({0: LinearProbe(), 3: LinearProbe()}), ()),
        (ScheduledUnfreeze({0: LinearProbe(), 12: FullFinetune()}), ()),
    ],
)
def test_changes_are_the_epochs_at_which_something_is_freed_or_frozen(
    policy: FreezePolicy, changes: tuple[int, ...]
) -> None:
    assert policy.changes(NAMES, 10) == changes


def test_phase_lrs_are_those_given() -> None:
    policy = ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}, lr={5: 1e-4})
    assert policy.phase_lrs() == {5: 1e-4}
    assert LinearProbe().phase_lrs() == {}


def test_phase_lrs_hold_those_of_a_schedule_within_a_phase_until_the_next_phase() -> None:
    inner = ScheduledUnfreeze({0: TrainLast(1), 2: TrainLast(2), 4: FullFinetune()}, lr={0: 0.1, 2: 0.2, 4: 0.4})
    assert ScheduledUnfreeze({0: LinearProbe(), 3: inner}).phase_lrs() == {3: 0.1, 5: 0.2, 7: 0.4}
    assert ScheduledUnfreeze({0: LinearProbe(), 3: inner, 7: LinearProbe()}).phase_lrs() == {3: 0.1, 5: 0.2}
    own = ScheduledUnfreeze({0: LinearProbe(), 3: inner, 6: FullFinetune()}, lr={3: 9.0, 6: 6.0})
    assert own.phase_lrs() == {3: 9.0, 5: 0.2, 6: 6.0}
    twice = ScheduledUnfreeze({0: ScheduledUnfreeze({0: LinearProbe(), 1: inner}), 4: FullFinetune()})
    assert twice.phase_lrs() == {1: 0.1, 3: 0.2}


simple_policies = st.one_of(
    st.just(FullFinetune()),
    st.just(LinearProbe()),
    st.integers(0, 12).map(FreezeFirst),
    st.integers(1, 12).map(TrainLast),
    st.integers(1, 5).map(GradualUnfreezing),
    st.sampled_from(["stem", "head"]).map(FreezeUntil),
    st.sampled_from(["stem", "st.*", "[a-z]+", "head|stem"]).map(FreezeMatching),
)
scheduled = st.dictionaries(st.integers(1, 15), simple_policies, max_size=3).flatmap(
    lambda later: simple_policies.map(lambda first: ScheduledUnfreeze({0: first, **later}))
)
stage_names = st.integers(0, 14).map(lambda count: ("stem", *(f"stage{n}" for n in range(1, count + 1)), "head"))


@given(policy=simple_policies | scheduled, names=stage_names, epochs=st.permutations(range(8)))
@settings(max_examples=150, deadline=None)
def test_policies_are_pure(policy: FreezePolicy, names: Sequence[str], epochs: list[int]) -> None:
    in_order = [policy.frozen_stages(names, epoch) for epoch in range(8)]
    shuffled = {epoch: policy.frozen_stages(list(names), epoch) for epoch in epochs}
    assert in_order == [shuffled[epoch] for epoch in range(8)]
    assert all(frozen <= set(names) for frozen in in_order)


@given(policy=simple_policies | scheduled, names=stage_names, epochs=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_between_changes_nothing_changes(policy: FreezePolicy, names: Sequence[str], epochs: int) -> None:
    changes = policy.changes(names, epochs)
    current = policy.frozen_stages(names, 0)
    for epoch in range(epochs):
        frozen = policy.frozen_stages(names, epoch)
        assert (frozen != current) == (epoch in changes)
        current = frozen


@given(names=stage_names, every=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_gradual_unfreezing_frees_one_stage_at_a_time_from_the_end(names: Sequence[str], every: int) -> None:
    policy = GradualUnfreezing(every)
    for epoch in range(every * len(names) + 2):
        frozen = policy.frozen_stages(names, epoch)
        assert frozen == set(names[: len(frozen)])
        assert len(frozen) == max(0, len(names) - 1 - epoch // every)


def test_a_policy_of_your_own_needs_one_method() -> None:
    class EveryOther(FreezePolicy):
        def frozen_stages(self, stage_names: Sequence[str], epoch: int) -> frozenset[str]:
            return frozenset(stage_names[epoch % 2 : -1 : 2])

    assert EveryOther().changes(NAMES, 4) == (1, 2, 3)
    assert ScheduledUnfreeze({0: EveryOther()}).frozen_stages(NAMES, 1) == {"stage1", "stage3"}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FreezeUntil("layer3"), "no stage named 'layer3'; the stages are stem, .*, head — did you mean 'stage3'"),
        (FreezeMatching("block.*"), "no stage matches 'block.*'; the stages are stem, stage1"),
        (ScheduledUnfreeze({0: FreezeUntil("neck")}), "no stage named 'neck'"),
    ],
)
def test_a_stage_that_does_not_exist_is_an_error_that_names_those_that_do(policy: FreezePolicy, message: str) -> None:
    with pytest.raises(UnknownStageError, match=message):
        policy.frozen_stages(NAMES, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FreezeFirst(-1), "the count of FreezeFirst must be 0 or more, got -1"),
        (lambda: TrainLast(0), "the count of TrainLast must be 1 or more, got 0; LinearProbe trains the head alone"),
        (lambda: GradualUnfreezing(every=0), "every must be 1 or more, got 0"),
        (lambda: FreezeMatching("stage["), "'stage\\[' is no regular expression"),
        (lambda: ScheduledUnfreeze({}), "phases must begin at epoch 0, got \\[\\]"),
        (lambda: ScheduledUnfreeze({1: LinearProbe()}), "phases must begin at epoch 0, got \\[1\\]"),
        (lambda: ScheduledUnfreeze({0: LinearProbe(), -1: FullFinetune()}), "a phase begins must be 0 or more, got -1"),
        (lambda: ScheduledUnfreeze({0: LinearProbe()}, lr={5: 1e-4}), "lr is given for epoch 5, where no phase begins"),
        (lambda: ScheduledUnfreeze({0: LinearProbe()}, lr={0: 0.0}), "must be above 0, got 0.0"),
        (lambda: ScheduledUnfreeze({0: LinearProbe()}, lr={0: float("nan")}), "a finite number, above 0, got nan"),
    ],
)
def test_wrong_settings_are_refused_at_once(build: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("head", LinearProbe()),
        ("full", FullFinetune()),
        ("gradual", GradualUnfreezing()),
        ("until:stage3", FreezeUntil("stage3")),
        ("last:1", TrainLast(1)),
    ],
)
def test_policies_as_the_terminal_writes_them(text: str, policy: FreezePolicy) -> None:
    assert policy_from_text(text) == policy


@pytest.mark.parametrize(
    "text", ["", "heads", "until:", "until", "last:", "last:0", "last:-1", "last:two", "last:²", "full:3"]
)
def test_other_texts_are_refused_with_the_choices(text: str) -> None:
    with pytest.raises(SettingError, match=r"no freeze policy|the count of TrainLast"):
        policy_from_text(text)


@given(text=st.text(max_size=12) | st.text(max_size=4).map("last:{}".format))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_policy_or_a_setting_error(text: str) -> None:
    with suppress(SettingError):
        assert isinstance(policy_from_text(text), FreezePolicy)
