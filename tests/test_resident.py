"""Pictures that are kept on a device give the loader's batches, or other draws of the loader's law."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from transferkit.batch_transforms import crop_boxes, cut, placements, uniform_numbers
from transferkit.callbacks import Callback
from transferkit.create import create_model
from transferkit.exceptions import PictureError, SettingError
from transferkit.finetuner import Finetuner
from transferkit.freezing import LinearProbe
from transferkit.loading import Batches, loader
from transferkit.optim import build_optimizer, param_groups
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.resident import ResidentBatches, can_be_resident, resident_bytes
from transferkit.sources import DatasetPictures, Picture, PictureFiles
from transferkit.trainer import Trainer
from transferkit.transforms import (
    Transform,
    cifar_eval,
    cifar_train,
    imagenet_eval,
    imagenet_train,
    light,
    none,
    trivial_augment,
)

CPU = torch.device("cpu")
SMALL = Preprocessing(size=16, resize_size=18)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_step.py"


def pictures(count: int = 7, *, channels: int = 3, seed: int = 0, side: int | None = None) -> DatasetPictures:
    """Noise of differing sizes, PIL where it can be, with labels 0, 1, 2, 0, 1, …"""
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Any, int]] = []
    for index in range(count):
        height, width = (side, side) if side else rng.integers(20, 60, 2)
        noise = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        pil = channels in (3, 4)
        pairs.append((Image.fromarray(noise) if pil else torch.from_numpy(noise).permute(2, 0, 1), index % 3))
    return DatasetPictures(pairs, label_map=(0, 1, 2), channels=channels)


def batches_of(source: Any, transform: Transform, **options: Any) -> Batches:
    return loader(source, transform, **{"batch_size": 3, "train": True, **options})


def by_key(batches: Batches, epoch: int = 0, skip: int = 0) -> dict[tuple[int, int, int], Tensor]:
    """Return every image of an epoch under its (epoch, index, view)."""
    batches.order.set_epoch(epoch, skip=skip)
    keys = [key for batch in batches.batch_keys() for key in batch]
    images = [image for some, _ in batches for image in some]
    return dict(zip(keys, images, strict=True))


def same(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first.keys() & second.keys())


# Nothing random: the loader's own batches


@pytest.mark.parametrize("make", [imagenet_eval, none, cifar_eval])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_without_augmentation_the_batches_are_the_loaders_own(
    make: Callable[[Preprocessing], Transform], channels: int
) -> None:
    for interpolation, crop in product(("nearest", "bilinear", "bicubic"), ("center", "squash", "border")):
        chosen = Preprocessing(size=24, resize_size=28, interpolation=interpolation, crop=crop)
        source = pictures(channels=channels)
        for train in (True, False):
            wanted = batches_of(source, make(chosen.with_channels(channels)), train=train)
            found = ResidentBatches(wanted, CPU)
            assert can_be_resident(wanted)
            assert len(found) == len(wanted)
            for (images, labels), (expected, expected_labels) in zip(found, wanted, strict=True):
                assert torch.equal(images, expected)
                assert torch.equal(labels, expected_labels)
                assert images.dtype == torch.float32


def test_names_and_labels_follow_the_order_of_every_epoch() -> None:
    source = pictures(8)
    found = ResidentBatches(batches_of(source, light(SMALL), num_workers=0), CPU)
    orders = []
    for epoch in range(2):
        found.order.set_epoch(epoch)
        keys = list(found.batch_keys())
        labels = [labels.tolist() for _, labels in found]
        assert labels == [[source.labels()[index] for _, index, _ in batch] for batch in keys]
        assert [found.names(number) for number in range(len(keys))] == [
            [source.name(index) for _, index, _ in batch] for batch in keys
        ]
        orders.append(labels)
    assert orders[0] != orders[1]


def test_a_process_keeps_its_share_of_what_it_evaluates_and_everything_it_may_train_on() -> None:
    source, seen = pictures(7), {}
    for rank in range(3):
        wanted = batches_of(source, imagenet_eval(SMALL), train=False, rank=rank, world_size=3)
        found = ResidentBatches(wanted, CPU)
        assert resident_bytes(wanted) == len(wanted.order) * (3 * 16 * 16 + 8)
        assert same(by_key(found), by_key(wanted))
        seen.update(by_key(found))
    assert len(seen) == 7
    one = by_key(ResidentBatches(batches_of(source, light(SMALL)), CPU), 2)
    for rank in range(2):
        shared = by_key(ResidentBatches(batches_of(source, light(SMALL), rank=rank, world_size=2), CPU), 2)
        assert len(shared) == 3
        assert same(one, shared)
    alone = ResidentBatches(batches_of(pictures(1), imagenet_eval(SMALL), train=False, rank=1, world_size=2), CPU)
    assert list(alone) == []


# Random numbers: a function of (seed, epoch, index, view)


@pytest.mark.parametrize("make", [light, imagenet_train, cifar_train])
def test_augmentation_depends_on_seed_epoch_index_and_view_alone(make: Callable[[Preprocessing], Transform]) -> None:
    source = pictures(8)
    wanted = by_key(ResidentBatches(batches_of(source, make(SMALL), balanced=True), CPU), 3)
    torch.manual_seed(99)
    smaller = ResidentBatches(batches_of(source, make(SMALL), balanced=True, batch_size=2), CPU)
    by_key(smaller, 1)  # no iteration moves another
    assert same(by_key(smaller, 3), wanted)
    later = by_key(smaller, 3, skip=4)
    assert len(later) == 4
    assert same(later, wanted)
    for seed, epoch in ((0, 4), (1, 3)):
        other = by_key(ResidentBatches(batches_of(source, make(SMALL), seed=seed), CPU), epoch)
        at_three = {(3, index, view): image for (_, index, view), image in other.items()}
        assert not same(at_three, wanted)


def test_pictures_that_balanced_sampling_repeats_are_augmented_anew() -> None:
    source = pictures(9)
    source = DatasetPictures([(picture, int(i > 0)) for i, (picture, _) in enumerate(source.dataset)], (0, 1))
    found = by_key(ResidentBatches(batches_of(source, light(SMALL), balanced=True), CPU))
    views = [image for (_, index, _), image in found.items() if index == 0]
    assert len(views) >= 4
    assert not any(torch.equal(views[0], view) for view in views[1:])


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9, unique=True), st.data())
@settings(deadline=None)
def test_random_numbers_belong_to_a_picture_and_not_to_its_place(key: int, indices: list[int], data: Any) -> None:
    views = data.draw(st.lists(st.integers(0, 10**6), min_size=len(indices), max_size=len(indices)))
    whole = uniform_numbers(key, np.array(indices), np.array(views), 5)
    assert ((whole >= 0) & (whole < 1)).all()
    for number, (index, view) in enumerate(zip(indices, views, strict=True)):
        assert (uniform_numbers(key, np.array([index]), np.array([view]), 5)[0] == whole[number]).all()


def test_random_numbers_are_uniform_and_independent() -> None:
    count = 20_000
    numbers = uniform_numbers(12345, np.arange(count), np.zeros(count, dtype=np.int64), 6)
    others = uniform_numbers(12345, np.arange(count), np.ones(count, dtype=np.int64), 6)
    together = np.concatenate([numbers, others], axis=1)
    histogram = np.stack([np.histogram(column, 20, (0, 1))[0] for column in together.T]) / count
    assert abs(histogram - 0.05).max() < 0.008  # five standard deviations
    assert abs(np.corrcoef(together.T) - np.eye(12)).max() < 0.036
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.036


# Crops


@pytest.mark.parametrize(("height", "width"), [(40, 60), (30, 200), (200, 30), (7, 5)])
@pytest.mark.parametrize("smallest", [0.08, 0.5])
def test_boxes_follow_the_law_of_torchvision(height: int, width: int, smallest: float) -> None:
    count = 3000
    crop = v2.RandomResizedCrop(16, scale=(smallest, 1.0))
    with seeded(0):
        drawn = [crop.make_params([torch.empty(3, height, width)]) for _ in range(count)]
    theirs = np.array([[each[name] for name in ("top", "left", "height", "width")] for each in drawn])
    sizes = np.tile([height, width], (count, 1))
    uniform = uniform_numbers(1, np.arange(count), np.zeros(count, dtype=np.int64), 22)
    ours = crop_boxes(uniform, sizes, scale=crop.scale, ratio=crop.ratio)
    assert (ours >= [0, 0, 1, 1]).all()
    assert (ours[:, :2] + ours[:, 2:] <= sizes).all()
    for of in (
        lambda boxes: boxes[:, 2] * boxes[:, 3] / (height * width),
        lambda boxes: np.log(boxes[:, 3] / boxes[:, 2]),
        lambda boxes: boxes[:, 0] / height,
        lambda boxes: boxes[:, 1] / width,
    ):
        mine, other = of(ours), of(theirs)
        spread = max(mine.std(), other.std(), 1e-9)
        assert abs(mine.mean() - other.mean()) < 5 * spread * np.sqrt(2 / count)
        assert (
            abs(np.quantile(mine, [0.1, 0.5, 0.9]) - np.quantile(other, [0.1, 0.5, 0.9])).max() < 0.25 * spread + 1e-9
        )


@pytest.mark.parametrize(("height", "width", "ratio"), [(10, 90, 4 / 3), (90, 10, 3 / 4)])
def test_where_no_box_fits_it_is_the_largest_central_one(height: int, width: int, ratio: float) -> None:
    ours = crop_boxes(np.full((1, 22), 0.9), np.array([[height, width]]), scale=(1, 1), ratio=(3 / 4, 4 / 3))
    with seeded(0):
        theirs = v2.RandomResizedCrop(8, scale=(1, 1)).make_params([torch.empty(3, height, width)])
    assert ours[0].tolist() == [theirs[name] for name in ("top", "left", "height", "width")]
    assert ours[0, 3] / ours[0, 2] == pytest.approx(ratio, rel=0.05)


def smooth(height: int, width: int) -> Tensor:
    """A picture of a few waves, (3, H, W) uint8."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [torch.sin(9 * x + 4 * y), torch.cos(7 * y - 5 * x), torch.sin(11 * x * y)]
    return ((torch.stack(waves) + 1) * 127.5).to(torch.uint8)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_from_the_square_copy_is_the_crop_from_the_picture(interpolation: str, flip: bool) -> None:
    height, width, size = 150, 210, 64
    picture, mode = v2.functional.to_pil_image(smooth(height, width)), InterpolationMode(interpolation)
    square = v2.functional.pil_to_tensor(v2.functional.resize(picture, [128, 128], interpolation=mode))
    boxes = np.array([[0, 0, 150, 210], [20, 30, 110, 150], [40, 101, 110, 109], [12, 0, 100, 130]])
    sizes, flips = np.tile([height, width], (4, 1)), np.array([flip] * 4)
    places = torch.from_numpy(placements(boxes, sizes, flips))
    crops = cut(square.expand(4, -1, -1, -1), places, size, interpolation)
    for box, found in zip(boxes.tolist(), crops, strict=True):
        wanted = v2.functional.resized_crop(picture, *box, [size, size], interpolation=mode)
        wanted = v2.functional.horizontal_flip(wanted) if flip else wanted
        difference = (found.int() - v2.functional.pil_to_tensor(wanted).int()).abs()
        # The nearest pixel of a copy's nearest pixels is up to a pixel away.
        assert difference.max() <= (16 if interpolation == "nearest" else 4)
        assert difference.float().mean() < (5 if interpolation == "nearest" else 0.8)


