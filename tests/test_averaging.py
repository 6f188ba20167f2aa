"""Averages of the weights: what they are, where they stand in the network, and that training does not notice."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from transferkit.callbacks import EMA, BestCheckpoint, Callback, LRScheduler
from transferkit.checkpoint import load_artifact
from transferkit.create import adapt
from transferkit.exceptions import CallbackError, SettingError
from transferkit.freezing import FreezePolicy, FullFinetune, LinearProbe, ScheduledUnfreeze
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.schedules import Cosine
from transferkit.trainer import Trainer


def batches(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


TRAIN, VAL = batches(4, 4, 4), batches(6, seed=1)


def trainer_of(model, *callbacks, **settings):
    groups = param_groups(model, lr=0.05)
    return Trainer(model, build_optimizer("sgd", groups), callbacks=callbacks, device="cpu", **settings)


def fitted(model, *callbacks, epochs=2, **settings):
    trainer = trainer_of(model, *callbacks, **settings)
    trainer.fit(TRAIN, VAL, epochs=epochs)
    return trainer


def tensors(network):
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def different(first, second):
    return [key for key in first if not torch.equal(first[key], second[key])]


class Watch(Callback):
    """Keeps copies of the network at its hooks, one per epoch."""

    def __init__(self):
        self.started, self.validated, self.ended = [], [], []

    def on_train_epoch_start(self, trainer):
        self.started.append(tensors(trainer.model.network))

    def on_validation_end(self, trainer):
        self.validated.append(tensors(trainer.model.network))

    def on_train_epoch_end(self, trainer):
        self.ended.append(tensors(trainer.model.network))


class Oracle(Callback):
    """torch's moving average over everything in floating point, moved after every optimizer step."""

    def __init__(self, decay, *, warmup):
        self.decay, self.warmup = decay, warmup
        self.averages, self.steps, self.seen = {}, 0, []

    def on_fit_start(self, trainer):
        self.averages = {key: each for key, each in tensors(trainer.model.network).items() if each.is_floating_point()}

    def on_train_batch_end(self, trainer):
        if trainer.step > self.steps:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
            current = trainer.model.network.state_dict()
            values = list(self.averages.values())
            get_ema_multi_avg_fn(decay)(values, [current[key] for key in self.averages], self.steps)
            self.steps = trainer.step

    def on_validation_end(self, trainer):
        self.seen.append({key: each.clone() for key, each in self.averages.items()})


# What the average is


@pytest.mark.parametrize(("decay", "warmup", "accumulate"), [(0.9, False, 1), (0.9, True, 2), (0.2, True, 1)])
def test_validation_sees_the_average_that_torch_computes(tiny_model, decay, warmup, accumulate):
    oracle, watch = Oracle(decay, warmup=warmup), Watch()
    trainer = fitted(tiny_model(), EMA(decay, warmup=warmup), oracle, watch, accumulate=accumulate)
    assert oracle.steps == trainer.step == 2 * (3 if accumulate == 1 else 2)
    for averages, validated, own in zip(oracle.seen, watch.validated, watch.ended, strict=True):
        assert different(averages, validated) == []
        counts = [key for key in validated if key not in averages]
        assert len(counts) > 0
        assert all(torch.equal(validated[key], own[key]) for key in counts)
        assert "bn1.running_mean" in different(own, validated)


def test_running_statistics_that_are_kept_stay_to_the_bit(tiny_model):
    model = tiny_model()
    model.keep_statistics = True
    before = tensors(model.network)
    fitted(model, EMA(0.9))
    assert different(before, tensors(model.network)) == [key for key, _ in model.network.named_parameters()]


def test_an_average_that_forgets_at_once_is_the_weights(tiny_model):
    plain, averaged = tiny_model(), tiny_model()
    fitted(plain)
    fitted(averaged, EMA(0.0))
    assert different(tensors(plain.network), tensors(averaged.network)) == []


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(SettingError, match=r"decay must be .*at least 0 and below 1, got"):
        EMA(decay)


# Training does not notice


def test_training_goes_on_from_its_own_weights(tiny_model):
    alone, beside = Watch(), Watch()
    first = fitted(tiny_model(), alone, epochs=3)
    second = fitted(tiny_model(), EMA(0.9), beside, epochs=3)
    assert first.history["train_loss"] == second.history["train_loss"]
    assert first.history["val_loss"] != second.history["val_loss"]
    assert [different(*pair) for pair in zip(alone.ended, beside.ended, strict=True)] == [[], [], []]


