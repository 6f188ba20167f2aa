"""A network in two halves gives what the whole one gives: logits, gradients, statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from transferkit.create import adapt, create_model
from transferkit.exceptions import SplitError
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.splitting import Split, split

SIZE = 32
SMALL = Preprocessing(SIZE, SIZE)
RATES = {"drop_rate": 0.3, "drop_path_rate": 0.3}
ATTENTION = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "img_size": SIZE}
NETWORKS = {
    "test_convnext": RATES,
    "test_efficientnet": RATES,
    "test_nfnet": RATES,
    "test_resnet": RATES,
    "test_vit": {**RATES, **ATTENTION},
}


def dropping(name: str) -> TransferModel:
    """Make a network that drops units, attention and paths while it trains."""
    with seeded(0):
        return adapt(timm.create_model(name, pretrained=False, **NETWORKS[name]), num_classes=3, preprocessing=SMALL)


def own(network: nn.Module, *, head: str) -> TransferModel:
    with seeded(0):
        return adapt(network, num_classes=3, head=head, preprocessing=Preprocessing(8, 8))


def made(model: TransferModel, count: int, *, seed: int = 1) -> Tensor:
    side = model.preprocessing.size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def frozen(model: TransferModel, count: int) -> TransferModel:
    return model.freeze(model.stage_names[:count])


def close(given: Tensor, expected: Tensor, *, scale: float | None = None) -> bool:
    scale = float(expected.abs().max()) if scale is None else scale
    return torch.allclose(given, expected, rtol=0, atol=1e-5 * scale)


def assert_same_in_eval(model: TransferModel, halves: Split, count: int) -> None:
    images = made(model, count)
    model.eval()
    with torch.no_grad():
        assert close(halves.suffix(halves.prefix(images)), model(images))


def trained(model: TransferModel, forward: Callable[[], Any], *, steps: int = 2) -> dict[str, Tensor]:
    """Train for some steps and return the first step's gradients."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
    first: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        with seeded(2, step):
            output = forward()
        logits, *auxiliary = [output] if isinstance(output, Tensor) else [each for each in output if each is not None]
        losses = [nn.functional.cross_entropy(each, torch.arange(len(logits)) % 3) for each in (logits, *auxiliary)]
        torch.stack(losses).sum().backward()
        gradients = {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}
        first = first or gradients
        optimizer.step()
    return first


def assert_trains_alike(model: TransferModel, count: int = 4) -> None:
    """Train a copy whole and the model in halves: the same gradients, and the same state after two steps."""
    whole = copy.deepcopy(model)
    images = made(model, count)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    halves = split(model)
    kept = halves.prefix(images)
    expected = trained(whole, lambda: whole.network(images))
    gradients = trained(model, lambda: halves.suffix(kept))

    assert gradients.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    assert [key for key in gradients if not close(gradients[key], expected[key], scale=largest)] == []
    after, wanted = model.state_dict(), whole.state_dict()
    assert [key for key in after if not torch.allclose(after[key], wanted[key], rtol=1e-4, atol=1e-5)] == []
    for stage in model.stages:
        tensors = {id(each) for each in (*stage.parameters, *stage.buffers)}
        keys = [key for key, each in model.state_dict(keep_vars=True).items() if id(each) in tensors]
        if stage.name in model.frozen:
            assert all(torch.equal(after[key], before[key]) for key in keys), f"{stage.name} is frozen, but changed"
            assert all(each.grad is None for each in stage.parameters)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("part", ["stem", "half", "all but the head"])
