import pickle
import re
from collections import Counter
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torchvision.datasets import FakeData
from torchvision.transforms.v2.functional import pil_to_tensor

from transferkit.data import (
    EpochSampler,
    Picture,
    PictureFiles,
    TransformedDataset,
    from_datasets,
    image_folder,
    labelled_folder,
    loader,
    read_picture,
)
from transferkit.exceptions import DataError, PictureError, SettingError
from transferkit.prediction import predict
from transferkit.preprocessing import Preprocessing
from transferkit.reading import in_channels
from transferkit.transforms import eval_transform, train_transform

SMALL = Preprocessing(size=8, resize_size=8)
TRAIN, EVAL = train_transform("light", SMALL), eval_transform("imagenet", SMALL)


def make(root: Path, **counts: int) -> Path:
    """Pictures in class folders; ``__`` in a name stands for a slash."""
    for position, (name, count) in enumerate(counts.items()):
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng((position, index)).integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{index}.png")
    return root


def pairs(*labels, size=6):
    return [(Image.new("RGB", (size, size), (40 * i, 0, 0)), label) for i, label in enumerate(labels)]


def batches(loaded, epoch=0):
    loaded.sampler.set_epoch(epoch)
    return [(images, labels) for images, labels in loaded]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for left, right in zip(first, second, strict=True) for a, b in zip(left, right, strict=True)
    )


# Order


