"""TransferModel: what is frozen stays frozen, bit for bit, whatever is called on the network."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from transferkit.create import adapt, create_model
from transferkit.exceptions import SettingError, UnknownStageError
from transferkit.model import TransferModel
from transferkit.optim import param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.splitting import split

CLASSES = ("ant", "bee", "cat")
SMALL = Preprocessing(size=32, resize_size=36)


class Small(nn.Module):
    """A body with batch norms and dropout, small enough to train in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = self.block(4, 8)
        self.layer2 = self.block(8, 16)
        self.fc = nn.Linear(16, 10)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(images))).mean((2, 3)))


def small_model() -> TransferModel:
    return adapt(Small(), class_names=CLASSES, preprocessing=SMALL)


def resnet18() -> TransferModel:
    return create_model("torchvision/resnet18", weights=None, class_names=CLASSES, image_size=64)


def batch(seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, size, size, generator=generator), torch.arange(6) % 3


def state(model: TransferModel) -> dict[str, dict[str, Tensor]]:
    """Copy every tensor, by stage and by position in it."""
    return {
        stage.name: {str(n): each.detach().clone() for n, each in enumerate((*stage.parameters, *stage.buffers))}
        for stage in model.stages
    }


def changed_stages(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> set[str]:
    return {
        name for name in before if not all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    }


def optimizer_of(model: TransferModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))


def train(model: TransferModel, optimizer: torch.optim.Optimizer, *, steps: int = 3) -> None:
    model.train()
    for step in range(steps):
        images, labels = batch(step, model.preprocessing.size)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def modes(model: TransferModel, name: str) -> set[bool]:
    (stage,) = [stage for stage in model.stages if stage.name == name]
    return {module.training for module in stage.modules}


# --- shape ---------------------------------------------------------------------------------------------------------


def test_forward_gives_one_logit_per_class_and_is_the_networks_own() -> None:
    model = small_model().eval()
    images, _ = batch()
    assert model(images).shape == (6, 3)
    assert torch.equal(model(images), model.network(images))


@pytest.mark.parametrize("hidden_size", [None, 5])
@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "torchvision/mobilenet_v3_small", "timm/convnext_atto"])
def test_features_are_what_the_head_receives(name: str, hidden_size: int | None) -> None:
    model = create_model(name, weights=None, num_classes=3, hidden_size=hidden_size, dropout=0.2, image_size=64).eval()
    images, _ = batch(size=64)
    features = model.features(images)
    assert features.shape == (6, model.num_features)
    head = model.network.get_submodule(model.head_paths[0])
    if name.endswith("squeezenet1_1"):
        body: nn.Module = models.squeezenet1_1()
        body.load_state_dict({**body.state_dict(), **only_body(model)})
        torch.testing.assert_close(features, body.eval().features(images).mean((2, 3)))  # type: ignore[operator]
    else:
        torch.testing.assert_close(head(features), model(images))
    assert not head._forward_pre_hooks


def test_features_through_the_half_behind_frozen_stages_are_those_of_the_whole_network() -> None:
    model = small_model().eval()
    halves = split(model.freeze(model.stage_names[:3]))
    images, _ = batch()
    with torch.no_grad():
        found = model.features(halves.prefix(images), network=halves.suffix)
        torch.testing.assert_close(found, model.features(images))


def only_body(model: TransferModel) -> dict[str, Tensor]:
    return {key: value for key, value in model.network.state_dict().items() if not key.startswith(model.head_paths)}


def test_state_dict_keys_are_the_native_ones() -> None:
    native = models.resnet18(num_classes=3)
    model = create_model("torchvision/resnet18", weights=None, class_names=CLASSES, dropout=0.3, image_size=64)
    assert list(model.network.state_dict()) == list(native.state_dict())
    native.load_state_dict(model.network.state_dict(), strict=True)
    images, _ = batch(size=64)
    assert torch.equal(native.eval()(images), model.eval()(images))


def test_freezing_adds_no_key_and_keeps_the_native_class() -> None:
    model = resnet18()
    keys = list(model.state_dict())
    model.freeze(["stem", "stage1"])
    assert list(model.state_dict()) == keys
    assert type(model.network) is models.ResNet