def test_a_copy_that_is_shrunk_by_two_does_not_alias() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    whole = torch.tensor([[[1.0, 0], [1, 0]]])
    shrunk = cut(stripes, whole, 32, "bilinear").float()
    assert shrunk[..., 1:-1].std() < 1
    assert shrunk.mean().item() == pytest.approx(127.5, abs=3)


@pytest.mark.parametrize("make", [light, imagenet_train])
def test_crops_show_the_same_pictures_as_the_loaders_on_average(make: Callable[[Preprocessing], Transform]) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (48, 1, 3))
    source = DatasetPictures([(Image.fromarray(ramp), 0)] * 600, (0,))
    wanted = batches_of(source, make(SMALL), batch_size=200)
    assert can_be_resident(wanted)
    ours, theirs = (torch.cat([images for images, _ in each]) for each in (ResidentBatches(wanted, CPU), wanted))
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.15)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    mirrored = (ours[..., 0].mean((1, 2)) > ours[..., -1].mean((1, 2))).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.1)
    assert ours.amin().item() >= theirs.amin().item() - 0.1
    assert ours.amax().item() <= theirs.amax().item() + 0.1


# Shifts


def test_every_shifted_picture_is_one_that_torchvision_may_make_and_all_are_as_frequent() -> None:
    chosen = Preprocessing(size=32, resize_size=32)
    source = pictures(60, side=32)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(chosen.mean, chosen.std)])
    found: Counter[tuple[int, int, bool]] = Counter()
    resident = ResidentBatches(batches_of(source, cifar_train(chosen), batch_size=20), CPU)
    possible = {}
    for index in range(60):
        bordered = v2.functional.pad(v2.functional.pil_to_tensor(source[index][0]), [4])
        for top, left, flip in product(range(9), range(9), (False, True)):
            square = bordered[:, top : top + 32, left : left + 32]
            square = normalise(square.flip(-1) if flip else square)
            possible[square.numpy().tobytes()] = (index, top, left, flip)
    for epoch in range(20):
        for (_, index, _), image in by_key(resident, epoch).items():
            whose, *shift = possible[image.contiguous().numpy().tobytes()]
            assert whose == index
            found[tuple(shift)] += 1
    count = found.total()
    assert count == 1200
    for position in (0, 1):
        shares = [sum(n for key, n in found.items() if key[position] == each) / count for each in range(9)]
        assert max(abs(share - 1 / 9) for share in shares) < 0.046  # five standard deviations
    assert sum(n for key, n in found.items() if key[2]) / count == pytest.approx(0.5, abs=0.072)