@given(count=st.integers(0, 60), world_size=st.integers(1, 7), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_evaluation_shards_hold_every_index_exactly_once(count, world_size, seed, epoch):
    shards = [
        EpochSampler(count, seed=seed, shuffle=False, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for shard in shards:
        shard.set_epoch(epoch)
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert sorted(key for shard in shards for key in shard) == [(epoch, index, 0) for index in range(count)]


@given(world_size=st.integers(1, 7), extra=st.integers(0, 50), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_training_shards_are_equal_and_drop_fewer_than_the_processes(world_size, extra, seed, epoch):
    count = world_size + extra
    keys = []
    for rank in range(world_size):
        shard = EpochSampler(count, seed=seed, shuffle=True, rank=rank, world_size=world_size)
        shard.set_epoch(epoch)
        assert len(list(shard)) == len(shard) == count // world_size
        keys.extend(shard)
    assert len(set(keys)) == len(keys) == count - count % world_size
    assert all(epoch == key[0] and 0 <= key[1] < count and key[2] == 0 for key in keys)


def test_two_processes_together_see_the_order_one_process_sees():
    alone = list(EpochSampler(8, seed=3, shuffle=True))
    shards = [list(EpochSampler(8, seed=3, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    assert [key for step in zip(*shards, strict=True) for key in step] == alone


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochSampler(20, seed=seed, shuffle=True)
        sampler.set_epoch(epoch)
        torch.rand(1)
        return [index for _, index, _ in sampler]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_impossible_shards_are_refused():
    with pytest.raises(SettingError, match="rank must be below world_size=2, got 2"):
        EpochSampler(5, seed=0, shuffle=True, rank=2, world_size=2)
    with pytest.raises(SettingError, match="2 pictures cannot be shared by 3 processes"):
        EpochSampler(2, seed=0, shuffle=True, world_size=3)


# Balance

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def balanced(labels, *, seed=0, epoch=0, **shard):
    sampler = EpochSampler(len(labels), seed=seed, shuffle=True, labels=labels, **shard)
    sampler.set_epoch(epoch)
    return sampler


@given(labels=LABELS, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_a_balanced_epoch_is_as_long_and_has_every_class_equally_often(labels, seed, epoch):
    keys = list(balanced(labels, seed=seed, epoch=epoch))
    assert len(keys) == len(labels)
    assert {key[0] for key in keys} == {epoch}
    counts = Counter(labels[index] for _, index, _ in keys)
    assert max(counts.values()) - min(counts[label] for label in set(labels)) <= 1


@given(labels=LABELS, seed=st.integers(0, 9))
def test_no_picture_comes_again_before_all_of_its_class_have(labels, seed):
    seen = Counter()
    for _, index, view in balanced(labels, seed=seed):
        same = [seen[other] for other, label in enumerate(labels) if label == labels[index]]
        assert view == seen[index] == min(same)
        seen[index] += 1


@given(labels=LABELS, world_size=st.integers(1, 5))
def test_processes_share_a_balanced_epoch_without_overlap(labels, world_size):
    world_size = min(world_size, len(labels))
    alone = list(balanced(labels, epoch=2))
    shards = [balanced(labels, epoch=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {len(list(shard)) for shard in shards} == {len(labels) // world_size}
    together = [key for step in zip(*shards, strict=True) for key in step]
    assert together == alone[: len(labels) - len(labels) % world_size]


def test_a_balanced_order_depends_on_seed_and_epoch_alone():
    labels = [0] * 3 + [1] * 20
    orders = {tuple(key[1:] for key in balanced(labels, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    np.random.seed(5)  # noqa: NPY002
    assert list(balanced(labels, seed=1)) == list(balanced(labels, seed=1))


def test_which_class_gets_one_more_changes_and_large_classes_take_turns():
    labels = [0] * 2 + [1] * 2 + [2] * 12
    epochs = [list(balanced(labels, epoch=epoch)) for epoch in range(30)]
    counts = [Counter(labels[index] for _, index, _ in keys) for keys in epochs]
    assert all(sorted(each.values()) == [5, 5, 6] for each in counts)
    assert {label for each in counts for label in each if each[label] == 6} == {0, 1, 2}
    assert {index for keys in epochs for _, index, _ in keys} == set(range(16))


def test_repeated_pictures_are_augmented_differently_and_alike_with_workers(tmp_path):
    data = image_folder(make(tmp_path, train__a=1, train__b=7, val__a=1, val__b=1))
    alone = loader(data.train, TRAIN, batch_size=4, train=True, balanced=True)
    helped = loader(data.train, TRAIN, batch_size=4, train=True, balanced=True, num_workers=2)
    seen = batches(alone, 3)
    assert equal(seen, batches(helped, 3))
    repeats = torch.cat([images[labels == 0] for images, labels in seen])
    assert len(repeats) == 4
    assert len({tuple(image.flatten().tolist()) for image in repeats}) == 4


def test_plain_pairs_can_be_balanced():
    labels = torch.cat([labels for _, labels in batches(loader(pairs(0, 1, 1, 1), EVAL, batch_size=2, train=True))])
    assert labels.sum() == 3
    even = loader(pairs(0, 1, 1, 1), EVAL, batch_size=2, train=True, balanced=True)
    assert torch.cat([labels for _, labels in batches(even)]).sum() == 2


def test_impossible_balance_is_refused():
    with pytest.raises(SettingError, match="2 labels for 3 pictures; give one label per picture"):
        EpochSampler(3, shuffle=True, labels=[0, 1])
    with pytest.raises(SettingError, match="labels balance the classes of a shuffled order"):
        EpochSampler(2, shuffle=False, labels=[0, 1])
    with pytest.raises(SettingError, match="balanced=True is for training"):
        loader(pairs(0, 1), EVAL, batch_size=1, train=False, balanced=True)


# A place in the epoch


@given(
    count=st.integers(4, 40),
    shuffle=st.booleans(),
    even=st.booleans(),
    world_size=st.integers(1, 3),
    rank=st.integers(0, 2),
    skip=st.integers(0, 45),
)
def test_what_follows_skipped_pictures_is_the_tail_of_the_whole_epoch(count, shuffle, even, world_size, rank, skip):
    labels = [index % 3 for index in range(count)] if shuffle and even else None
    shard = {"rank": min(rank, world_size - 1), "world_size": world_size}
    sampler = EpochSampler(count, seed=1, shuffle=shuffle, labels=labels, **shard)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.set_epoch(4, skip=skip)
    assert list(sampler) == whole[skip:]
    assert len(sampler) == len(whole)
    assert list(sampler.keys()) == whole
    sampler.set_epoch(4)
    assert list(sampler) == whole


class Reading(list):
    """Pairs that remember which of them were read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [7, 8, 9])  # a last batch of one, which is left out, of two, and a full one
def test_a_loader_goes_on_within_an_epoch_without_reading_what_was_before(count):
    source = Reading(pairs(*[0] * count))
    loaded = loader(source, TRAIN, batch_size=3, train=True)
    whole = batches(loaded, 2)
    source.read.clear()
    for done in range(len(whole) + 1):
        loaded.sampler.set_epoch(2, skip=3 * done)
        assert equal(list(loaded), whole[done:])
        assert len(loaded) == len(whole)
    loaded.sampler.set_epoch(2, skip=3)
    source.read.clear()
    list(loaded)
    assert source.read == [index for _, index, _ in loaded.sampler.keys(3, 3 * len(whole))]


@pytest.mark.parametrize("train", [False, True])
def test_a_batch_names_its_pictures_without_reading_them(tmp_path, train):
    data = image_folder(make(tmp_path, a=4, b=5))
    loaded = loader(data.train, pil_to_tensor, batch_size=3, train=train, balanced=train)
    loaded.sampler.set_epoch(5, skip=3)
    named = [loaded.names(batch) for batch in range(len(loaded))]
    loaded.sampler.set_epoch(5)
    for names, (images, _) in zip(named, loaded, strict=True):
        read = [pil_to_tensor(Image.open(name)) for name in names]
        assert torch.equal(torch.stack(read), images)


def test_pictures_without_names_are_named_by_their_index():
    loaded = loader(pairs(0, 1, 1), EVAL, batch_size=2, train=False)
    assert [loaded.names(0), loaded.names(1), loaded.names(2)] == [["0", "1"], ["2"], []]


# Batches


def test_workers_and_epochs_do_not_change_what_is_seen(tmp_path):
    data = image_folder(make(tmp_path, a=5, b=5))
    alone = loader(data.train, TRAIN, batch_size=3, seed=5, train=True)
    helped = loader(data.train, TRAIN, batch_size=3, seed=5, train=True, num_workers=2)
    first, second = batches(alone, 0), batches(alone, 1)
    assert equal(batches(helped, 1), second)  # an epoch needs no earlier one
    assert equal(batches(helped, 0), first)
    assert equal(batches(alone, 0), first)
    assert not equal(first, second)


def test_augmentation_is_a_function_of_seed_epoch_index_and_view():
    data = from_datasets(FakeData(4, (3, 16, 16), 2), FakeData(4, (3, 16, 16), 2), class_names="ab")
    dataset = TransformedDataset(data.train, TRAIN, seed=1)
    picture = dataset[2, 3, 0][0]
    torch.rand(5)
    assert torch.equal(picture, dataset[2, 3, 0][0])
    assert torch.equal(dataset[3][0], dataset[0, 3, 0][0])
    others = [dataset[1, 3, 0][0], dataset[2, 3, 1][0], TransformedDataset(data.train, TRAIN, seed=2)[2, 3, 0][0]]
    assert not any(torch.equal(picture, other) for other in others)


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches(loader(pairs(0, 1, 1), TRAIN, batch_size=2, train=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("count", "train", "sizes"),
    [(5, True, [2, 2]), (5, False, [2, 2, 1]), (4, True, [2, 2]), (1, True, [1])],
)
def test_only_a_lone_last_training_picture_is_left_out(count, train, sizes):
    loaded = loader(pairs(*[0] * count), EVAL, batch_size=2, train=train)
    assert [len(labels) for _, labels in batches(loaded)] == sizes
    assert len(loaded) == len(sizes)


def test_a_remainder_of_two_and_batches_of_one_stay():
    assert len(loader(pairs(*[0] * 5), EVAL, batch_size=3, train=True)) == 2
    assert len(loader(pairs(*[0] * 5), EVAL, batch_size=1, train=True)) == 5


def test_evaluation_goes_in_order(tmp_path):
    data = image_folder(make(tmp_path, train__a=2, train__b=2, val__a=2, val__b=1))
    loaded = loader(data.val, EVAL, batch_size=2, train=False)
    images = torch.cat([images for images, _ in batches(loaded)])
    expected = torch.stack([EVAL(Image.open(picture.path)) for picture in data.val.pictures])
    assert torch.equal(images, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_picture_surfaces_by_name(tmp_path, num_workers):
    make(tmp_path, a=3, b=3)
    (tmp_path / "a" / "1.png").write_text("no picture")
    source = labelled_folder(tmp_path, ["a", "b"])
    sentence = (
        f"cannot read picture {tmp_path}/a/1.png: its content is no picture Pillow can decode; replace or remove it"
    )
    with pytest.raises(PictureError, match=f"^{re.escape(sentence)}$"):
        batches(loader(source, EVAL, batch_size=2, train=False, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 4])
def test_files_are_read_in_the_transform_s_channels(tmp_path, channels, num_workers):
    make(tmp_path, a=2, b=2)
    clear = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    Image.fromarray(clear).save(tmp_path / "a" / "0.png")
    source = labelled_folder(tmp_path, ["a", "b"])
    transform = eval_transform("imagenet", SMALL.with_channels(channels))
    loaded = loader(source, transform, batch_size=3, train=False, num_workers=num_workers)
    images = torch.cat([images for images, _ in batches(loaded)])
    expected = [transform(read_picture(picture.path, channels=channels)) for picture in source.pictures]
    assert torch.equal(images, torch.stack(expected))
    if channels == 4:
        opaque = (1 - transform.transforms[-1].mean[3]) / transform.transforms[-1].std[3]
        assert [bool((image[3] == opaque).all()) for image in images] == [False, True, True, True]


def spectral(channels, count=6):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randint(256, (channels, 12, 10), generator=draw, dtype=torch.uint8), i % 2) for i in range(count)]


@pytest.mark.parametrize("preset", ["light", "trivial_augment"])
@pytest.mark.parametrize("channels", [2, 5])
def test_tensors_of_any_channels_load_alike_with_and_without_workers(channels, preset):
    if (channels, preset) == (2, "trivial_augment"):
        preset = "imagenet"
    data = from_datasets(spectral(channels), spectral(channels))
    transform = train_transform(preset, SMALL.with_channels(channels))
    alone = batches(loader(data.train, transform, batch_size=4, train=True), 2)
    helped = batches(loader(data.train, transform, batch_size=4, train=True, num_workers=2), 2)
    assert equal(alone, helped)
    assert alone[0][0].shape == (4, channels, 8, 8)


def test_three_channels_leave_the_source_as_it_is():
    data = from_datasets(pairs(0, 1), pairs(0))
    assert loader(data.train, TRAIN, batch_size=1, train=True).dataset.source is data.train


def test_a_transform_of_one_s_own_gets_what_the_source_was_asked_for():
    clear = [(Image.new("RGBA", (6, 6), (255, 0, 0, 0)), 0)]
    data = from_datasets(clear, clear, class_names="ab")

    def modes(source):
        return [source[0][0].mode, loader(source, pil_to_tensor, batch_size=1, train=False).dataset[0][0].shape[0]]

    assert modes(data.val) == ["RGB", 3]
    assert modes(data.val.with_channels(4)) == ["RGBA", 4]
    assert modes(data.val.with_channels(4).with_channels(3)) == ["RGB", 3]
    assert data.val.with_channels(4).labels() == data.val.labels()


def test_a_source_that_knows_no_channels_is_left_as_it_is(tmp_path):
    plain = pairs(0, 1)
    assert in_channels(plain, 4) is plain
    files = image_folder(make(tmp_path, a=2, b=2)).train
    assert in_channels(files, 4)[0][0].mode == "RGBA"


def test_files_are_refused_at_once_for_channels_they_do_not_have(tmp_path):
    source = labelled_folder(make(tmp_path, a=1), ["a"])
    with pytest.raises(DataError, match=r"the network takes 5; hand its pictures over as tensors \(5, H, W\)"):
        loader(source, eval_transform("imagenet", SMALL.with_channels(5)), batch_size=1, train=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_of_other_channels_is_refused_by_name(num_workers):
    data = from_datasets(spectral(3), spectral(3))
    loaded = loader(
        data.val,
        eval_transform("imagenet", SMALL.with_channels(5)),
        batch_size=2,
        train=False,
        num_workers=num_workers,
    )
    with pytest.raises(DataError, match=r"^sample 0 of list: a picture tensor has shape \(3, 12, 10\); it needs \(5, "):
        batches(loaded)


def test_worker_processes_end_with_the_loader_that_failed():
    """Not when the garbage collector comes round, which then waits 10 s for them."""
    data = from_datasets(spectral(4), spectral(4))
    before = set(active_children())
    with suppress(DataError):
        batches(loader(data.val, EVAL, batch_size=2, train=False, num_workers=2))
    assert set(active_children()) == before


def test_data_sets_travel_to_worker_processes():
    dataset = TransformedDataset(from_datasets(pairs(0, 1), pairs(0)).train, TRAIN, seed=0)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 1, 0][0], dataset[1, 1, 0][0])
    files = PictureFiles([Picture("a.png", 0)])
    assert pickle.loads(pickle.dumps(files)) == files


def test_impossible_loaders_are_refused():
    with pytest.raises(SettingError, match="batch_size must be from 1 to 1,000,000, got 0"):
        loader(pairs(0), EVAL, batch_size=0, train=True)
    with pytest.raises(DataError, match="there are no pictures to load"):
        loader([], EVAL, batch_size=1, train=True)


def test_large_jpeg_files_are_decoded_no_larger_than_needed_and_look_the_same(tmp_path):
    gradient = np.indices((1200, 1600)).sum(0)[..., None] // np.array([12, 14, 20])
    Image.fromarray(gradient.clip(0, 255).astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    source = PictureFiles([Picture(str(tmp_path / "large.jpg"), 0)])
    preprocessing = Preprocessing(size=64, resize_size=72)
    for transform in (eval_transform("imagenet", preprocessing), train_transform("light", preprocessing)):
        side = min(TransformedDataset(source, transform).source[0][0].size)
        assert transform.least_side <= side < 1200
    transform = eval_transform("imagenet", preprocessing)
    smaller = TransformedDataset(source, transform)[0][0]
    assert (smaller - transform(source[0][0])).abs().mean() < 0.01


def test_prediction_reads_a_file_as_validation_does(tmp_path, tiny_model):
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    file = tmp_path / "large.jpg"
    Image.fromarray(noise).save(file)
    model = tiny_model().eval()
    transform = eval_transform(model.eval_preset, model.preprocessing)
    image = TransformedDataset(PictureFiles([Picture(str(file), 0)]), transform)[0][0]
    with torch.no_grad():
        expected = torch.softmax(model(image[None]).double(), 1)[0]
    assert list(predict(model, file)[0].probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-7)