def test_stages_hold_the_tensors_that_the_network_holds_now() -> None:
    model = small_model()
    stem = model.stages[0]
    assert stem.parameters[0] is model.network.stem[0].weight
    assert stem.num_parameters == sum(each.numel() for each in model.network.stem.parameters())
    assert [stage.has_batch_norm for stage in model.stages] == [True, True, True, False]
    model.to(torch.float64)
    assert all(buffer.dtype in (torch.float64, torch.int64) for stage in model.stages for buffer in stage.buffers)
    assert model.stages[0].buffers[0] is model.network.stem[1].running_mean


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["ant", "ant"]}, "class_names must be different"),
        ({"class_names": []}, "num_classes must be from 1 to 1,000,000, got 0"),
        ({"num_classes": 0}, "num_classes must be from 1 to 1,000,000"),
        ({"num_classes": -2}, "num_classes must be from 1 to 1,000,000"),
        ({}, "give either class_names or num_classes"),
        ({"class_names": ["ant", "bee"], "num_classes": 2}, "give either class_names or num_classes"),
    ],
)
def test_class_names_that_cannot_be_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        adapt(Small(), preprocessing=SMALL, **arguments)  # type: ignore[arg-type]


# --- freezing ------------------------------------------------------------------------------------------------------


def test_freeze_sets_requires_grad_by_stage() -> None:
    model = small_model().freeze(["stem", "stage2"])
    wants = {stage.name: {parameter.requires_grad for parameter in stage.parameters} for stage in model.stages}
    assert wants == {"stem": {False}, "stage1": {True}, "stage2": {False}, "head": {True}}
    assert model.frozen == {"stem", "stage2"}


def test_freeze_names_exactly_what_is_frozen_afterwards() -> None:
    model = small_model().freeze(["stem", "stage1"]).freeze(["stage2"])
    assert model.frozen == {"stage2"}
    assert all(parameter.requires_grad for parameter in model.network.stem.parameters())
    assert not any(parameter.requires_grad for parameter in model.network.layer2.parameters())


def test_freeze_clears_gradients_of_what_it_freezes_only() -> None:
    model = small_model()
    images, labels = batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    model.freeze(["stem"])
    assert all(parameter.grad is None for parameter in model.network.stem.parameters())
    assert all(parameter.grad is not None for parameter in model.network.layer1.parameters())


def test_an_unknown_stage_changes_nothing_and_says_which_exist() -> None:
    model = small_model().freeze(["stem"])
    with pytest.raises(
        UnknownStageError, match=r"no stage named 'stag1' in module/Small; its stages are stem, .*'stage1'"
    ):
        model.freeze(["stage2", "stag1"])
    assert model.frozen == {"stem"}
    assert all(parameter.requires_grad for parameter in model.network.layer2.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.train(),
        lambda model: model.train(True),
        lambda model: model.network.train(),
        lambda model: model.network.layer1.train(),
        lambda model: model.network.layer1[0].train(),
        lambda model: model.network.layer1[0].bn1.train(),
        lambda model: model.eval().train(),
        lambda model: model.network.requires_grad_(False).train(),
    ],
    ids=["model", "model True", "network", "layer", "block", "norm", "eval then train", "chained"],
)
def test_a_frozen_stage_stays_in_eval_mode_through(call: Callable[[TransferModel], object]) -> None:
    model = resnet18().train().freeze(["stem", "stage1"])
    call(model)
    assert modes(model, "stem") == modes(model, "stage1") == {False}


def test_train_on_a_frozen_module_still_returns_it() -> None:
    model = resnet18().freeze(["stem"])
    assert model.network.bn1.train() is model.network.bn1
    assert model.train() is model


def test_trained_stages_follow_train_and_eval() -> None:
    model = resnet18().freeze(["stem"]).train()
    assert modes(model, "stage1") == modes(model, "head") == {True}
    model.eval()
    assert modes(model, "stage1") == modes(model, "head") == {False}


def test_unfreezing_gives_back_the_normal_train() -> None:
    model = resnet18().train().freeze(["stem", "stage1"]).freeze([])
    assert modes(model, "stage1") == {True}
    assert all("train" not in vars(module) for module in model.modules())
    model.network.layer1.eval()
    assert modes(model, "stage1") == {False}
    model.network.layer1[0].bn1.train()
    assert model.network.layer1[0].bn1.training


def test_freezing_in_eval_mode_stays_in_eval_mode() -> None:
    model = small_model().eval().freeze(["stem"]).freeze([])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_as_frozen_as_its_original_and_leaves_it_alone(
    copied: Callable[[TransferModel], TransferModel],
) -> None:
    original = small_model().train().freeze(["stem", "stage1"])
    twin = copied(original)
    assert twin.frozen == original.frozen
    twin.network.train()
    assert modes(twin, "stem") == modes(twin, "stage1") == {False}
    assert modes(twin, "stage2") == {True}

    original.eval()
    twin.network.layer1[1].train()
    twin.network.layer2.train()
    assert not any(module.training for module in original.modules())
    twin.freeze([]).train()
    assert all(module.training for module in twin.modules())
    original.network.train()
    assert modes(original, "stem") == {False}

    before = state(original)
    train(twin, optimizer_of(twin), steps=1)
    assert changed_stages(before, state(original)) == set()


