"""Convolutions that train as one operation with what follows them; the network as it is, is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transferkit import gradients
from transferkit.create import adapt, create_model
from transferkit.exceptions import TransferkitError
from transferkit.freezing import FreezeMatching, FreezePolicy, FullFinetune, TrainLast
from transferkit.fusing import find_fusions, fused
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seed_generators, seeded
from transferkit.trainer import Trainer

# What rounding leaves of a tensor's length. In a network it also moves numbers across the kinks of ReLU and of pooling.
CLOSE, CLOSE_IN_NETWORKS = 1e-5, 5e-3


def keeping(network: nn.Module) -> nn.Module:
    """Put a network into training, with batch norms that keep statistics which say something."""
    network.train()
    with seeded(3):
        for each in network.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                each.training = False
                each.running_mean.uniform_(-0.2, 0.2)
                each.running_var.uniform_(0.5, 2)
                if each.affine:
                    nn.init.uniform_(each.weight, 0.5, 1.5)
                    nn.init.uniform_(each.bias, -0.2, 0.2)
    return network


def in_channels_last(network: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    last = torch.channels_last
    return network.to(memory_format=last), images.contiguous(memory_format=last)


def results(network: nn.Module, images: Tensor, *, fuse: bool) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Return how much is fused, the outputs and all gradients, the pictures' included, of a step in training."""
    network, images = in_channels_last(copy.deepcopy(network), images.clone())
    images.requires_grad_()
    found = find_fusions(network, images[:2].detach()) if fuse else []
    seed_generators(5)
    with fused(found):
        logits = network(images)
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * weights).sum().backward()
    gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return len(found), logits.detach(), {**gradients, "the pictures": images.grad}


def assert_same(network: nn.Module, images: Tensor, *, share: float = CLOSE) -> int:
    """Compare all that training makes of a network, fused and not; return how much was fused."""
    _, logits, expected = results(network, images, fuse=False)
    count, ours, found = results(network, images, fuse=True)
    assert float((ours - logits).norm()) <= CLOSE * float(logits.norm())
    assert found.keys() == expected.keys()
    apart = {name: float((found[name] - each).norm() / each.norm()) for name, each in expected.items() if each.any()}
    assert {name: each for name, each in apart.items() if each > share} == {}
    return count


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=3),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=3),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=3, drop_path_rate=0.3),
    "resnet of timm": lambda: timm.create_model("test_resnet", num_classes=3, drop_rate=0.4),
    "regnety": lambda: timm.create_model("regnety_002", num_classes=3),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_network_as_it_is(name: str) -> None:
    with seeded(0):
        network, images = keeping(NETWORKS[name]()), torch.randn(3, 3, 96, 96)
    assert assert_same(network, images, share=CLOSE_IN_NETWORKS) > 5


KINDS: dict[str, Callable[[bool], nn.Module | None]] = {
    "none": lambda in_place: None,
    "relu": lambda in_place: nn.ReLU(in_place),
    "relu6": lambda in_place: nn.ReLU6(in_place),
    "hardtanh": lambda in_place: nn.Hardtanh(-0.5, 0.25, in_place),
    "silu": lambda in_place: nn.SiLU(in_place),
    "hardswish": lambda in_place: nn.Hardswish(in_place),
    "gelu": lambda in_place: nn.GELU(),
}


@given(
    st.sampled_from(list(KINDS)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_layers_of_every_make_give_the_same(
    kind: str,
    in_place: bool,
    bias: bool,
    affine: bool,
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    seed: int,
) -> None:
    with seeded(seed):
        shape = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "bias": bias}
        # Behind another layer, so that the gradient that goes on to it is looked at too.
        layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, kernel, **shape), nn.BatchNorm2d(8, affine=affine)]
        network = keeping(nn.Sequential(*filter(None, [*layers, KINDS[kind](in_place)])))
        images = torch.randn(3, 3, 12, 12)
    assert assert_same(network, images) == int(affine)


def test_activations_are_computed_with_the_layer_where_their_gradient_can_be_told_from_what_they_give() -> None:
    network = keeping(torchvision.models.mobilenet_v2(num_classes=3))
    found = find_fusions(network, torch.randn(2, 3, 96, 96))
    assert {each.kind for each in found} == {"hardtanh", "none"}
    assert all(type(each.activation) is nn.ReLU6 for each in found if each.kind != "none")
    silu = find_fusions(
        keeping(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())), torch.ones(2, 3, 9, 9)
    )
    assert [each.kind for each in silu] == ["none"]


class Twice(nn.Module):
    """What a layer gives, read by its norm and by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        made = self.layer(images)
        return self.norm(made) + made


class Shared(Twice):
    """A layer and its norm, each used twice."""

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layer(images)) + self.norm(self.layer(-images))


class Standardised(nn.Conv2d):
    """A layer that changes its weight before it uses it."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight / self.weight.std(), self.bias)


def layers(*made: nn.Module) -> nn.Module:
    return nn.Sequential(*made)


def looked_at(which: int) -> nn.Module:
    network = layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    network[which].register_forward_hook(lambda module, given, made: None)
    return network


