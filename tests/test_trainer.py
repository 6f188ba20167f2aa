import copy
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from transferkit.callbacks import BestCheckpoint, Callback, EarlyStopping, LRScheduler
from transferkit.checkpoint import load_artifact
from transferkit.create import adapt
from transferkit.data import image_folder, loader
from transferkit.evaluation import collect_logits
from transferkit.exceptions import DataError, SettingError, TransferkitError, UnknownStageError
from transferkit.freezing import FreezeUntil, FullFinetune, GradualUnfreezing, LinearProbe, ScheduledUnfreeze
from transferkit.metrics import evaluate_logits
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import derive_seed, seeded
from transferkit.schedules import Constant, Cosine
from transferkit.trainer import Trainer
from transferkit.transforms import eval_transform, train_transform


def batches(*sizes, seed=0, classes=3):
    """Noise pictures whose brightness tells the class, in batches of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (sum(sizes),), generator=generator)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


TRAIN, VAL = batches(8, 8, 6), batches(9, 3, seed=1)


def plain_model(*, seed=0):
    """A network without batch norm or dropout."""
    with seeded(seed):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        )
        return adapt(network, num_classes=3, preprocessing=Preprocessing(size=32, resize_size=32))


def trainer_of(model, *callbacks, lr=0.05, optimizer="sgd", **settings):
    groups = param_groups(model, lr=lr)
    return Trainer(model, build_optimizer(optimizer, groups), callbacks=callbacks, device="cpu", **settings)


def fitted(model, *callbacks, train=TRAIN, epochs=2, **settings):
    trainer = trainer_of(model, *callbacks, **settings)
    trainer.fit(train, VAL, epochs=epochs)
    return trainer


def tensors(model):
    return {key: value.detach().clone() for key, value in model.network.state_dict().items()}


def assert_equal(first, second):
    first, second = (each if isinstance(each, dict) else tensors(each) for each in (first, second))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def assert_close(first, second):
    first, second = tensors(first), tensors(second)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-6, atol=1e-6, msg=lambda text, key=key: key + text)


def differ(first, second):
    first, second = tensors(first), tensors(second)
    return any(not torch.equal(first[key], second[key]) for key in first)


def by_hand(model, train, *, epochs=2, lr=0.05, loss=F.cross_entropy, mix=None, seed=0):
    """The textbook loop, with the trainer's order of memory, since another one rounds differently."""
    model.network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.network.parameters(), lr, momentum=0.9, nesterov=True)
    model.network.train()
    for epoch in range(epochs):
        for index, (images, labels) in enumerate(train):
            torch.manual_seed(derive_seed(seed, 2, epoch, index, 0))
            if mix is not None:
                images, labels = mix(images, labels)
            loss(model.network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


class Watch(Callback):
    """Keeps the weights after each epoch and the hooks that were called."""

    def __init__(self):
        self.epochs = []

    def on_validation_end(self, trainer):
        self.epochs.append(tensors(trainer.model))


# What comes out


def test_history_has_one_record_per_epoch(tiny_model):
    trainer = fitted(tiny_model(), epochs=3)
    history = trainer.history
    assert [record.epoch for record in history] == [1, 2, 3]
    assert all(math.isfinite(value) for record in history for value in record.to_dict().values())
    assert all(record.seconds > 0 and 0 <= record.val_accuracy <= 1 for record in history)
    assert trainer.step == 9


def test_training_loss_is_the_mean_over_pictures():
    model = plain_model()
    expected = torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in TRAIN]).mean().item()
    assert fitted(model, lr=1e-12, epochs=1).history["train_loss"][0] == pytest.approx(expected, rel=1e-6)


def test_training_equals_the_textbook_loop(tiny_model):
    model = tiny_model()
    fitted(model)
    assert_equal(model, by_hand(tiny_model(), TRAIN))


def test_training_learns():
    assert fitted(plain_model(), epochs=12).history["val_accuracy"][-1] > 0.9


@pytest.mark.parametrize("saved", [False, True])
def test_best_weights_are_in_the_model_after_fit(tiny_model, tmp_path, saved):
    class Wreck(Callback):
        def on_train_epoch_start(self, trainer):
            if trainer.epoch == 3:
                trainer.optimizer.param_groups[-1]["lr"] = 9.0

    model, watch = tiny_model(), Watch()
    best = BestCheckpoint(tmp_path / "best" if saved else None, monitor="val_loss")
    trainer = fitted(model, best, watch, Wreck(), epochs=4)
    record = trainer.history.best("val_loss")
    assert record == best.best
    assert record.epoch < 4  # else the last weights would pass for the best ones
    assert_equal(watch.epochs[record.epoch - 1], model)
    assert trainer.evaluate(VAL).loss == pytest.approx(record.val_loss, rel=1e-5)
    if saved:
        assert_equal(load_artifact(tmp_path / "best"), model)