def saved(model: TransferModel) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "frozen", [{"stem"}, {"stem", "stage1"}, {"stem", "stage1", "stage2"}, {"stage1"}, {"head"}, set()]
)
def test_frozen_tensors_are_bit_equal_after_training_and_the_others_move(frozen: set[str]) -> None:
    model = small_model().freeze(frozen)
    before = state(model)
    train(model, optimizer_of(model))
    assert changed_stages(before, state(model)) == set(model.stage_names) - frozen


def test_the_same_holds_for_a_real_network() -> None:
    model = create_model("timm/resnet10t", weights=None, class_names=CLASSES, image_size=64)
    model.freeze(["stem", "stage1", "stage2"])
    before = state(model)
    train(model, optimizer_of(model), steps=2)
    assert changed_stages(before, state(model)) == {"stage3", "stage4", "head"}


def test_batch_statistics_of_a_frozen_stage_play_no_part() -> None:
    model = small_model().freeze(["stem", "stage1", "stage2"]).train()
    images, _ = batch()
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_dropout_and_stochastic_depth_of_a_frozen_stage_are_off() -> None:
    model = create_model("torchvision/efficientnet_b0", weights=None, class_names=CLASSES, image_size=32)
    images, _ = batch()
    model.freeze(model.stage_names[:-1]).train()
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.freeze([])
        assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("momentum", ["adamw", "sgd"])
def test_freezing_again_stops_weights_at_once_despite_the_optimizers_momentum(momentum: str) -> None:
    model = small_model()
    groups = param_groups(model, lr=1e-2, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups) if momentum == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    model.train()
    for step in range(2):
        images, labels = batch(step)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()  # no zero_grad: gradients are there when the stage is frozen
    model.freeze(["stem", "stage1"])
    before = state(model)
    train(model, optimizer, steps=2)
    assert changed_stages(before, state(model)) == {"stage2", "head"}
    model.freeze([])
    train(model, optimizer, steps=1)
    assert changed_stages(before, state(model)) == set(model.stage_names)


def test_a_weight_tied_across_stages_follows_its_first_user() -> None:
    network = Small()
    network.layer2.insert(0, nn.BatchNorm2d(8))
    network.layer2[0].weight = network.layer1[1].weight
    model = adapt(network, class_names=CLASSES, preprocessing=SMALL).freeze(["stem", "stage1"])
    before = state(model)
    train(model, optimizer_of(model))
    assert changed_stages(before, state(model)) == {"stage2", "head"}
    before = state(model.freeze(["stage2"]))
    train(model, optimizer_of(model))
    assert changed_stages(before, state(model)) == {"stem", "stage1", "head"}


def test_a_batch_norm_shared_across_stages_keeps_its_statistics_when_its_first_user_is_frozen() -> None:
    network = Small()
    network.layer2.insert(0, nn.Sequential(nn.Identity(), network.layer1[1]))
    model = adapt(network, class_names=CLASSES, preprocessing=SMALL).freeze(["stem", "stage1"])
    before = state(model)
    train(model, optimizer_of(model))
    assert changed_stages(before, state(model)) == {"stage2", "head"}


# --- summary -------------------------------------------------------------------------------------------------------


def test_summary_shows_what_is_frozen() -> None:
    assert small_model().freeze(["stem", "stage1"]).summary().splitlines() == [
        "stage   parameters           batch norm",
        "stem           120  frozen   kept",
        "stage1         312  frozen   kept",
        "stage2       1,200  trained  trained",
        "head            51  trained  –",
    ]


def test_summary_shows_the_optimizers_own_rates() -> None:
    model = small_model().freeze(["stem"])
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.5))
    rows = [line.split() for line in model.summary(optimizer).splitlines()]
    assert rows[0] == ["stage", "parameters", "batch", "norm", "lr", "weight", "decay"]
    assert rows[1] == ["stem", "120", "frozen", "kept", "–", "–"]
    assert rows[2] == ["stage1", "312", "trained", "trained", "0.00025", "0", "/", "0.05"]
    assert rows[4] == ["head", "51", "trained", "–", "0.001", "0", "/", "0.05"]


def test_kept_statistics_stay_while_the_norms_weights_train() -> None:
    model = create_model("torchvision/resnet18", weights=None, num_classes=2, seed=0)
    model.keep_statistics = True
    model.freeze(["stem"]).train()
    norm = model.network.layer1[0].bn1
    assert not norm.training
    assert model.network.layer1.training
    mean, weight = norm.running_mean.clone(), norm.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert torch.equal(norm.running_mean, mean)
    assert not torch.equal(norm.weight, weight)
    assert [line.split()[3] for line in model.summary().splitlines()[1:-1]] == ["kept"] * 5
    model.keep_statistics = False
    assert model.freeze([]).network.layer1[0].bn1.training