@pytest.mark.parametrize(
    "network",
    [
        Twice(),
        Shared(),
        layers(Standardised(3, 4, 1), nn.BatchNorm2d(4)),
        layers(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)),
        layers(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        layers(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        layers(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)),
        layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        layers(nn.Conv2d(3, 256, 8, stride=8), nn.BatchNorm2d(256)),
        looked_at(0),
        looked_at(1),
    ],
    ids=[
        "others read it",
        "used twice",
        "standardised",
        "padded by name",
        "reflected",
        "activation between",
        "dropout between",
        "norm that learns nothing",
        "weights larger than pictures",
        "hook on the layer",
        "hook on the norm",
    ],
)
def test_what_cannot_be_fused_or_is_not_worth_it_is_left_alone(network: nn.Module) -> None:
    assert find_fusions(keeping(network), torch.randn(2, 3, 8, 8)) == []


def test_an_activation_that_somebody_looks_at_is_computed_by_itself() -> None:
    (fusion,) = find_fusions(keeping(looked_at(2)), torch.randn(2, 3, 8, 8))
    assert fusion.activation is None


def test_norms_whose_statistics_move_are_left_alone() -> None:
    network = keeping(torchvision.models.resnet18(num_classes=3))
    network.layer1.train()
    found = find_fusions(network, torch.randn(2, 3, 64, 64))
    inside = {id(each) for each in network.layer1.modules()}
    assert found
    assert not [each for each in found if id(each.norm) in inside]


def test_looking_changes_nothing() -> None:
    network = keeping(timm.create_model("test_efficientnet", num_classes=3, drop_rate=0.5))
    network.blocks[0].train()  # statistics that a forward pass moves
    before = copy.deepcopy(network)
    images, state = torch.randn(2, 3, 64, 64), torch.get_rng_state()
    with fused(find_fusions(network, images)):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in network.modules()] == [each.training for each in before.modules()]
    for key, value in before.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    assert not [each for each in network.modules() if "forward" in each.__dict__]


def test_an_error_inside_leaves_the_network_as_it_was() -> None:
    network = keeping(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    found = find_fusions(network, torch.randn(2, 3, 8, 8))
    with pytest.raises(KeyError), fused(found):
        raise KeyError
    assert found
    assert not [each for each in network.modules() if "forward" in each.__dict__]


def test_a_network_that_gives_something_else_is_not_fused() -> None:
    class Looking(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            made = super().forward(images)
            return made * (2 if "forward" in self[0].__dict__ else 1)

    assert find_fusions(keeping(Looking(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), torch.randn(2, 3, 8, 8)) == []


def test_what_is_computed_again_on_the_way_back_is_computed_alike() -> None:
    network = keeping(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    images = torch.randn(2, 3, 8, 8)
    found = find_fusions(network, images)
    with fused(found):
        network(images).sum().backward()
        expected = network[0].weight.grad
        network.zero_grad()
        checkpoint(network, images, use_reentrant=False).sum().backward()
    assert found
    assert torch.equal(network[0].weight.grad, expected)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 48, 48, generator=generator), torch.arange(4) % 2) for _ in range(3)]


def model_of(architecture: str = "timm/test_efficientnet") -> TransferModel:
    model = create_model(architecture, weights=None, num_classes=2, image_size=48, seed=0)
    keeping(model.network)
    model.keep_statistics = True
    return model


def fitted(model: TransferModel, policy: FreezePolicy, **options: Any) -> Trainer:
    optimizer = build_optimizer("sgd", param_groups(model, lr=0.01))
    trainer = Trainer(model, optimizer, policy=policy, device="cpu", **options)
    trainer.fit(batches(), batches()[:1], epochs=2)
    return trainer


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *, allowed: bool = True) -> Iterator[list[int]]:
    """Note how much each phase of a run fuses, or let it fuse nothing."""
    counts: list[int] = []

    def find(module: nn.Module, inputs: Any) -> list[Any]:
        found = find_fusions(module, inputs) if allowed else []
        counts.append(len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "find_fusions", find)
        yield counts


@pytest.mark.parametrize("policy", [FullFinetune(), TrainLast(1), FreezeMatching("stage2")], ids=str)
def test_a_run_that_fuses_learns_what_one_that_does_not_learns(
    monkeypatch: pytest.MonkeyPatch, policy: FreezePolicy
) -> None:
    with counted(monkeypatch) as counts:
        ours = fitted(model_of(), policy)
    with counted(monkeypatch, allowed=False):
        theirs = fitted(model_of(), policy)
    assert counts[0] > 0
    before, found, expected = (each.network.state_dict() for each in (model_of(), ours.model, theirs.model))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)
    norms = [key for key in before if "running" in key or "num_batches" in key]
    assert norms
    assert not [key for key in norms if not torch.equal(found[key], before[key])]
    frozen = {id(each) for stage in ours.model.stages if stage.name in ours.model.frozen for each in stage.parameters}
    still = [name for name, each in ours.model.network.named_parameters() if id(each) in frozen]
    assert not [name for name in still if not torch.equal(found[name], before[name])]


def test_statistics_that_move_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    model.keep_statistics = False
    with counted(monkeypatch) as counts:
        fitted(model, FullFinetune())
    assert counts == [0]


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"torch_compile": True}], ids=str)
def test_other_ways_to_compute_are_left_alone(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)
    with counted(monkeypatch) as counts:
        fitted(model_of(), FullFinetune(), **options)
    assert counts == []


def test_weights_that_are_no_numbers_are_noticed() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = adapt(network, num_classes=2, preprocessing=Preprocessing(size=48, resize_size=48))
    model.keep_statistics = True
    with torch.no_grad():
        model.network[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(TransferkitError, match="no longer a number in step 1"):
        fitted(model, FullFinetune())