def test_without_best_checkpoint_the_last_weights_stay(tiny_model):
    model, watch = tiny_model(), Watch()
    fitted(model, watch)
    assert_equal(watch.epochs[-1], model)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("policy", [FullFinetune(), LinearProbe(), GradualUnfreezing()])
def test_model_is_back_in_the_mode_it_was_in(tiny_model, mode, policy):
    model = tiny_model().train(mode)
    fitted(model, policy=policy)
    frozen = {id(module) for stage in model.stages if stage.name in model.frozen for module in stage.modules}
    assert all(module.training == (mode and id(module) not in frozen) for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_stages_that_were_frozen_before_and_freed_by_fit_are_in_the_mode_of_the_model(tiny_model, mode):
    model = tiny_model().freeze(["stem", "stage1"]).train(mode)
    fitted(model, epochs=1)
    assert all(module.training == mode for module in model.modules())


def test_evaluate_leaves_modes_and_weights_alone(tiny_model):
    model = tiny_model().train()
    model.network.bn1.eval()
    modes, before = [module.training for module in model.modules()], tensors(model)
    result = trainer_of(model).evaluate(VAL)
    assert [module.training for module in model.modules()] == modes
    assert_equal(before, model)
    logits = torch.cat([model.eval()(images) for images, _ in VAL]).detach()
    assert result == evaluate_logits(logits, torch.cat([labels for _, labels in VAL]), model.class_names)


def test_nothing_of_the_wrapping_stays_in_the_model(tiny_model):
    model = tiny_model()
    fitted(model, policy=GradualUnfreezing(), precision="bf16")
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    assert torch.equal(model(VAL[0][0]), model.network(VAL[0][0]))
    copied = copy.deepcopy(model)
    copied.network.conv_stem.weight.data.zero_()
    assert not torch.equal(copied(VAL[0][0]), model(VAL[0][0]))


def test_bf16_differs_from_fp32_and_still_learns():
    model = plain_model()
    trainer = fitted(model, precision="bf16", epochs=12)
    assert differ(model, by_hand(plain_model(), TRAIN, epochs=12))
    assert trainer.history["val_accuracy"][-1] > 0.9


def test_two_trainers_of_different_precision_do_not_disturb_each_other():
    alone, model = plain_model(), plain_model()
    fitted(alone, epochs=4)
    trainer = fitted(model, epochs=2)
    fitted(plain_model(), precision="bf16", epochs=1)
    trainer.fit(TRAIN, VAL, epochs=4)
    assert_equal(alone, model)


def test_collect_logits_of_no_batches_is_empty(tiny_model):
    logits, labels = collect_logits(tiny_model(), [], torch.device("cpu"))
    assert len(logits) == len(labels) == 0


# Accumulation, clipping, losses


@pytest.mark.parametrize(
    ("small", "large"),
    [([4, 4, 4, 4], [8, 8]), ([4, 4, 4], [8, 4]), ([4, 4, 2], [8, 2]), ([4, 4, 4, 2], [8, 6])],
)
def test_accumulating_equals_larger_batches(small, large):
    accumulated, whole = plain_model(), plain_model()
    trainer = fitted(accumulated, train=batches(*small), accumulate=2)
    other = fitted(whole, train=batches(*large))
    assert trainer.step == other.step == 4
    assert_close(accumulated, whole)
    assert trainer.history["train_loss"] == pytest.approx(other.history["train_loss"], rel=1e-5)


def test_accumulating_more_batches_than_there_are_makes_one_step():
    accumulated, whole = plain_model(), plain_model()
    assert fitted(accumulated, train=batches(4, 4), accumulate=5, epochs=1).step == 1
    fitted(whole, train=batches(8), epochs=1)
    assert_close(accumulated, whole)


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that notes the norm of the gradient it is given."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.norms = []

    def step(self, closure=None):
        gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
        self.norms.append(torch.cat([each.flatten() for each in gradients]).norm().item())
        return super().step(closure)


def norms(limit, **settings):
    trainer = fitted(plain_model(), optimizer=RecordingSGD, clip_grad_norm=limit, lr=1e-9, **settings)
    return trainer.optimizer.norms


def test_clipping_bounds_the_gradient_of_each_step():
    free = norms(None)
    limit = sorted(free)[len(free) // 2]
    assert norms(limit) == pytest.approx([min(norm, limit) for norm in free], rel=1e-4)


def test_clipping_applies_to_the_accumulated_gradient():
    free = norms(None, train=batches(4, 4, 4), accumulate=2)
    assert norms(1e-3, train=batches(4, 4, 4), accumulate=2) == pytest.approx([1e-3] * len(free), rel=1e-3)


def smoothed(logits, targets):
    return F.cross_entropy(logits, targets, label_smoothing=0.2)


def weighted(logits, targets):
    return F.cross_entropy(logits, targets, weight=torch.tensor([1.0, 2.0, 0.5]))


MIXUP, CUTMIX = v2.MixUp(alpha=0.3, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({"label_smoothing": 0.2}, {"loss": smoothed}),
        ({"class_weights": [1.0, 2.0, 0.5]}, {"loss": weighted}),
        ({"mixup": 0.3}, {"mix": v2.RandomChoice([MIXUP])}),
        ({"cutmix": 1.0}, {"mix": v2.RandomChoice([CUTMIX])}),
        ({"mixup": 0.3, "cutmix": 1.0, "seed": 5}, {"mix": v2.RandomChoice([MIXUP, CUTMIX]), "seed": 5}),
        ({"mixup": 0.3, "label_smoothing": 0.2}, {"mix": v2.RandomChoice([MIXUP]), "loss": smoothed}),
    ],
    ids=lambda value: "+".join(value),
)
def test_losses_and_mixing_equal_a_step_written_by_hand(tiny_model, settings, oracle):
    model = tiny_model()
    fitted(model, **settings)
    assert_equal(model, by_hand(tiny_model(), TRAIN, **oracle))
    assert differ(model, by_hand(tiny_model(), TRAIN))


def test_validation_loss_knows_neither_smoothing_nor_class_weights_nor_mixing():
    settings = {"label_smoothing": 0.3, "class_weights": [9.0, 1.0, 1.0], "mixup": 1.0}
    trainer = fitted(plain_model(), lr=1e-12, epochs=1, **settings)
    assert trainer.history["val_loss"] == pytest.approx(
        fitted(plain_model(), lr=1e-12, epochs=1).history["val_loss"], rel=1e-6
    )


def test_gradients_from_before_the_fit_do_not_leak_into_it(tiny_model):
    clean, used = tiny_model(), tiny_model()
    F.cross_entropy(used.eval()(VAL[0][0]), VAL[0][1]).backward()
    fitted(clean), fitted(used)
    assert_equal(clean, used)


# Freezing


def test_frozen_stages_are_bit_equal_after_training(tiny_model):
    model = tiny_model()
    before = {stage.name: [each.clone() for each in (*stage.parameters, *stage.buffers)] for stage in model.stages}
    fitted(model, policy=FreezeUntil("stage4"), optimizer="adamw", epochs=3)
    assert model.frozen == {"stem", "stage1", "stage2", "stage3"}
    for stage in model.stages:
        equal = [
            torch.equal(old, new)
            for old, new in zip(before[stage.name], (*stage.parameters, *stage.buffers), strict=True)
        ]
        assert all(equal) if stage.name in model.frozen else not any(equal)


def test_policy_is_applied_before_each_epoch(tiny_model):
    model, watch = tiny_model(), Watch()
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FreezeUntil("stage5"), 3: FullFinetune()})
    start = tensors(model)
    fitted(model, watch, policy=policy, epochs=4)
    owner = {id(each): stage.name for stage in model.stages for each in (*stage.parameters, *stage.buffers)}
    state = {key: owner[id(value)] for key, value in model.network.state_dict(keep_vars=True).items()}
    moved = [
        {state[key] for key in start if not torch.equal(before[key], after[key])}
        for before, after in pairwise([start, *watch.epochs])
    ]
    assert moved == [{"head"}, {"head"}, {"stage5", "head"}, set(model.stage_names)]


