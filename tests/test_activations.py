"""What frozen stages give is computed once, and training on it is the training without."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from transferkit import frozen_pass
from transferkit.activation_store import ActivationStore
from transferkit.activations import ActivationCache, KeptBatches, check_budget
from transferkit.callbacks import EMA, BestCheckpoint, Callback
from transferkit.create import adapt, create_model
from transferkit.data import DatasetPictures, PictureData, image_folder, loader
from transferkit.exceptions import CallbackError, OutputError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.freezing import FreezePolicy, FullFinetune, LinearProbe, ScheduledUnfreeze, TrainLast
from transferkit.identity import contents_of
from transferkit.interrupts import Interrupted
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.splitting import split
from transferkit.trainer import Trainer
from transferkit.transforms import eval_transform, train_transform

MAKE = Callable[..., TransferModel]
HEAD_THEN_ALL = ScheduledUnfreeze({0: LinearProbe(), 2: TrainLast(1), 4: FullFinetune()})


class Counted:
    """A source that knows how often each of its pictures was read."""

    random = False

    def __init__(self, source: Any) -> None:
        self.source, self.reads = source, Counter[int]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.source[index]

    def labels(self) -> list[int]:
        return self.source.labels()


def dropping(*, seed: int = 0) -> TransferModel:
    """A network that drops units and paths while it trains."""
    with seeded(seed):
        network = timm.create_model("test_efficientnet", pretrained=False, drop_rate=0.3, drop_path_rate=0.3)
        return adapt(network, num_classes=3, preprocessing=Preprocessing(32, 32), dropout=0.2)


def fitted(
    model: TransferModel,
    train: Any,
    val: Any,
    *callbacks: Callback,
    cache: ActivationCache | None,
    policy: FreezePolicy = LinearProbe(),  # noqa: B008  # policies are immutable
    preset: Any = "none",
    epochs: int = 3,
    balanced: bool = False,
    **options: Any,
) -> Trainer:
    shape = {"batch_size": 8, "seed": 0}
    batches = loader(train, train_transform(preset, model.preprocessing), train=True, balanced=balanced, **shape)
    held_out = loader(val, eval_transform("imagenet", model.preprocessing), train=False, **shape)
    optimizer = build_optimizer("sgd", param_groups(model, lr=0.05))
    trainer = Trainer(model, optimizer, policy=policy, callbacks=callbacks, device="cpu", activations=cache, **options)
    trainer.fit(batches, held_out, epochs=epochs)
    return trainer


def furthest(first: TransferModel, second: TransferModel) -> float:
    pairs = zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True)
    return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)


def figures(trainer: Trainer) -> list[float]:
    return [each for record in trainer.history.records for each in (record.train_loss, record.val_loss)]


@pytest.fixture
def data(picture_folder: Path) -> PictureData:
    return image_folder(picture_folder)


# Training on kept activations is the training without


@pytest.mark.parametrize("policy", [LinearProbe(), TrainLast(1), HEAD_THEN_ALL], ids=["head", "last", "scheduled"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_grad_norm": 0.5}], ids=["plain", "accumulated"])
def test_without_augmentation_the_run_is_the_one_without_a_cache(
    data: PictureData, policy: FreezePolicy, options: dict[str, Any]
) -> None:
    plain, kept = (
        fitted(dropping(), data.train, data.val, cache=cache, policy=policy, epochs=5, **options)
        for cache in (None, ActivationCache())
    )
    assert furthest(plain.model, kept.model) < 1e-5
    assert figures(kept) == pytest.approx(figures(plain), rel=1e-4)
    assert [each.val_accuracy for each in kept.history.records] == [each.val_accuracy for each in plain.history.records]


def test_averaged_weights_and_the_best_checkpoint_meet_the_same_network(data: PictureData, tmp_path: Path) -> None:
    models = []
    for name, cache in (("plain", None), ("kept", ActivationCache())):
        callbacks = EMA(0.9), BestCheckpoint(tmp_path / name, monitor="val_loss")
        models.append(fitted(dropping(), data.train, data.val, *callbacks, cache=cache, policy=TrainLast(1)).model)
    assert furthest(*models) < 1e-5


def test_batch_norms_that_train_see_the_same(data: PictureData, tiny_model: MAKE) -> None:
    models = [tiny_model().eval() for _ in range(2)]
    before = {key: value.clone() for key, value in models[0].network.state_dict().items() if "running" in key}
    for model, cache in zip(models, (None, ActivationCache()), strict=True):
        fitted(model, data.train, data.val, cache=cache, policy=TrainLast(2))
    moved = [
        key for key, value in models[1].network.state_dict().items() if key in before and (value != before[key]).any()
    ]
    assert moved
    assert furthest(*models) < 1e-5


def test_auxiliary_classifiers_train_along(data: PictureData) -> None:
    models = []
    for cache in (None, ActivationCache()):
        with seeded(0):
            model = create_model(
                "torchvision/googlenet", weights=None, class_names=data.class_names, image_size=48, aux="train"
            )
        models.append(fitted(model, data.train, data.val, cache=cache, policy=TrainLast(1), epochs=1).model)
    assert furthest(*models) < 1e-5


def test_the_model_comes_back_whole_and_in_its_mode(data: PictureData, tiny_model: MAKE) -> None:
    model = tiny_model().eval()
    trainer = fitted(model, data.train, data.val, cache=ActivationCache())
    assert not model.training
    assert trainer.model is model
    assert trainer.evaluate(
        loader(data.val, eval_transform("imagenet", model.preprocessing), batch_size=5, train=False)
    ).loss == pytest.approx(trainer.history.records[-1].val_loss, rel=1e-5)


def test_one_cache_serves_one_model_after_the_other(data: PictureData) -> None:
    cache = ActivationCache()
    first, second = (fitted(dropping(seed=seed), data.train, data.val, cache=cache).model for seed in (1, 2))
    assert furthest(first, fitted(dropping(seed=1), data.train, data.val, cache=None).model) < 1e-5
    assert furthest(second, fitted(dropping(seed=2), data.train, data.val, cache=None).model) < 1e-5


@pytest.mark.parametrize("prepared", [True, False])
def test_in_half_precision_the_frozen_half_computes_as_what_trains_does(
    data: PictureData, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    monkeypatch.setattr(frozen_pass, "is_worth_preparing", lambda batches, images: prepared)
    model = create_model("timm/test_resnet", weights=None, class_names=data.class_names, image_size=64, seed=0).eval()
    found: list[Tensor] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            found.extend(kept._store(0).read(torch.arange(2))[0] for kept in trainer.activations._open)

    cache = ActivationCache(views=1)
    trainer = fitted(model, data.train, data.val, Look(), cache=cache, epochs=1, precision="bf16")
    assert trainer.precision_used == "bf16"
    model.freeze(model.stage_names[:-1])
    transform = eval_transform("imagenet", model.preprocessing)
    for ours, source, off in zip(found, (data.train, data.val), (0.03, 1e-5), strict=True):
        expected = split(model).prefix(torch.stack([transform(source[index][0]) for index in range(2)]))[0]
        assert float((ours.float() - expected).norm()) < off * float(expected.norm())
    # a model is measured as it predicts
    assert [ours.dtype for ours in found] == [torch.bfloat16, torch.float32]


# Once


def reads(data: PictureData, model: TransferModel, **options: Any) -> tuple[set[int], set[int]]:
    train, val = Counted(data.train), Counted(data.val)
    fitted(model, train, val, **options)
    assert len(train.reads) == len(train)
    assert len(val.reads) == len(val)
    return set(train.reads.values()), set(val.reads.values())


@pytest.mark.parametrize(
    ("views", "preset", "expected"),
    [
        (None, "none", ({1}, {1})),
        (3, "none", ({1}, {1})),  # there is but one view of a picture that is not augmented
        (2, "light", ({2}, {1})),
        (None, "light", ({4}, {1})),
        (9, "light", ({5}, {1})),
        (0, "light", ({5}, {5})),
        (0, "none", ({5}, {5})),
    ],
)
def test_each_view_of_each_picture_is_read_once(
    data: PictureData, tiny_model: MAKE, views: int | None, preset: str, expected: tuple[set[int], set[int]]
) -> None:
    assert reads(data, tiny_model(), cache=ActivationCache(views=views), preset=preset, epochs=5) == expected


def test_a_schedule_reads_once_per_phase_and_in_every_epoch_once_nothing_is_frozen(
    data: PictureData, tiny_model: MAKE
) -> None:
    assert reads(data, tiny_model(), cache=ActivationCache(), policy=HEAD_THEN_ALL, epochs=6) == ({4}, {4})


def test_views_are_the_validation_picture_and_then_those_of_the_epochs(data: PictureData, tiny_model: MAKE) -> None:
    model = tiny_model().eval()
    model.freeze(model.stage_names[:-1])
    light, plain = train_transform("light", model.preprocessing), eval_transform("imagenet", model.preprocessing)
    train = loader(data.train, light, batch_size=8, train=True)
    val = loader(data.val, plain, batch_size=8, train=False)
    phase = ActivationCache(views=3).phase(
        model,
        train,
        val,
        accelerator=Trainer(model, torch.optim.SGD(model.parameters()), device="cpu").accelerator,
        epochs=9,
    )
    kept = phase.train_batches
    assert isinstance(kept, KeptBatches)
    assert len(kept) == len(train)
    halves = split(model)
    for epoch in (0, 1, 2, 4):
        view = epoch % 3
        expected = loader(data.train, light if view else plain, batch_size=8, train=True)
        kept.sampler.set_epoch(epoch)
        expected.sampler.set_epoch(epoch)
        for keys, (activations, labels) in zip(expected.batch_keys(), kept, strict=True):
            pictures = [expected.pictures[view, index, 0] for _, index, _ in keys]
            torch.testing.assert_close(activations, halves.prefix(torch.stack([each for each, _ in pictures])))
            assert labels.tolist() == [label for _, label in pictures]
        assert kept.names(0) == expected.names(0)


def test_pictures_that_balancing_repeats_are_other_views(data: PictureData, tiny_model: MAKE) -> None:
    few = PictureData(
        type(data.train)([each for each in data.train.pictures if each.label or each.path.endswith("0.jpg")]),
        data.val,
        data.class_names,
    )
    train = Counted(few.train)
    model = tiny_model()
    trainer = fitted(model, train, few.val, cache=ActivationCache(views=2), preset="light", epochs=1, balanced=True)
    assert set(train.reads.values()) == {2}
    assert trainer.activations.views == 2


# Where nothing is kept


class Deciding(nn.Module):
    """A network whose forward decides by what it sees, also behind its head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3))
        if features.mean() > 1000:
            features = features * 2
        return self.head(features) + features.mean()


