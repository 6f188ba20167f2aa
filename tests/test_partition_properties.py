"""Rules of freezing and of the partition into stages that hold for any subset of the stages of any kind of network."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from transferkit.create import create_model
from transferkit.model import TransferModel
from transferkit.randomness import seeded

SIZE = 32

# Convolutions with batch norm, group norm and layer norm; scaled weights; tokens; both; a state-space-like gate.
KINDS = [
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/test_efficientnet_gn",
    "timm/test_byobnet",
    "timm/test_convnext",
    "timm/test_nfnet",
    "timm/test_mambaout",
    "timm/test_vit",
    "timm/test_vit_relpos",
    "timm/test_coatnet",
]

State = dict[str, list[Tensor]]


@cache
def built(kind: str) -> TransferModel:
    with seeded(0):
        return create_model(kind, weights=None, class_names=("ant", "bee", "cat"), image_size=SIZE)


@st.composite
def models_and_subsets(draw: st.DrawFn, subsets: int = 1) -> tuple[Any, ...]:
    """A fresh model and so many subsets of its stages; the whole and the empty one too."""
    model = copy.deepcopy(built(draw(st.sampled_from(KINDS))))
    names = st.sets(st.sampled_from(model.stage_names))
    return model, *(draw(names) for _ in range(subsets))


def tensors(model: TransferModel) -> State:
    return {
        stage.name: [each.detach().clone() for each in (*stage.parameters, *stage.buffers)] for stage in model.stages
    }


def changed(before: State, after: State) -> set[str]:
    """The stages that are not bit-equal."""
    return {
        name
        for name, old in before.items()
        if not all(torch.equal(each, new) for each, new in zip(old, after[name], strict=True))
    }


def named_partition(model: TransferModel) -> dict[str, set[str]]:
    """The dotted names of each stage's parameters, buffers and modules, found by identity."""
    network = model.network
    named = itertools.chain(network.named_parameters(), network.named_buffers(), network.named_modules())
    names = {id(each): name for name, each in named}
    return {
        stage.name: {names[id(each)] for each in (*stage.parameters, *stage.buffers, *stage.modules)}
        for stage in model.stages
    }


def freedom(model: TransferModel) -> dict[str, tuple[Any, ...]]:
    """All that freezing decides, tensor by tensor and module by module."""
    return {
        stage.name: (
            [parameter.requires_grad for parameter in stage.parameters],
            [module.training for module in stage.modules],
            ["train" in module.__dict__ for module in stage.modules],
        )
        for stage in model.stages
    }


def step(model: TransferModel, optimizer: torch.optim.Optimizer) -> None:
    """Train on one batch; gradients are left for the test to look at."""
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    with seeded(2):  # dropout and stochastic depth
        loss = nn.functional.cross_entropy(model(images), torch.arange(4) % 3)
    if loss.requires_grad:  # nothing to train where everything is frozen
        loss.backward()
        optimizer.step()


def sgd(model: TransferModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


@settings(deadline=None, max_examples=40)
@given(models_and_subsets())
def test_a_step_changes_exactly_the_stages_that_are_not_frozen(drawn: tuple[TransferModel, set[str]]) -> None:
    model, frozen = drawn
    model.freeze(frozen).train()
    before = tensors(model)
    step(model, sgd(model))
    assert changed(before, tensors(model)) == set(model.stage_names) - frozen
    for stage in model.stages:
        for parameter in stage.parameters:
            assert (parameter.grad is None) == (stage.name in frozen)


@settings(deadline=None, max_examples=25)
@given(models_and_subsets(subsets=2))
def test_freezing_again_leaves_nothing_of_the_subset_before(drawn: tuple[TransferModel, set[str], set[str]]) -> None:
    model, first, second = drawn
    fresh = copy.deepcopy(model).freeze(second).train()
    optimizer = sgd(model)
    model.freeze(first).train()
    step(model, optimizer)
    model.freeze(second)
    assert model.frozen == fresh.frozen
    assert freedom(model) == freedom(fresh)
    assert all(each.grad is None for stage in model.stages if stage.name in second for each in stage.parameters)
    before = tensors(model)
    step(model, optimizer)  # with momentum and weight decay for what has been frozen since
    assert changed(before, tensors(model)) == set(model.stage_names) - second


@settings(deadline=None, max_examples=40)
@given(drawn=models_and_subsets(), data=st.data())
def test_order_and_duplicates_of_the_names_do_not_matter(
    drawn: tuple[TransferModel, set[str]], data: st.DataObject
) -> None:
    model, frozen = drawn
    expected = freedom(model.freeze(frozen).train())
    repeats = data.draw(st.lists(st.sampled_from(sorted(frozen)))) if frozen else []
    names = data.draw(st.permutations([*frozen, *repeats]))
    other = copy.deepcopy(built(model.name)).freeze(iter(names)).train()
    assert freedom(other) == expected
    assert other.frozen == model.frozen == frozen


OPERATIONS = ["train", "eval", "network.train", "deepcopy", "load", "assign", "freeze"]


@settings(deadline=None, max_examples=40)
@given(drawn=models_and_subsets(), operations=st.lists(st.sampled_from(OPERATIONS), max_size=5), data=st.data())
def test_the_partition_outlives_whatever_is_done_to_the_model(
    drawn: tuple[TransferModel, set[str]], operations: list[str], data: st.DataObject
) -> None:
    model, frozen = drawn
    expected = named_partition(model)
    model.freeze(frozen)
    for operation in operations:
        if operation in ("train", "eval"):
            getattr(model, operation)()
        elif operation == "network.train":
            model.network.train()
        elif operation == "deepcopy":
            model = copy.deepcopy(model)
        elif operation == "freeze":
            frozen = data.draw(st.sets(st.sampled_from(model.stage_names)))
            model.freeze(frozen)
        else:
            state = {key: value.clone() for key, value in model.network.state_dict().items()}
            model.network.load_state_dict(state, assign=operation == "assign")
        assert named_partition(model) == expected
        for stage in model.stages:
            is_frozen = stage.name in frozen
            assert all(parameter.requires_grad != is_frozen for parameter in stage.parameters)
            assert not (is_frozen and any(module.training for module in stage.modules))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_module_is_in_exactly_one_stage(kind: str) -> None:
    model = built(kind)
    held = [id(each) for stage in model.stages for each in (*stage.parameters, *stage.buffers)]
    assert sorted(held) == sorted(map(id, itertools.chain(model.network.parameters(), model.network.buffers())))
    modules = [id(module) for stage in model.stages for module in stage.modules]
    assert len(modules) == len(set(modules))
    assert len(model.stages) >= 3