def test_optimizer_and_its_parameters_are_the_same_objects_throughout(tiny_model):
    model = tiny_model()
    trainer = trainer_of(model, policy=GradualUnfreezing(), optimizer="adamw")
    optimizer = trainer.optimizer

    def identities():
        return [[id(each) for each in group["params"]] for group in optimizer.param_groups]

    before, stages = identities(), [group["stage"] for group in optimizer.param_groups]
    trainer.fit(TRAIN, VAL, epochs=3)
    assert trainer.optimizer is optimizer
    assert identities() == before
    assert [group["stage"] for group in optimizer.param_groups] == stages
    assert {id(each) for each in model.network.parameters()} == {each for group in before for each in group}


def test_momentum_survives_an_unfreezing():
    # Two policies that freeze nothing but different stages' worth of nothing must train alike.
    once, twice = plain_model(), plain_model()
    fitted(once, epochs=3, policy=LinearProbe())
    phases = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune(), 2: LinearProbe()})
    watch = Watch()
    trainer = fitted(twice, watch, epochs=3, policy=phases)
    head = trainer.optimizer.param_groups[-1]["params"][0]
    assert trainer.optimizer.state[head]["momentum_buffer"].abs().sum() > 0
    body = [key for key in tensors(twice) if not key.startswith("4.")]
    assert all(torch.equal(watch.epochs[1][key], watch.epochs[2][key]) for key in body)