def test_a_network_that_cannot_be_cut_says_so_once_and_trains(
    data: PictureData, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "transferkit")
    with seeded(0):
        model = adapt(Deciding(), num_classes=3, head="head", preprocessing=Preprocessing(16, 16))
    train, val = Counted(data.train), Counted(data.val)
    trainer = fitted(model, train, val, cache=ActivationCache(), epochs=2)
    assert len(trainer.history) == 2
    assert set(train.reads.values()) == {2}
    (line,) = [each.message for each in caplog.records if "activations" in each.message]
    assert line.startswith("activations are not kept: ")
    assert "Deciding" in line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixup": 0.2}, "mixup and cutmix"),
        ({"cutmix": 1.0}, "mixup and cutmix"),
    ],
)
def test_mixed_pictures_are_never_kept(
    data: PictureData, tiny_model: MAKE, caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str
) -> None:
    caplog.set_level(logging.INFO, "transferkit")
    assert reads(data, tiny_model(), cache=ActivationCache(), epochs=2, **options) == ({2}, {2})
    assert reason in caplog.text


def test_batches_of_ones_own_are_not_kept(tiny_model: MAKE) -> None:
    model = tiny_model()
    batch = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]
    trainer = Trainer(
        model,
        torch.optim.SGD(param_groups(model, lr=0.1)),
        policy=LinearProbe(),
        activations=ActivationCache(),
        device="cpu",
    )
    ((start, choice),) = trainer.plan_activations(batch, batch, epochs=2)
    assert start == 0
    assert str(choice) == "not kept: the batches are not from loader()"
    assert len(trainer.fit(batch, batch, epochs=2)) == 2