def test_parameters_stay_the_same_objects(tiny_model):
    model = tiny_model()
    before = [id(each) for each in model.network.parameters()]
    fitted(model, EMA(0.9))
    assert [id(each) for each in model.network.parameters()] == before


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_end"])
def test_a_validation_that_is_broken_off_leaves_the_training_weights(tiny_model, hook):
    class Break(Callback):
        pass

    def stop(trainer):
        raise ZeroDivisionError

    plain, broken = Watch(), tiny_model()
    fitted(tiny_model(), plain, epochs=1)
    breaking = Break()
    setattr(breaking, hook, stop)
    with pytest.raises(CallbackError, match="Break"):
        fitted(broken, EMA(0.9), breaking)
    assert different(plain.ended[0], tensors(broken.network)) == []


# What stays at the end


def test_the_average_stays_in_the_network(tiny_model):
    model, ema, watch = tiny_model(), EMA(0.9), Watch()
    fitted(model, ema, watch)
    assert different(watch.validated[-1], tensors(model.network)) == []
    assert different(watch.ended[-1], tensors(model.network)) != []
    assert ema.state_dict() == {"updates": 0, "averages": {}}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("first", [EMA, BestCheckpoint])
def test_the_best_average_is_kept_in_whichever_order_the_callbacks_are(tiny_model, tmp_path, saved, first):
    model, watch, best = tiny_model(), Watch(), BestCheckpoint(tmp_path if saved else None, monitor="val_loss")
    pair = [EMA(0.5), best] if first is EMA else [best, EMA(0.5)]
    trainer = fitted(model, *pair, watch, epochs=3, label_smoothing=0.5)
    chosen = watch.validated[trainer.history["val_loss"].index(min(trainer.history["val_loss"]))]
    assert different(chosen, tensors(model.network)) == []
    assert not saved or different(chosen, tensors(load_artifact(tmp_path).network)) == []


# Freezing


def stage_of(model):
    return {id(each): stage.name for stage in model.stages for each in (*stage.parameters, *stage.buffers)}


def test_frozen_stages_stay_to_the_bit_and_an_unfrozen_one_begins_with_its_values(tiny_model):
    model, watch = tiny_model(), Watch()
    before = tensors(model.network)
    head = {f"{path}.{name}" for path in model.head_paths for name in ("weight", "bias")}
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})
    ema = EMA(0.9, warmup=False)
    fitted(model, ema, watch, epochs=3, policy=policy)
    assert all(set(different(before, each)) == head for each in (*watch.validated[:2], *watch.ended[:2]))
    # A running mean of 0 before the unfreezing tells where its average began: three steps move it 0.27 of the way.
    mean, own = watch.validated[2]["bn1.running_mean"], watch.ended[2]["bn1.running_mean"]
    assert 0 < mean.abs().sum() < 0.3 * own.abs().sum()


def test_what_is_frozen_again_keeps_the_values_that_the_rest_trains_with(tiny_model):
    watch = Watch()
    policy = ScheduledUnfreeze({0: FullFinetune(), 1: LinearProbe()})
    model = tiny_model()
    fitted(model, EMA(0.9), watch, epochs=3, policy=policy)
    head = {f"{path}.{name}" for path in model.head_paths for name in ("weight", "bias")}
    for each in (*watch.validated[1:], *watch.ended[1:], tensors(model.network)):
        assert set(different(watch.ended[0], each)) == head


class Listed(FreezePolicy):
    """Freezes what a list says, epoch by epoch."""

    def __init__(self, epochs):
        self.epochs = epochs

    def frozen_stages(self, stage_names, epoch):
        return frozenset(name for name, frozen in zip(stage_names, self.epochs[epoch], strict=True) if frozen)


def plain_model():
    with seeded(0):
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        network.append(nn.Linear(4, 3))
        return adapt(network, num_classes=3, preprocessing=Preprocessing(size=32, resize_size=32))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_under_any_policy_frozen_tensors_never_change_and_training_does_not_notice(data):
    model, plain = plain_model(), plain_model()
    count = len(model.stage_names)
    frozen = st.lists(st.booleans(), min_size=count, max_size=count).filter(lambda each: not all(each))
    policy = Listed(data.draw(st.lists(frozen, min_size=3, max_size=3)))
    watch, alone = Watch(), Watch()
    fitted(model, EMA(0.7), watch, epochs=3, policy=policy)
    fitted(plain, alone, epochs=3, policy=policy)
    assert [different(*pair) for pair in zip(watch.ended, alone.ended, strict=True)] == [[], [], []]
    names = {key: stage_of(model)[id(each)] for key, each in model.network.state_dict(keep_vars=True).items()}
    for epoch in range(3):
        still = policy.frozen_stages(model.stage_names, epoch)
        moved = different(watch.started[epoch], watch.validated[epoch])
        assert not [key for key in moved if names[key] in still]


