"""The fast way through a network gives what the network gives, and leaves the network alone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from transferkit import inference
from transferkit.create import create_model
from transferkit.exceptions import SettingError
from transferkit.folding import fold_norms, pack_convolutions, part_wide_modules
from transferkit.inference import ENGINES, fast_forward, micro_batch
from transferkit.randomness import seeded
from transferkit.splitting import split

NORMS = (nn.modules.batchnorm._BatchNorm,)
# side of the pictures, and how many norms are left: those that do not come right behind a layer
NETWORKS = {
    "torchvision/mobilenet_v2": (64, 0),
    "torchvision/mobilenet_v3_small": (64, 0),
    "torchvision/resnet18": (64, 0),
    "torchvision/densenet121": (32, 62),
    "timm/test_convnext": (32, 0),
    "timm/test_efficientnet": (32, 0),
    "timm/test_nfnet": (32, 0),
    "timm/test_resnet": (32, 0),
    "timm/test_vit": (160, 0),
    "timm/tf_mobilenetv3_small_minimal_100": (33, 0),
}
MORE_NETWORKS = {
    "torchvision/shufflenet_v2_x0_5": (32, 0),
    "torchvision/regnet_y_400mf": (32, 0),
    "timm/levit_128s": (224, 48),
    "timm/repvgg_a0": (32, 17),
    "timm/hrnet_w18_small": (64, 0),
    "timm/swin_tiny_patch4_window7_224": (224, 0),
    "timm/maxvit_rmlp_pico_rw_256": (256, 11),
    "timm/mobilevit_xxs": (64, 0),
}


def stirred(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not those they start with."""
    generator = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, NORMS) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(norm.bias, 0, 0.2, generator=generator)
    return network


def made(name: str) -> nn.Module:
    library, _, architecture = name.partition("/")
    with seeded(0):
        if library == "torchvision":
            return stirred(getattr(torchvision.models, architecture)(num_classes=5))
        return stirred(timm.create_model(architecture, pretrained=False, num_classes=5))