@pytest.mark.parametrize(
    ("dataset", "random"),
    [
        (FakeData(4), False),
        (FakeData(4, transform=v2.RandomHorizontalFlip()), True),
        (torch.utils.data.Subset(FakeData(4), [0, 1]), False),
        ([(Image.new("RGB", (4, 4)), 0)], False),
        (type("Own", (list,), {})(), True),
    ],
)
def test_data_sets_that_may_draw_random_numbers_count_as_augmented(dataset: Any, random: bool) -> None:
    assert DatasetPictures(dataset, (0, 1)).random is random


# Memory and files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("in_files", [False, True])
def test_a_store_gives_back_what_it_was_given(tmp_path: Path, dtype: torch.dtype, in_files: bool) -> None:
    rows = [(torch.randn(7, 3, 2) * 9).to(dtype), torch.arange(7)]
    store = ActivationStore.create(7, [each[:2] for each in rows], folder=tmp_path / "store" if in_files else None)
    order = torch.tensor([4, 0, 6, 1, 2, 5, 3])
    for some in order.split(3):
        store.write(some, [each[some] for each in rows])
    for some in (order, torch.tensor([3, 3, 0])):
        for given_back, each in zip(store.read(some), rows, strict=True):
            assert given_back.dtype == each.dtype
            assert torch.equal(given_back, each[some])
    store.close()
    assert not (tmp_path / "store").exists()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_rows_may_be_written_and_read_in_any_order(choose: st.DataObject) -> None:
    count = choose.draw(st.integers(1, 9))
    shape = choose.draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.randn(count, *shape)
    with tempfile.TemporaryDirectory() as place:
        folder = choose.draw(st.sampled_from([None, Path(place) / "store"])) if values.numel() else None
        store = ActivationStore.create(count, [values[:1]], folder=folder)
        for row in choose.draw(st.permutations(range(count))):
            store.write(torch.tensor([row]), [values[row][None]])
        asked = torch.tensor(choose.draw(st.lists(st.integers(0, count - 1), min_size=1)))
        assert torch.equal(store.read(asked)[0], values[asked])