def test_halves_train_and_evaluate_as_the_whole_network_does(name: str, part: str) -> None:
    model = dropping(name)
    count = {"stem": 1, "half": len(model.stage_names) // 2, "all but the head": len(model.stage_names) - 1}[part]
    frozen(model, count)
    halves = split(model)
    assert halves.boundary == model.stage_names[count - 1]
    assert halves.stages == model.stage_names[:count]
    for batch in (1, 5):
        assert_same_in_eval(model, halves, batch)
    assert_trains_alike(model)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_networks_of_torchvision_split(name: str) -> None:
    model = create_model(f"torchvision/{name}", weights=None, num_classes=3, image_size=SIZE, seed=0)
    for count in (len(model.stage_names) // 2, len(model.stage_names) - 1):
        frozen(model, count)
        assert_same_in_eval(model, split(model), 5)
    assert_trains_alike(model)


@settings(deadline=None, max_examples=8)
@given(count=st.integers(1, 5), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_boundary_and_any_batch_give_the_whole_networks_logits(count: int, batch: int, seed: int) -> None:
    model = frozen(dropping("test_efficientnet"), count).eval()
    halves = split(model)
    images = made(model, batch, seed=seed)
    kept = halves.prefix(images)
    with torch.no_grad():
        assert close(halves.suffix(kept), model(images))
    assert sum(each.nbytes for each in kept) == batch * halves.bytes_per_picture
    assert [tuple(each.shape[1:]) for each in kept] == list(halves.shapes)
    assert [each.dtype for each in kept] == list(halves.dtypes)


def test_auxiliary_classifiers_train_in_the_suffix() -> None:
    model = create_model("torchvision/googlenet", weights=None, num_classes=3, image_size=32, aux="train", seed=0)
    halves = split(frozen(model, 3))
    assert_same_in_eval(model, halves, 4)
    output = halves.suffix.train()(halves.prefix(made(model, 2)))
    assert type(output) is type(model.network.train()(made(model, 2)))
    assert_trains_alike(model)


def test_two_heads_get_what_each_of_them_receives() -> None:
    model = create_model("timm/deit_tiny_distilled_patch16_224", weights=None, num_classes=3, image_size=SIZE, seed=0)
    halves = split(frozen(model, -1 % len(model.stage_names)))
    assert halves.bytes_per_picture == 2 * 192 * 4
    assert_same_in_eval(model, halves, 3)


class Block(nn.Module):
    """A convolution and its norm, a stage of its own."""

    def __init__(self, inputs: int, outputs: int, **options: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, **options)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.convolution(maps))


class Folding(nn.Module):
    """Works on the four quarters of each picture as if they were pictures, between its stages too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(3, 4, padding=1), Block(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        batch = images.shape[0]
        quarters = images.reshape(batch, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(batch * 4, 3, 4, 4)
        maps = self.second(self.first(quarters).relu())
        return self.head(maps.mean((2, 3)).reshape(batch, 4, 6).mean(1))


def test_a_batch_folded_into_rows_is_kept_picture_by_picture() -> None:
    model = frozen(own(Folding(), head="head"), 1)
    halves = split(model)
    assert halves.shapes == ((4, 4, 4, 4),)
    images = made(model, 5)
    kept = [each[[4, 0, 2]] for each in halves.prefix(images)]
    with torch.no_grad():
        assert close(halves.suffix.eval()(kept), model.eval()(images[[4, 0, 2]]))
    assert_trains_alike(model)


class Widening(nn.Module):
    """Enlarges between its stages, adds what does not depend on the pictures, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(3, 4, padding=1), Block(4, 6)
        self.token = nn.Parameter(torch.ones(1, 6, 20, 20))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        small = self.first(images)
        wide = nn.functional.interpolate(small.relu(), scale_factor=2.0)
        maps = self.second(wide)
        maps = maps + self.token[:, :, : maps.shape[2], : maps.shape[3]].expand(images.size(0), -1, -1, -1)
        maps = nn.functional.dropout(maps, 0.4, training=self.training)
        return self.head(maps.mean((2, 3)).view(small.shape[0], -1))


def test_what_widens_is_computed_again_and_what_pools_is_kept() -> None:
    model = frozen(own(Widening(), head="head"), 1)
    assert split(model).shapes == ((4, 8, 8),)
    assert split(frozen(dropping("test_resnet"), 5)).shapes == ((96,),)


def test_dropout_by_a_function_stays_in_the_half_that_trains() -> None:
    model = frozen(own(Widening(), head="head"), 2)
    assert model.stage_names == ("stem", "stage1", "head")
    halves = split(model)
    assert halves.shapes == ((6, 14, 14),)  # before the dropout, although only the head trains
    kept = halves.prefix(made(model, 3))
    halves.suffix.train()
    outputs = []
    for seed in (0, 0, 1):
        with seeded(seed):
            outputs.append(halves.suffix(kept))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(halves.suffix.eval()(kept), halves.suffix(kept))
    assert_trains_alike(model)


class Overwriting(nn.Module):
    """Changes what the first stage gave in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).mean((2, 3)))


def test_kept_tensors_are_left_as_they_are() -> None:
    model = frozen(own(Overwriting(), head="head"), 1)
    halves = split(model)
    kept = halves.prefix(made(model, 3))
    before = [each.clone() for each in kept]
    first, second = halves.suffix(kept), halves.suffix(kept)
    assert torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(kept, before, strict=True))


class Deciding(nn.Module):
    """Chooses its way by the picture, so it cannot be traced."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)
        self.dropout = dropout

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images) if images.sum() < math.inf else images)
        return self.head(nn.functional.dropout(maps.mean((2, 3)), self.dropout, training=self.training))