def images(count: int, size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def expected_of(module: nn.Module, inputs: Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(inputs)


def close(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and torch.allclose(
        given, expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def left(forward: Any) -> list[nn.Module]:
    """List the modules of the copy that computes."""
    run = forward.args[0]
    if not isinstance(run, inference._SideBySide):
        return list(run.args[0].modules())
    network = run.idle.get()
    run.idle.put(network)
    return list(network.modules())


def norms(modules: Any) -> int:
    return sum(isinstance(each, NORMS) for each in modules)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Block(nn.Module):
    """Convolution, norm, activation, put together by a subclass."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        with seeded(3):
            self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, bias=False)
            self.norm = norm or nn.BatchNorm2d(3)
            self.act = nn.ReLU()
        stirred(self)


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.conv(x))))


class ReadByTwo(Block):
    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return self.act(self.norm(made)) + made.tanh()


class Returned(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.conv(x)
        return made, self.norm(made)


class NormTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class SharedWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight, padding=1)


class OnItsOwnBatch(Block):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3, track_running_stats=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class InPlaceBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).mul_(2))


class ActivationTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.other(x))))


class ReadBeforeActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return made.sum(1, keepdim=True) + self.act(made)


class ReadAfterInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.act.inplace = True
        made = self.conv(x)
        return self.act(made).sum(1, keepdim=True) + made


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class WithStandardised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Remembers(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        x = self.norm(self.conv(x))
        return x + self.seen.mean((1, 2, 3), keepdim=True)


def assert_same(name: str, size: int, kept: int) -> None:
    network, inputs = made(name), images(3, size)
    expected = expected_of(network, inputs)
    assert expected.std() > 0
    with threads(2):
        forward = fast_forward(network, inputs)
    assert close(forward(inputs), expected)
    assert norms(left(forward)) == kept


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_without_norms_behind_its_layers(name: str) -> None:
    assert_same(name, *NETWORKS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", MORE_NETWORKS)
def test_more_networks_give_the_same(name: str) -> None:
    assert_same(name, *MORE_NETWORKS[name])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardtanh])
def test_convolutions_take_in_their_activation(kind: Any, in_place: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), kind(inplace=in_place))
    forward = fast_forward(module, images(2))
    assert kind not in map(type, left(forward))
    assert close(forward(images(5) * 9), expected_of(module, images(5) * 9))


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Twice(), 1),
        (ReadByTwo(), 1),
        (Returned(), 1),
        (NormTwice(), 1),
        (SharedWeight(), 1),
        (OnItsOwnBatch(), 1),
        (InPlaceBetween(), 1),
        (WithStandardised(), 1),
        (ActivationTwice(), 1),
        (ReadBeforeActivation(), 1),
        (ReadAfterInPlace(), 1),
        (Remembers(), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_what_others_read_is_left_alone(module: nn.Module, kept: int) -> None:
    inputs = images(5)
    folded = copy.deepcopy(module).eval().requires_grad_(False)
    fold_norms(folded, inputs)
    pack_convolutions(folded, inputs, rows=2)
    wanted, found = expected_of(module, inputs), folded(inputs)
    for one, other in zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]:
        assert close(other, one)
    assert norms(folded.modules()) == kept


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False), BatchNormAct2d(4, act_layer=nn.SiLU)],
        [nn.Conv2d(3, 6, 3, stride=2, groups=3), BatchNormAct2d(6, drop_layer=nn.Dropout)],
        [nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False), nn.Hardswish()],
        [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)],
        [nn.Conv2d(3, 4, 3, dilation=2), nn.BatchNorm2d(4, eps=0.1), nn.Hardtanh(-0.1, 0.2)],
        [nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4), nn.ReLU()],
        [nn.Flatten(), nn.Linear(768, 4, bias=False), nn.BatchNorm1d(4)],
        [nn.Flatten(2), nn.Conv1d(3, 4, 5), nn.BatchNorm1d(4)],
        [nn.Unflatten(3, (4, 4)), nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU()],
    ],
    ids=lambda layers: ",".join(type(each).__name__ for each in layers),
)
def test_layers_of_every_make_are_folded(layers: list[nn.Module]) -> None:
    module, inputs = stirred(nn.Sequential(*layers)), images(5)
    expected = expected_of(module, inputs)
    forward = fast_forward(module, inputs)
    assert norms(left(forward)) == 0
    assert close(forward(inputs), expected)


def test_a_linear_layer_over_tokens_is_not_folded_into_the_norm_over_them() -> None:
    module = stirred(nn.Sequential(nn.Flatten(2), nn.Linear(256, 7), nn.BatchNorm1d(3)))
    forward = fast_forward(module, images(2))
    assert norms(left(forward)) == 1
    assert close(forward(images(2)), expected_of(module, images(2)))


class Residual(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return images + super().forward(images)


class Noted(nn.Sequential):
    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(images)


class Twice(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        block = self[0]
        return block(block(images))


class WithScale(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return self[0](images, scale=2.0)


def wide_block(kind: Any = nn.Sequential, inner: int = 48) -> nn.Sequential:
    return kind(nn.Conv2d(3, inner, 1), nn.ReLU(), nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, 3, 1))


@pytest.mark.parametrize(
    ("network", "parted"),
    [
        (nn.Sequential(wide_block()), ["0"]),
        (nn.Sequential(wide_block(Residual)), ["0"]),
        (nn.Sequential(nn.Sequential(wide_block(), nn.ReLU()), wide_block()), ["0.0", "1"]),
        (nn.Sequential(wide_block(inner=4)), []),  # not wider inside than outside
        (nn.Sequential(wide_block(inner=400)), []),  # weights that each picture would read anew
        (Twice(wide_block()), []),
        (WithScale(wide_block(Noted)), []),
        (wide_block(), []),  # the whole network
    ],
    ids=["block", "residual", "nested", "narrow", "heavy", "twice", "named", "whole"],
)
def test_wide_blocks_see_one_picture_at_a_time(network: nn.Module, parted: list[str]) -> None:
    network.eval().requires_grad_(False)
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    seen: list[int] = []
    blocks = {each: name for name, each in network.named_modules() if name in parted}
    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    part_wide_modules(network, images, limit=40_000)
    names = [name.removesuffix(".one_by_one") for name, _ in network.named_modules() if name.endswith("one_by_one")]
    assert names == parted
    seen.clear()
    assert torch.allclose(network(images), expected, atol=1e-6)
    assert seen == [1, 1, 1] * len(parted)


def test_a_block_that_mixes_its_pictures_is_not_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixing(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            wide = self[1](self[0](images))
            return self[3](wide - wide.mean(0, keepdim=True))

    network = nn.Sequential(wide_block(Mixing), nn.Flatten(), nn.Linear(3 * 24 * 24, 2))
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(inference, "_WIDE", 40_000)
    forward = fast_forward(network, images)
    assert torch.allclose(forward(images), network.eval()(images), atol=1e-5)


def test_the_original_is_untouched() -> None:
    model = create_model("timm/test_efficientnet", weights=None, num_classes=3, image_size=32)
    stirred(model.network)
    model.freeze(model.stage_names[:2]).train()
    heard: list[str] = []
    model.network.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.network.state_dict())
    modes = {name: each.training for name, each in model.network.named_modules()}
    kept = {name for name, each in model.network.named_modules() if "train" in vars(each)}
    trains = {name for name, each in model.network.named_parameters() if each.requires_grad}
    types = {name: type(each) for name, each in model.network.named_modules()}
    hooks = {
        name: len(each._forward_hooks) + len(each._forward_pre_hooks) for name, each in model.network.named_modules()
    }
    generator = torch.get_rng_state()
    forward = fast_forward(model.network, images(2, 32))
    forward(images(5, 32))
    assert not heard
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert modes == {name: each.training for name, each in model.network.named_modules()}
    assert True in modes.values()
    assert False in modes.values()
    assert kept == {name for name, each in model.network.named_modules() if "train" in vars(each)} != set()
    assert trains == {name for name, each in model.network.named_parameters() if each.requires_grad} != set()
    assert types == {name: type(each) for name, each in model.network.named_modules()}
    assert hooks == {
        name: len(each._forward_hooks) + len(each._forward_pre_hooks) for name, each in model.network.named_modules()
    }
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.get_num_threads() == 1


def test_it_keeps_the_weights_it_was_made_with() -> None:
    network, inputs = made("timm/test_resnet"), images(3, 32)
    expected = expected_of(network, inputs)
    forward = fast_forward(network, inputs)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert close(forward(inputs), expected)


def test_dropout_and_norms_are_in_eval_mode_though_the_original_trains() -> None:
    module = nn.Sequential(stirred(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), nn.Dropout(0.9)).train()
    assert close(fast_forward(module, images(2))(images(4)), expected_of(module, images(4)))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_batches_of_every_size(monkeypatch: pytest.MonkeyPatch, workers: int, count: int) -> None:
    monkeypatch.setattr(inference, "_PIXELS", 3 * 16 * 16)
    module = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    with threads(workers):
        forward = fast_forward(module, images(2))
        given = forward(images(count))
        assert torch.get_num_threads() == workers
    assert given.shape == (count, 4, 14, 14)
    assert count == 0 or close(given, expected_of(module, images(count)))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 600), st.integers(1, 600), st.integers(1, 64))
def test_a_micro_batch_keeps_all_workers_busy_within_its_pixels(
    count: int, height: int, width: int, workers: int
) -> None:
    size = micro_batch(count, height, width, workers=workers)
    assert 1 <= size <= count
    assert size == 1 or size * height * width <= 8 * 224 * 224
    assert size == 1 or (size - 1) * workers < count


def test_the_same_batch_gives_the_same_bits() -> None:
    network, inputs = made("timm/test_efficientnet"), images(7, 64)
    with threads(2):
        forward = fast_forward(network, inputs)
        first = forward(inputs)
        assert all(torch.equal(forward(inputs), first) for _ in range(5))
        assert torch.equal(fast_forward(network, inputs)(inputs), first)


def test_a_forward_that_notes_things_on_its_module_runs_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_PIXELS", 1)
    module, inputs = Remembers(), images(64)
    with threads(4):
        assert close(fast_forward(module, inputs)(inputs), expected_of(module, inputs))


def test_results_can_be_trained_on() -> None:
    forward = fast_forward(made("timm/test_resnet"), images(2, 32))
    head = nn.Linear(5, 2)
    with torch.enable_grad():
        given = forward(images(3, 32))
        head(given).sum().backward()
    assert not given.requires_grad
    assert head.weight.grad is not None


Pair = namedtuple("Pair", ["first", "second"])


class Several(Block):
    def forward(self, x: Tensor) -> Any:
        made = self.norm(self.conv(x))
        return Pair(made, (made.mean((2, 3)), None)), [self.other(x)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nested_results_keep_their_form(count: int) -> None:
    module = Several()
    with threads(2):
        pair, rest = fast_forward(module, images(1))(images(count))
    assert isinstance(pair, Pair)
    assert pair.second[1] is None
    found = [pair.first, pair.second[0], *rest]
    assert [tuple(each.shape) for each in found] == [(count, 3, 16, 16), (count, 3), (count, 3, 16, 16)]
    if count:
        wanted, others = expected_of(module, images(count))
        assert all(map(close, found, [wanted.first, wanted.second[0], *others]))


def test_the_frozen_half_of_a_split_runs_too() -> None:
    model = create_model("timm/test_efficientnet", weights=None, num_classes=3, image_size=32)
    stirred(model.network)
    halves = split(model.freeze(model.stage_names[:-2]))
    forward = fast_forward(halves.frozen_half, images(2, 32))
    kept = forward(images(5, 32))
    assert norms(left(forward)) < norms(model.modules())
    assert all(map(close, kept, halves.prefix(images(5, 32))))


class MixesPictures(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) - x.mean(0, keepdim=True)


class NeedsContiguous(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.view(len(x), -1).view(x.shape)))


class Random(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + torch.rand(1)


class ReadsItsNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight.mean()


@pytest.mark.parametrize(
    "module", [MixesPictures(), NeedsContiguous(), ReadsItsNorm()], ids=lambda each: type(each).__name__
)
def test_what_does_not_give_the_same_is_not_done(module: nn.Module) -> None:
    with threads(2):
        assert close(fast_forward(module, images(2))(images(4)), expected_of(module, images(4)))


def test_a_network_that_draws_random_numbers_moves_no_generator_while_it_is_looked_at() -> None:
    state = torch.get_rng_state()
    forward = fast_forward(Random(), images(2))
    assert torch.equal(state, torch.get_rng_state())
    assert forward(images(3)).shape == (3, 3, 16, 16)


def test_a_network_that_cannot_be_copied_runs_itself_in_eval_mode() -> None:
    module = nn.Sequential(Block().conv, nn.Dropout(0.9)).train()
    module[1].eval()
    module.last = module[0](images(1)).sum() * 2  # has a history, so torch does not copy it
    forward = fast_forward(module, images(1))
    with torch.no_grad():
        assert torch.equal(forward(images(2)), module[0](images(2)))
    assert [each.training for each in module.modules()] == [True, True, False]


def test_a_function_in_place_of_forward_is_called_with_the_original() -> None:
    module = nn.Sequential(Block().conv, Block().norm).train()
    inner = module.forward
    module.forward = lambda x: inner(x) * 2
    expected = expected_of(nn.Sequential(*module), images(3)) * 2
    assert close(fast_forward(module, images(1))(images(3)), expected)
    assert module[1].num_batches_tracked == 0


def test_autocast_does_not_concern_it() -> None:
    network, inputs = made("timm/test_efficientnet"), images(4, 32)
    expected = expected_of(network, inputs)
    with torch.autocast("cpu", torch.bfloat16), threads(2):
        forward = fast_forward(network, inputs)
        for count in (1, 4):
            assert close(forward(inputs[:count]), expected[:count])


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext"])
def test_it_computes_as_autocast_does_where_that_is_asked_for(name: str) -> None:
    network, inputs = made(name), images(5, 160)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        theirs = expected_of(network, inputs)
    with threads(2):
        forward = fast_forward(network, inputs, autocast=torch.bfloat16)
        given = forward(inputs)
        assert torch.equal(given, forward(inputs))
    expected = expected_of(network, inputs)
    assert given.dtype == theirs.dtype == torch.bfloat16
    off, allowed = ((each.float() - expected).norm() / expected.norm() for each in (given, theirs))
    assert float(off) < max(0.02, 2 * float(allowed))
    assert not torch.equal(given.float(), expected)
    assert [key for key, value in network.state_dict().items() if not torch.equal(value, weights[key])] == []
    assert not torch.is_autocast_enabled("cpu")


def test_a_network_that_autocast_leads_astray_computes_in_the_type_of_its_weights() -> None:
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            made = self.layer(inputs)
            return 1e6 * (made - self.layer(inputs.double().float() * (1 + 1e-4)))

    network, inputs = Cancelling().eval(), images(3, 32)
    given = fast_forward(network, inputs, autocast=torch.bfloat16)(inputs)
    assert given.dtype == torch.float32
    assert close(given, expected_of(network, inputs))


def test_half_precision_weights_compute_in_half_precision() -> None:
    network, inputs = made("timm/test_resnet").bfloat16(), images(3, 32).bfloat16()
    given, expected = fast_forward(network, inputs)(inputs), expected_of(network, inputs)
    assert given.dtype == torch.bfloat16
    assert torch.allclose(given, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_it_leaves_nothing_behind() -> None:
    with threads(2):
        forward = fast_forward(made("timm/test_resnet"), images(2, 32))
        forward(images(4, 32))
    pool = weakref.ref(forward.args[0].pool)
    workers = list(forward.args[0].pool._threads)
    del forward
    gc.collect()
    assert pool() is None
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(SettingError, match="engine='fast'; it can be eager, compile, onnxruntime, openvino"):
        fast_forward(nn.Identity(), images(1), engine="fast")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_that_is_not_installed_names_its_extra(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=rf"needs onnx, onnxscript, {engine}; .*transferkit\[{engine}\]"):
        fast_forward(made("timm/test_resnet"), images(1, 32), engine=engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_runtime_computes_in_single_precision_alone(engine: str) -> None:
    for package in ("onnx", "onnxscript", engine):
        pytest.importorskip(package)
    with pytest.raises(SettingError, match="single precision on the CPU"):
        fast_forward(made("timm/test_resnet").double(), images(1, 32).double(), engine=engine)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("half", [True, pytest.param(False, marks=pytest.mark.by_hand)])
def test_other_engines_give_the_same(engine: str, half: bool) -> None:
    for package in () if engine == "compile" else ("onnx", "onnxscript", engine):
        pytest.importorskip(package)
    model = create_model("timm/test_efficientnet", weights=None, num_classes=3, image_size=32)
    stirred(model.network)
    halves = split(model.freeze(model.stage_names[:-2]))
    module = halves.frozen_half if half else model.network
    forward = fast_forward(module, images(2, 32), engine=engine)
    for count in (5, 1, 0):
        expected, given = expected_of(module, images(max(count, 1), 32)), forward(images(count, 32))
        for one, other in zip(expected, given, strict=True) if half else [(expected, given)]:
            assert other.shape[0] == count
            assert count == 0 or close(other, one)


@pytest.mark.long
def test_an_engine_that_cannot_compute_a_network_says_so() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)

    class Decides(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if float(x.sum()) > 0 else x

    with pytest.raises(SettingError, match=r"engine='onnxruntime' cannot compute this network .*use 'eager'"):
        fast_forward(Decides(), images(2), engine="onnxruntime")