# Constants and kinds of tensors


def test_a_buffer_of_infinities_is_left_alone():
    model = plain_model()
    model.network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    model = adapt(model.network, num_classes=3, preprocessing=Preprocessing(size=32, resize_size=32))
    fitted(model, EMA(0.9))
    assert model.network.mask.tolist() == [0.0, float("-inf")]


@contextmanager
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_sharded_networks_are_averaged_like_whole_ones():
    def run(model):
        trainer = SimpleNamespace(model=model, step=0, callbacks=[], accelerator=SimpleNamespace(num_processes=1))
        optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
        ema, seen = EMA(0.6), []
        for _ in range(2):
            ema.on_train_epoch_start(trainer)
            resumed = EMA(0.6)
            resumed.load_state_dict(ema.state_dict())
            ema = resumed
            ema.on_train_epoch_start(trainer)
            model.network.train()
            for images, labels in TRAIN:
                ema.on_train_batch_start(trainer)
                nn.functional.cross_entropy(model.network(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                trainer.step += 1
                ema.on_train_batch_end(trainer)
            ema.on_validation_start(trainer)
            with torch.inference_mode():
                seen.append(model.network.eval()(VAL[0][0]).clone())
            ema.on_train_epoch_end(trainer)
        ema.on_fit_end(trainer)
        with torch.inference_mode():
            return [*seen, model.network.eval()(VAL[0][0]).clone()]

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole, sharded = plain_model(), plain_model()
    with one_process_group():
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(sharded.network[0], mesh=mesh)
        fully_shard(sharded.network, mesh=mesh)
        assert all(isinstance(each, DTensor) for each in sharded.network.parameters())
        for first, second in zip(run(whole), run(sharded), strict=True):
            torch.testing.assert_close(first, second)


# Resuming


class Capture(Callback):
    """Keeps what a resumed run needs, at the end of one epoch."""

    def __init__(self, epoch):
        self.epoch, self.state = epoch, None

    def on_train_epoch_end(self, trainer):
        if trainer.epoch == self.epoch:
            kept = {type(each).__name__: each.state_dict() for each in trainer.callbacks if each is not self}
            self.state = copy.deepcopy(
                (trainer.model.network.state_dict(), trainer.optimizer.state_dict(), trainer.history.records, kept)
            )

    def resume(self, trainer):
        network, optimizer, records, kept = copy.deepcopy(self.state)
        trainer.model.network.load_state_dict(network)
        trainer.optimizer.load_state_dict(optimizer)
        trainer.history.records.extend(records)
        for callback in trainer.callbacks:
            callback.load_state_dict(kept[type(callback).__name__])


@pytest.mark.parametrize(("epoch", "best"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tiny_model, epoch, best):
    def callbacks():
        keep = [BestCheckpoint(monitor="val_loss", mode="max")] if best else []  # the first epochs are the best
        return [LRScheduler(Cosine()), EMA(0.8), *keep]

    settings = {"policy": ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()})}
    whole, capture = tiny_model(), Capture(epoch)
    first = fitted(whole, *callbacks(), capture, epochs=4, **settings)
    second = trainer_of(tiny_model(), *callbacks(), **settings)
    capture.resume(second)
    second.fit(TRAIN, VAL, epochs=4)
    assert different(tensors(whole.network), tensors(second.model.network)) == []
    for figure in ("train_loss", "val_loss", "val_accuracy"):
        assert first.history[figure] == second.history[figure]


def test_a_state_holds_tensors_and_plain_values_only(tiny_model):
    capture = Capture(1)
    fitted(tiny_model(), EMA(0.8), BestCheckpoint(), capture)
    kept = capture.state[3]
    assert kept["EMA"]["updates"] == 6
    assert all(type(each) is torch.Tensor for each in kept["EMA"]["averages"].values())
    assert kept["BestCheckpoint"]["weights"].keys() == capture.state[0].keys()
    assert {type(each) for each in kept["BestCheckpoint"]["best"].values()} <= {int, float}