def test_an_optimizer_without_some_parameter_is_refused(tiny_model):
    model = tiny_model()
    head_only = torch.optim.SGD(model.stages[-1].parameters, 0.1)
    with pytest.raises(SettingError, match=r"lacks \d+ parameters of timm/test_efficientnet, conv_stem.weight for one"):
        Trainer(model, head_only)


def test_an_unknown_stage_stops_before_anything_is_trained(tiny_model):
    model, watch = tiny_model(), Watch()
    before = tensors(model)
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: FreezeUntil("stage9")})
    trainer = trainer_of(model, watch, policy=policy)
    with pytest.raises(UnknownStageError, match="no stage named 'stage9'"):
        trainer.fit(TRAIN, VAL, epochs=3)
    assert_equal(before, model)
    assert trainer.step == 0
    assert model.frozen == frozenset()


# Randomness


def global_states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate()


def test_global_generators_stand_where_they_stood(tiny_model, picture_folder):
    model = tiny_model(dropout=0.3)
    before = global_states()
    fitted(model, train=folder_batches(picture_folder, model), mixup=0.2, cutmix=0.2)
    assert global_states() == before


def folder_batches(folder, model, *, num_workers=0, seed=0):
    source, transform = image_folder(folder).train, train_transform("light", model.preprocessing)
    return loader(source, transform, batch_size=16, seed=seed, train=True, num_workers=num_workers)


def test_result_depends_on_the_seed_but_on_no_global_generator_and_no_worker_count(tiny_model, picture_folder):
    def run(*, seed=0, num_workers=0, position=0):
        model = tiny_model(dropout=0.3)
        torch.manual_seed(position)
        np.random.seed(position)  # noqa: NPY002
        random.seed(position)
        train = folder_batches(picture_folder, model, num_workers=num_workers, seed=seed)
        val = loader(image_folder(picture_folder).val, eval_transform("imagenet", model.preprocessing), **EVALUATION)
        trainer = trainer_of(model, LRScheduler(Cosine()), seed=seed, mixup=0.2, policy=GradualUnfreezing())
        figures = [
            (record.train_loss, record.val_loss, record.val_accuracy) for record in trainer.fit(train, val, epochs=2)
        ]
        return model, figures

    (model, figures), (moved, moved_figures), (workers, workers_figures) = (
        run(),
        run(position=7),
        run(num_workers=2, position=3),
    )
    assert_equal(model, moved)
    assert_equal(model, workers)
    assert figures == moved_figures == workers_figures
    assert differ(model, run(seed=1)[0])


EVALUATION = {"batch_size": 16, "train": False}


