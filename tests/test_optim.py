"""Parameter groups and optimizers, with real torch networks and real steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from transferkit.exceptions import SettingError
from transferkit.optim import build_optimizer, param_groups


@dataclass(frozen=True)
class StageOf:
    name: str
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Model:
    network: nn.Module
    stages: Sequence[StageOf]


NAMES = ("stem", "stage1", "stage2", "head")


def tiny_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.LayerNorm([4, 4, 4]), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8)),
        nn.Linear(8, 3),
    )


def staged(network: nn.Module) -> Model:
    parts = zip(NAMES, network.children(), strict=True)
    return Model(network, [StageOf(name, tuple(part.parameters())) for name, part in parts])


def lr_by_stage(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {group["stage"]: group["lr"] for group in groups}


@given(layer_decay=st.floats(0.1, 1.0), weight_decay=st.floats(0.0, 1.0), multiplier=st.floats(0.1, 100.0))
@settings(max_examples=25, deadline=None)
def test_every_parameter_is_in_exactly_one_group_by_identity(
    layer_decay: float, weight_decay: float, multiplier: float
) -> None:
    network = tiny_network()
    groups = param_groups(
        staged(network), lr=0.1, weight_decay=weight_decay, layer_decay=layer_decay, head_lr_multiplier=multiplier
    )
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in network.parameters()}
    assert all(group["params"] for group in groups)


def test_learning_rates_fall_by_layer_decay_from_the_head_down() -> None:
    groups = param_groups(staged(tiny_network()), lr=0.8, layer_decay=0.5, head_lr_multiplier=10)
    assert lr_by_stage(groups) == pytest.approx({"stem": 0.1, "stage1": 0.2, "stage2": 0.4, "head": 8.0})


def test_without_layer_decay_there_are_still_groups_per_stage() -> None:
    groups = param_groups(staged(tiny_network()), lr=0.1)
    assert lr_by_stage(groups) == dict.fromkeys(NAMES, 0.1)
    assert [group["stage"] for group in groups] == [name for name in NAMES for _ in range(2)]


def test_norms_and_biases_are_not_decayed() -> None:
    network = tiny_network()
    groups = param_groups(staged(network), lr=0.1, weight_decay=0.05)
    decayed = {id(parameter) for group in groups if group["weight_decay"] == 0.05 for parameter in group["params"]}
    kernels = {id(module.weight) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert decayed == kernels
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_names_in_the_networks_own_no_weight_decay_are_not_decayed() -> None:
    class Timmish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.ones(1, 2, 4))
            self.tables = nn.ParameterList([torch.ones(2, 2)])
            self.head = nn.Linear(4, 2)

        def no_weight_decay(self) -> set[str]:
            return {"pos_embed", "tables.*"}

    network = Timmish()
    stages = [
        StageOf("stem", (network.pos_embed, *network.tables)),
        StageOf("head", tuple(network.head.parameters())),
    ]
    groups = param_groups(Model(network, stages), lr=0.1, weight_decay=0.05)
    assert [(group["stage"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("stem", 0.0, 2),
        ("head", 0.05, 1),
        ("head", 0.0, 1),
    ]


def test_a_real_vision_transformer_lists_its_own_undecayed_parameters() -> None:
    import timm

    network = timm.create_model("test_vit", num_classes=3)
    head = tuple(network.get_classifier().parameters())
    rest = tuple(p for p in network.parameters() if all(p is not other for other in head))
    groups = param_groups(Model(network, [StageOf("stage1", rest), StageOf("head", head)]), lr=0.1, weight_decay=0.05)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in undecayed and p.ndim > 1}
    assert names == {"pos_embed", "cls_token"}


def test_freezing_does_not_change_the_groups() -> None:
    network = tiny_network()
    before = param_groups(staged(network), lr=0.1, layer_decay=0.5)
    network[:2].requires_grad_(False)
    after = param_groups(staged(network), lr=0.1, layer_decay=0.5)
    assert [[id(p) for p in group["params"]] for group in before] == [[id(p) for p in g["params"]] for g in after]
    assert lr_by_stage(before) == lr_by_stage(after)


def test_one_sgd_step_moves_each_stage_in_proportion_to_its_learning_rate() -> None:
    network = tiny_network()
    groups = param_groups(staged(network), lr=0.8, layer_decay=0.5, head_lr_multiplier=2)
    optimizer = build_optimizer(functools.partial(torch.optim.SGD), groups)
    before = {id(p): p.detach().clone() for p in network.parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in groups:
        for parameter in group["params"]:
            moved = before[id(parameter)] - parameter.detach()
            torch.testing.assert_close(moved, torch.full_like(moved, group["lr"]))


def test_a_weight_shared_by_two_modules_is_grouped_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    groups = param_groups(Model(network, [StageOf("stem", (network[0].weight,)), StageOf("head", ())]), lr=0.1)
    assert [group["stage"] for group in groups] == ["stem"]


def test_a_parameter_outside_all_stages_is_named() -> None:
    model = staged(tiny_network())
    with pytest.raises(SettingError, match=r"in none: 3\.weight, 3\.bias"):
        param_groups(Model(model.network, model.stages[:-1]), lr=0.1)


def test_a_parameter_in_two_stages_is_named() -> None:
    model = staged(tiny_network())
    stem_weight = model.stages[0].parameters[0]
    doubled = [*model.stages[:-1], StageOf("head", (*model.stages[-1].parameters, stem_weight))]
    with pytest.raises(SettingError, match=r"in several: 0\.0\.weight"):
        param_groups(Model(model.network, doubled), lr=0.1)


def test_a_parameter_of_another_network_is_refused() -> None:
    model = staged(tiny_network())
    foreign = [*model.stages[:-1], StageOf("head", (*model.stages[-1].parameters, nn.Parameter(torch.ones(1))))]
    with pytest.raises(SettingError, match="not in the network: 1"):
        param_groups(Model(model.network, foreign), lr=0.1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -0.1),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("head_lr_multiplier", 0.0),
    ],
)
def test_a_setting_outside_its_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"^{setting} must be .*, got {value}$"):
        param_groups(staged(tiny_network()), **{"lr": 0.1, setting: value})


def test_named_optimizers_are_the_torch_ones() -> None:
    groups = param_groups(staged(tiny_network()), lr=0.1, weight_decay=0.05)
    adamw = build_optimizer("adamw", groups, betas=(0.8, 0.9))
    sgd = build_optimizer("sgd", groups)
    assert type(adamw) is torch.optim.AdamW
    assert type(sgd) is torch.optim.SGD
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in sgd.param_groups)
    for optimizer in (adamw, sgd):
        kept = [(group["lr"], group["weight_decay"], group["stage"]) for group in optimizer.param_groups]
        assert kept == [(group["lr"], group["weight_decay"], group["stage"]) for group in groups]


def test_any_callable_makes_the_optimizer() -> None:
    groups = param_groups(staged(tiny_network()), lr=0.1)
    optimizer = build_optimizer(functools.partial(torch.optim.RMSprop, alpha=0.9), groups, eps=1e-6)
    assert type(optimizer) is torch.optim.RMSprop
    assert (optimizer.param_groups[0]["alpha"], optimizer.param_groups[0]["eps"]) == (0.9, 1e-6)


def test_two_optimizers_of_one_list_do_not_share_groups() -> None:
    groups = param_groups(staged(tiny_network()), lr=0.1)
    first, second = build_optimizer("sgd", groups), build_optimizer("sgd", groups)
    first.param_groups[0]["lr"] = 0.7
    assert second.param_groups[0]["lr"] == groups[0]["lr"] == 0.1
    assert "momentum" not in groups[0]


def test_an_unknown_optimizer_is_answered_with_the_closest() -> None:
    with pytest.raises(SettingError, match=r"no optimizer named 'adam'.*did you mean 'adamw'"):
        build_optimizer("adam", param_groups(staged(tiny_network()), lr=0.1))


def test_an_option_that_the_groups_would_override_is_refused() -> None:
    with pytest.raises(SettingError, match="lr belongs to the parameter groups"):
        build_optimizer("sgd", param_groups(staged(tiny_network()), lr=0.1), lr=0.5)


def test_an_option_that_the_optimizer_lacks_is_refused() -> None:
    with pytest.raises(SettingError, match=r"optimizer 'adamw' refuses options .*momentum"):
        build_optimizer("adamw", param_groups(staged(tiny_network()), lr=0.1), momentum=0.9)


def test_a_factory_that_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(SettingError, match="returned list, no torch Optimizer"):
        build_optimizer(list, param_groups(staged(tiny_network()), lr=0.1))  # type: ignore[arg-type]