def test_a_network_that_cannot_be_traced_is_refused_with_a_reason() -> None:
    model = frozen(own(Deciding(), head="head"), 1)
    with pytest.raises(SplitError, match=r"module/Deciding cannot be split .* cannot be traced \(.*control flow"):
        split(model)


def test_the_head_of_any_network_trains_on_what_it_receives() -> None:
    model = frozen(own(Deciding(), head="head"), 2)
    halves = split(model)
    assert (halves.boundary, halves.shapes) == ("stage1", ((6,),))
    assert_same_in_eval(model, halves, 5)
    assert_trains_alike(model)


def test_dropout_that_no_trace_shows_before_the_head_is_found_out() -> None:
    model = frozen(own(Deciding(dropout=0.5), head="head"), 2)
    with pytest.raises(SplitError, match="cannot be traced"):
        split(model)


class Turned(Block):
    """Gives channels before pictures."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps).transpose(0, 1)


class Turning(Block):
    """Takes channels before pictures."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.transpose(0, 1))


class Doubling(nn.Module):
    """Sees each picture twice; the second views come after all the first ones, or one block hands them on turned."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        views = self.second(self.first(torch.cat([images, images.flip(3)]))).mean((2, 3))
        return self.head(views[: images.shape[0]] + views[images.shape[0] :])


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ((Block(3, 4, padding=1), Block(4, 6)), "the halves give other results in eval mode"),
        ((Turned(3, 4, padding=1), Turning(4, 6)), "no rows that belong to one picture"),
    ],
)
def test_rows_that_are_no_pictures_are_not_kept(blocks: tuple[nn.Module, nn.Module], reason: str) -> None:
    model = frozen(own(Doubling(*blocks), head="head"), 1)
    assert_same_in_eval(model, split(frozen(model, 2)), 3)  # before the head they are pictures again
    with pytest.raises(SplitError, match=reason):
        split(frozen(model, 1))


def test_stages_frozen_behind_one_that_trains_stay_in_the_suffix() -> None:
    model = dropping("test_efficientnet")
    model.freeze([name for name in model.stage_names if name not in ("stage2", "head")])
    assert split(model).stages == ("stem", "stage1")
    assert_trains_alike(model)


def test_kept_statistics_stay_where_stages_train() -> None:
    model = dropping("test_efficientnet")
    model.keep_statistics = True
    frozen(model, 2)
    before = {key: value.clone() for key, value in model.network.named_buffers()}
    assert_trains_alike(model)
    assert all(torch.equal(value, before[key]) for key, value in model.network.named_buffers())


def test_the_suffix_has_the_models_own_tensors_keys_and_modes() -> None:
    model = frozen(dropping("test_efficientnet"), 2)
    suffix = split(model).suffix
    assert list(map(id, suffix.parameters())) == list(map(id, model.parameters()))
    assert suffix.state_dict().keys() == model.state_dict().keys()
    suffix.train()
    assert model.network.training
    assert not any(module.training for stage in model.stages[:2] for module in stage.modules)
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()}, assign=True)
    kept = [torch.ones(2, *shape) for shape in split(model).shapes]
    assert not suffix.eval()(kept).any()


def test_splitting_leaves_the_model_and_the_generators_as_they_were() -> None:
    model = frozen(dropping("test_efficientnet"), 2).train()
    model.network.blocks[-1].eval()
    trained(model, lambda: model(made(model, 4)), steps=1)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    position = torch.get_rng_state()
    split(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [None if each.grad is None else each.grad.tolist() for each in model.parameters()] == [
        None if each is None else each.tolist() for each in gradients
    ]
    assert torch.equal(torch.get_rng_state(), position)


def test_a_prefix_takes_only_the_pictures_and_stages_it_was_made_for() -> None:
    model = frozen(dropping("test_efficientnet"), 2)
    halves = split(model)
    assert not any(each.requires_grad for each in halves.prefix(made(model, 1)))
    with pytest.raises(SplitError, match=r"\(3, 32, 32\), not \(3, 64, 64\)"):
        halves.prefix(torch.zeros(1, 3, 64, 64))
    frozen(model, 3)
    halves.prefix(made(model, 1))
    frozen(model, 1)
    with pytest.raises(SplitError, match="stage1 is no longer frozen"):
        halves.prefix(made(model, 1))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "stem, the first stage of module/EfficientNet, trains"),
        (("stage1", "head"), "stem, the first stage of module/EfficientNet, trains"),
        (("stem", "stage1", "stage2", "stage3", "stage4", "stage5", "head"), "every stage of module/EfficientNet"),
    ],
)
def test_a_model_without_two_halves_is_refused(names: tuple[str, ...], reason: str) -> None:
    model = dropping("test_efficientnet")
    with pytest.raises(SplitError, match=reason):
        split(model.freeze(names))