def test_dropout_and_mixing_depend_on_the_seed(tiny_model):
    models = [tiny_model(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fitted(model, seed=seed)
    assert_equal(models[0], models[1])
    assert differ(models[0], models[2])


# Stopping and errors


def test_a_callback_can_stop_training_after_the_epoch():
    class Stop(Callback):
        def on_train_batch_end(self, trainer):
            trainer.should_stop = True

    trainer = fitted(plain_model(), Stop(), epochs=5)
    assert len(trainer.history) == 1
    assert trainer.step == len(TRAIN)


def test_a_loss_that_is_no_number_stops_with_advice():
    with pytest.raises(TransferkitError, match=r"loss is no longer a number in step 1 of epoch 1 at lr 0.05, whose"):
        fitted(plain_model(), train=[(torch.full((4, 3, 32, 32), torch.nan), torch.zeros(4, dtype=torch.int64))])


def test_weights_that_blow_up_in_the_last_step_are_noticed_in_validation():
    with pytest.raises(TransferkitError, match=r"validation loss became nan in epoch 1 at lr 1e\+38; lower lr"):
        fitted(plain_model(), train=batches(8), lr=1e38, epochs=1)


def test_errors_reach_the_callbacks_and_the_caller_and_leave_the_model_as_it_was(tiny_model):
    class Heard(Callback):
        def __init__(self):
            self.exceptions = self.ends = 0

        def on_exception(self, trainer):
            self.exceptions += 1

        def on_fit_end(self, trainer):
            self.ends += 1

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer):
            if trainer.step == 4:
                raise KeyboardInterrupt

    model, heard = tiny_model().eval(), Heard()
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fitted(model, heard, Interrupt())
    assert (heard.exceptions, heard.ends) == (1, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_a_run_that_was_broken_off_in_an_epoch_goes_on_with_that_epoch():
    class Once(Callback):
        broken = False

        def on_train_batch_end(self, trainer):
            if trainer.step == 5 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    trainer = trainer_of(plain_model(), LRScheduler(Cosine()), Once())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(TRAIN, VAL, epochs=3)
    trainer.fit(TRAIN, VAL, epochs=3)
    assert [record.epoch for record in trainer.history] == [1, 2, 3]
    assert trainer.step == 9


def test_fitting_on_continues_the_same_run():
    whole, parts = plain_model(), plain_model()
    fitted(whole, LRScheduler(Constant()), epochs=4)
    trainer = fitted(parts, LRScheduler(Constant()), epochs=2)
    assert len(trainer.fit(TRAIN, VAL, epochs=4)) == 4
    assert_equal(whole, parts)


def test_no_batches_are_named_as_such():
    with pytest.raises(DataError, match="no batches to train on"):
        fitted(plain_model(), train=[])
    with pytest.raises(DataError, match="no pictures to evaluate"):
        trainer_of(plain_model()).fit(TRAIN, [], epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"accumulate": 0}, "accumulate must be from 1 to 1,000,000, got 0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be above 0"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm must be a finite number, above 0, or None, got nan"),
        ({"class_weights": [1.0, 2.0]}, "one weight for each of 3 classes, got 2"),
        ({"class_weights": [1.0, -2.0, 1.0]}, "class_weights must be above 0"),
        ({"mixup": -1.0}, "mixup must be 0 or more, got -1.0"),
        ({"cutmix": math.nan}, "cutmix must be a finite number, 0 or more, got nan"),
        ({"seed": -1}, "seed must be from 0 to 9,223,372,036,854,775,807, got -1"),
        ({"precision": "fp8"}, "it can be auto, fp32, bf16, fp16"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    model = plain_model()
    with pytest.raises(SettingError, match=message):
        Trainer(model, build_optimizer("sgd", param_groups(model, lr=0.1)), **settings)


def test_zero_epochs_are_refused():
    with pytest.raises(SettingError, match="epochs must be from 1 to 1,000,000, got 0"):
        trainer_of(plain_model()).fit(TRAIN, VAL, epochs=0)


def test_early_stopping_ends_the_run_and_the_best_weights_are_kept():
    model, watch = plain_model(), Watch()
    callbacks = (BestCheckpoint(monitor="val_loss"), EarlyStopping(patience=1), watch)
    trainer = fitted(model, *callbacks, lr=1.0, epochs=30)
    best = trainer.history.best("val_loss").epoch
    assert best + 1 == len(trainer.history) < 30
    assert_equal(watch.epochs[best - 1], model)


# torch's compiler


@pytest.mark.long
def test_a_compiled_run_trains_the_weights_of_one_that_is_not():
    policy = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()})
    eager, compiled = (fitted(plain_model(), policy=policy, torch_compile=wanted) for wanted in (False, True))
    for key, value in tensors(eager.model).items():
        torch.testing.assert_close(tensors(compiled.model)[key], value, rtol=1e-4, atol=1e-5)
    assert compiled.history["train_loss"] == pytest.approx(eager.history["train_loss"], rel=1e-4)
    assert type(compiled.model.network) is type(plain_model().network)


@pytest.mark.long
def test_what_torch_cannot_compile_is_one_sentence_and_leaves_the_weights_alone():
    torch._dynamo.reset()  # it would find what another test compiled
    model = plain_model()
    before = tensors(model)
    broken = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(SettingError, match=r"cannot compile .*leave out torch_compile"),
    ):
        fitted(model, torch_compile=True)
    assert_equal(before, tensors(model))