def test_shifted_pictures_are_enlarged_as_the_loader_does() -> None:
    chosen = Preprocessing(size=64, resize_size=64)
    source = DatasetPictures([(Image.fromarray(smooth(32, 32).permute(1, 2, 0).numpy()), 0)] * 2, (0,))
    image = next(iter(ResidentBatches(batches_of(source, cifar_train(chosen)), CPU)))[0][0]
    found = v2.functional.to_pil_image(
        (image * torch.tensor(chosen.std)[:, None, None] + torch.tensor(chosen.mean)[:, None, None]).clamp(0, 1)
    )
    bordered = v2.functional.pad(source[0][0], [4])
    least = min(
        int(np.abs(np.asarray(each, dtype=int) - np.asarray(found, dtype=int)).max())
        for top, left, flip in product(range(9), range(9), (False, True))
        for square in [v2.functional.crop(bordered, top, left, 32, 32)]
        for each in [v2.functional.resize(v2.functional.horizontal_flip(square) if flip else square, [64, 64])]
    )
    assert least <= 1


# What can be kept, and what it takes


class Turning(DatasetPictures):
    """A data set that may draw random numbers."""

    random = True


@pytest.mark.parametrize(
    ("transform", "possible"),
    [
        (none(SMALL), True),
        (imagenet_eval(SMALL), True),
        (cifar_eval(SMALL), True),
        (cifar_train(SMALL), True),
        (light(SMALL), True),
        (imagenet_train(SMALL), True),
        (cifar_train(SMALL, jitter=0.1), False),
        (cifar_train(SMALL, rotation=5), False),
        (cifar_train(SMALL.with_channels(4), jitter=0.1), False),
        (trivial_augment(SMALL), False),
        (trivial_augment(SMALL.with_channels(4)), False),
        (v2.Compose([v2.Resize((16, 16)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]), False),
    ],
)
def test_our_presets_of_crops_and_flips_can_be_kept_and_nothing_else(transform: Any, possible: bool) -> None:
    source = pictures()
    batches = batches_of(source, transform)
    assert can_be_resident(batches) is possible
    assert not can_be_resident(batches_of(Turning(source.dataset, source.label_map), transform))
    if possible:
        assert resident_bytes(batches) > 0
        assert {len(images) for images, _ in ResidentBatches(batches, CPU)} == {3}
    else:
        for make in (resident_bytes, lambda each: ResidentBatches(each, CPU)):
            with pytest.raises(SettingError, match="cannot be kept on a device"):
                make(batches)


def test_pictures_of_floats_and_random_evaluation_are_left_to_the_loader() -> None:
    floats = DatasetPictures([(torch.rand(3, 20, 20), 0)] * 3, (0,))
    assert not can_be_resident(batches_of(floats, light(SMALL)))
    assert not can_be_resident(batches_of(pictures(), light(SMALL), train=False))


@pytest.mark.parametrize("make", [light, imagenet_train, cifar_train, imagenet_eval])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_the_store_takes_the_bytes_that_were_said_whatever_the_channels(
    make: Callable[[Preprocessing], Transform], channels: int
) -> None:
    chosen = Preprocessing(size=24, resize_size=24).with_channels(channels)
    batches = batches_of(pictures(channels=channels), make(chosen))
    resident = ResidentBatches(batches, CPU)
    images, _ = next(iter(resident))
    assert images.shape == (3, channels, 24, 24)
    store = resident._store
    assert store is not None
    assert store.images.dtype == torch.uint8
    assert store.images.nbytes + store.labels.nbytes == resident_bytes(batches)


def test_what_crops_take_is_known_before_a_file_is_opened() -> None:
    files = PictureFiles([Picture("none.jpg", 0)] * 5)
    for make in (light, imagenet_train):
        assert resident_bytes(batches_of(files, make(Preprocessing()), batch_size=1)) == 5 * (3 * 448 * 448 + 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_named_before_the_first_batch(tmp_path: Path, workers: int) -> None:
    names = [tmp_path / f"{number}.png" for number in range(6)]
    for name in names[:-1]:
        Image.new("RGB", (20, 20)).save(name)
    names[-1].write_bytes(b"no picture")
    files = PictureFiles([Picture(str(name), 0) for name in names])
    resident = ResidentBatches(batches_of(files, light(SMALL), num_workers=workers, batch_size=2), CPU)
    with pytest.raises(PictureError, match=r"5\.png"):
        next(iter(resident))


def test_worker_processes_keep_the_same_pictures(picture_folder: Path) -> None:
    files = PictureFiles([Picture(str(path), 0) for path in sorted((picture_folder / "train").rglob("*.*"))[:8]])
    one, two = (ResidentBatches(batches_of(files, light(SMALL), num_workers=n), CPU) for n in (0, 2))
    assert same(by_key(one, 1), by_key(two, 1))


# In training


@pytest.mark.parametrize("make", [none, light])
def test_a_trainer_trains_on_them_as_on_the_loaders(make: Callable[[Preprocessing], Transform]) -> None:
    losses = []
    for resident in (False, True):
        model = create_model("timm/test_efficientnet", num_classes=3, weights=None, image_size=32, seed=0)
        source = pictures(12, side=40)
        train = batches_of(source, make(model.preprocessing), batch_size=4)
        val = batches_of(source, imagenet_eval(model.preprocessing), train=False)
        optimizer = build_optimizer("sgd", param_groups(model, lr=0.01))
        trainer = Trainer(model, optimizer, policy=LinearProbe(), device="cpu", precision="fp32")
        given = (ResidentBatches(train, CPU), ResidentBatches(val, CPU)) if resident else (train, val)
        losses.append([record.train_loss for record in trainer.fit(*given, epochs=2).records])
    if make is none:
        assert losses[0] == losses[1]
    else:
        assert losses[0] == pytest.approx(losses[1], rel=0.3)


def tuner(resident: bool | None, **options: Any) -> Finetuner:
    given: dict[str, Any] = {"policy": "full", "epochs": 2, "batch_size": 4, "image_size": 32, "progress": False}
    return Finetuner("timm/test_efficientnet", weights=None, resident=resident, device="cpu", **given, **options)


def test_a_finetuner_trains_on_resident_pictures_where_it_is_told_to(
    picture_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="transferkit"):
        told = tuner(True, train_preset="none")
        resident = told.fit(picture_folder)
        said = [record.message for record in caplog.records if "stay on cpu" in record.message]
        assert [line.split()[0] for line in said] == ["training", "validation"]
        assert all(line.endswith("kB") for line in said)
        caplog.clear()
        left = tuner(None, train_preset="none").fit(picture_folder)
        assert "stay on" not in caplog.text
    assert resident["train_loss"] == left["train_loss"]
    assert resident["val_loss"] == left["val_loss"]
    assert told.evaluate(picture_folder / "val")["accuracy"] == resident.best().val_accuracy


def test_a_resident_run_that_is_interrupted_goes_on_to_the_same_weights(picture_folder: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer) -> None:
            if trainer.step == 3:
                raise KeyboardInterrupt

    whole, broken = tuner(True), {"output_dir": tmp_path, "checkpoint_every": 1, "checkpoint_interval": 0}
    whole.fit(picture_folder)
    with pytest.raises(KeyboardInterrupt):
        tuner(True, callbacks=[Stop()], **broken).fit(picture_folder)
    resumed = tuner(True, **broken)
    resumed.fit(picture_folder, resume="auto")
    assert whole.model is not None
    assert resumed.model is not None
    assert resumed.history["train_loss"] == whole.history["train_loss"]
    assert same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


def test_what_cannot_be_resident_is_refused_where_it_was_asked_for(picture_folder: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot be kept on a device; .* without jitter, rotation or trivial_augm"):
        tuner(True, train_preset="trivial_augment").fit(picture_folder)


def test_crops_that_would_lose_detail_are_left_to_the_loader_unless_they_are_asked_for() -> None:
    sharp = [can_be_resident(batches_of(pictures(), make(SMALL)), sharp=True) for make in (light, imagenet_train)]
    assert sharp == [True, False]


# The benchmark


def gpu_step(*options: str) -> str:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *options]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.long
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    assert gpu_step().startswith("no GPU: ")


@pytest.mark.long
@pytest.mark.by_hand
def test_the_benchmark_runs_to_its_table() -> None:
    said = gpu_step("--quick")
    for run in ("bare step", "kept on the device", "loader", "tutorial"):
        assert said.count(f"| {run}") == 2
    assert said.count("asked at least 0.85 of the bare step, came to ") == 2