def test_beyond_its_budget_it_is_in_files_that_do_not_outlive_the_run(
    data: PictureData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[list[str]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: Trainer) -> None:
            seen.append([each.name for each in tmp_path.iterdir()])

    runs = [
        fitted(dropping(), data.train, data.val, Look(), cache=ActivationCache(budget=budget), policy=TrainLast(1))
        for budget in ("1GB", 0)
    ]
    assert furthest(runs[0].model, runs[1].model) == 0
    assert [len(each) for each in seen] == [0, 0, 0, 2, 2, 2]
    assert list(tmp_path.iterdir()) == []


def test_files_go_also_when_the_run_is_broken_off(data: PictureData, tmp_path: Path) -> None:
    class Break(Callback):
        def on_validation_end(self, trainer: Trainer) -> None:
            raise ZeroDivisionError

    with pytest.raises(CallbackError, match="Break"):
        fitted(
            dropping(),
            data.train,
            data.val,
            Break(),
            cache=ActivationCache(budget=0, directory=tmp_path),
            preset=v2.Compose([v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
        )
    assert [each for each in tmp_path.iterdir() if "partial" in each.name] == []


def test_a_disk_without_room_is_known_before_anything_is_computed(
    data: PictureData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    train = Counted(data.train)
    fitted(dropping(), train, data.val, cache=ActivationCache(budget=0, directory=tmp_path), epochs=2)
    assert set(train.reads.values()) == {2}


def test_a_store_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"activations cannot be kept in .*file"):
        ActivationStore.create(2, [torch.zeros(1, 2)], folder=tmp_path / "file" / "store")
    with pytest.raises(OutputError, match="activations cannot be kept"):
        ActivationStore.create(2**50, [torch.zeros(1, 2)], folder=tmp_path / "store")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("dtype", "off"), [("fp32", 0.0), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_half_the_bytes_cost_a_little(data: PictureData, dtype: str, off: float) -> None:
    exact, kept = (
        fitted(dropping(), data.train, data.val, cache=ActivationCache(dtype=each)) for each in ("auto", dtype)
    )
    assert furthest(exact.model, kept.model) <= off
    sizes = []
    for cache in (exact.activations, kept.activations):
        model = dropping().freeze(dropping().stage_names[:-1])
        preset = eval_transform("imagenet", model.preprocessing)
        batches = loader(data.val, preset, batch_size=8, train=False)
        sizes.append(cache.choose(model, batches, batches, epochs=2).bytes)
    assert sizes[1] == (sizes[0] if dtype == "fp32" else sizes[0] // 2)


# Later runs


def later(data: PictureData, folder: Path, **options: Any) -> tuple[Counter[int], Trainer]:
    train = data.train
    seen: list[tuple[int, int]] = []

    class Look(Callback):
        def on_frozen_pass_batch_end(self, trainer: Trainer) -> None:
            seen.append(trainer.frozen_pass)

    model = options.pop("model", None) or dropping()
    trainer = fitted(model, train, data.val, Look(), cache=ActivationCache(directory=folder, views=2), **options)
    return Counter(of for _, of in seen), trainer


def test_a_later_run_with_another_rate_or_head_starts_from_what_is_there(data: PictureData, tmp_path: Path) -> None:
    first, trainer = later(data, tmp_path)
    assert first == {5: 5, 3: 3}  # 36 and 18 pictures in batches of 8
    again, same = later(data, tmp_path)
    assert again == {}
    assert furthest(trainer.model, same.model) == 0
    wider = dropping()
    wider.class_names = ("a", "b", "c")
    assert later(data, tmp_path, model=wider, label_smoothing=0.1)[0] == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_the_activations_depend_on_makes_others(picture_folder: Path, tmp_path: Path) -> None:
    pictures, cache = tmp_path / "pictures", tmp_path / "cache"
    shutil.copytree(picture_folder, pictures)
    assert later(image_folder(pictures), cache)[0]
    assert later(image_folder(pictures), cache, policy=TrainLast(1))[0] == {5: 5, 3: 3}
    assert later(image_folder(pictures), cache, model=dropping(seed=1))[0] == {5: 5, 3: 3}
    # the plain view is there already, the augmented one is not
    assert later(image_folder(pictures), cache, preset="light", epochs=2)[0] == {5: 5}
    assert later(image_folder(pictures), cache, preset="cifar", epochs=2)[0] == {5: 5}
    picture = pictures / "train" / "red" / "0.jpg"
    Image.new("RGB", (40, 40), "red").save(picture)
    assert later(image_folder(pictures), cache)[0] == {5: 5}
    shutil.move(pictures, tmp_path / "elsewhere")
    assert later(image_folder(tmp_path / "elsewhere"), cache)[0] == {}


@pytest.mark.parametrize("damage", ["cut", "json", "facts", "gone", "rows"])
def test_what_is_damaged_is_computed_anew(data: PictureData, tmp_path: Path, damage: str) -> None:
    _, whole = later(data, tmp_path)
    for folder in tmp_path.iterdir():
        about, tensor = folder / "activations.json", folder / "0.npy"
        content = json.loads(about.read_text())
        if damage == "cut":
            tensor.write_bytes(tensor.read_bytes()[:100])
        elif damage == "json":
            about.write_text(about.read_text()[:50])
        elif damage == "facts":
            about.write_text(json.dumps({**content, "facts": {}}))
        elif damage == "gone":
            tensor.unlink()
        else:
            other = ActivationStore.create(3, [torch.zeros(1, 2)], folder=tmp_path / "other")
            shutil.copy(tmp_path / "other" / "0.npy", tensor)
            other.close()
    again, trainer = later(data, tmp_path)
    assert again == {5: 5, 3: 3}
    assert furthest(whole.model, trainer.model) == 0
    assert later(data, tmp_path)[0] == {}


def test_the_contents_of_files_count_and_not_their_names(picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(picture_folder, tmp_path / "copy")
    first, second = (image_folder(each) for each in (picture_folder, tmp_path / "copy"))
    assert contents_of(first.train) == contents_of(second.train) != contents_of(first.val)
    assert contents_of([(Image.new("RGB", (4, 4)), 0)]) is None  # type: ignore[arg-type]


# Interrupts


def test_an_interrupt_within_the_frozen_pass_is_heard_and_the_run_goes_on(data: PictureData) -> None:
    whole = fitted(dropping(), data.train, data.val, cache=ActivationCache(), policy=HEAD_THEN_ALL, epochs=5)

    class Stop(Callback):
        armed = True

        def on_frozen_pass_batch_end(self, trainer: Trainer) -> None:
            if self.armed and trainer.epoch == 2:
                self.armed = False
                signal.raise_signal(signal.SIGINT)

    model, stop = dropping(), Stop()
    shape: dict[str, Any] = {"batch_size": 8, "seed": 0}
    train = loader(data.train, train_transform("none", model.preprocessing), train=True, **shape)
    val = loader(data.val, eval_transform("imagenet", model.preprocessing), train=False, **shape)
    optimizer = build_optimizer("sgd", param_groups(model, lr=0.05))
    trainer = Trainer(
        model, optimizer, policy=HEAD_THEN_ALL, callbacks=[stop], device="cpu", activations=ActivationCache()
    )
    with pytest.raises(Interrupted, match="step 0 of 5 in epoch 3"):
        trainer.fit(train, val, epochs=5)
    trainer.fit(train, val, epochs=5)
    assert not stop.armed
    assert furthest(whole.model, trainer.model) == 0


# Settings


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"views": -1}, "views must be 0 or more"),
        ({"budget": "many"}, "cache_budget='many'"),
        ({"budget": -5}, "cache_budget=-5"),
        ({"dtype": "int8"}, "cache_dtype='int8'"),
    ],
)
def test_settings_outside_their_range_are_refused(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ActivationCache(**given_settings)


def test_a_finetuner_passes_its_settings_on(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cache_budget"):
        Finetuner("torchvision/resnet18", cache_budget="2 apples")
    assert check_budget(7) == 7
    assert check_budget(None) is None


@pytest.mark.parametrize(("views", "preset"), [(None, "none"), (1, "none"), (4, "light")])
def test_several_views_of_a_head_are_augmented_ones(views: int | None, preset: str) -> None:
    assert Finetuner("torchvision/resnet18", policy="head", views=views).recipe.train_preset == preset


def test_a_run_of_the_finetuner_says_what_is_kept(
    picture_folder: Path, capfd: pytest.CaptureFixture[str], tiny_network: Callable[..., nn.Module]
) -> None:
    tuner = Finetuner(tiny_network(), weights=None, epochs=5, preprocessing=Preprocessing(32, 32), device="cpu")
    tuner.fit(picture_folder)
    plan = [line for line in capfd.readouterr().err.splitlines() if line.startswith("activations")]
    assert plan[0].startswith("activations: kept behind stage")
    assert "90 pictures run through it instead of 108" in plan[0]
    assert plan[1] == "activations from epoch 3: not kept: stem trains"
