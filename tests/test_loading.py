import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torchvision.datasets import FakeData

from transferkit.data import (
    EpochSampler,
    Picture,
    PictureFiles,
    TransformedDataset,
    from_datasets,
    image_folder,
    labelled_folder,
    loader,
)
from transferkit.exceptions import DataError, PictureError, SettingError
from transferkit.preprocessing import Preprocessing
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
    assert sorted(key for shard in shards for key in shard) == [(epoch, index) for index in range(count)]


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
    assert all(epoch == key[0] and 0 <= key[1] < count for key in keys)


def test_two_processes_together_see_the_order_one_process_sees():
    alone = list(EpochSampler(8, seed=3, shuffle=True))
    shards = [list(EpochSampler(8, seed=3, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    assert [key for step in zip(*shards, strict=True) for key in step] == alone


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochSampler(20, seed=seed, shuffle=True)
        sampler.set_epoch(epoch)
        torch.rand(1)
        return [index for _, index in sampler]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_impossible_shards_are_refused():
    with pytest.raises(SettingError, match="rank=2 with world_size=2"):
        EpochSampler(5, seed=0, shuffle=True, rank=2, world_size=2)
    with pytest.raises(SettingError, match="2 pictures cannot be shared by 3 processes"):
        EpochSampler(2, seed=0, shuffle=True, world_size=3)


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


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    data = from_datasets(FakeData(4, (3, 16, 16), 2), FakeData(4, (3, 16, 16), 2), class_names="ab")
    dataset = TransformedDataset(data.train, TRAIN, seed=1)
    picture = dataset[2, 3][0]
    torch.rand(5)
    assert torch.equal(picture, dataset[2, 3][0])
    assert torch.equal(dataset[3][0], dataset[0, 3][0])
    others = [dataset[1, 3][0], TransformedDataset(data.train, TRAIN, seed=2)[2, 3][0]]
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
    with pytest.raises(PictureError) as caught:
        batches(loader(source, EVAL, batch_size=2, train=False, num_workers=num_workers))
    assert str(caught.value) == sentence


def test_data_sets_travel_to_worker_processes():
    dataset = TransformedDataset(from_datasets(pairs(0, 1), pairs(0)).train, TRAIN, seed=0)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1, 1][0], dataset[1, 1][0])
    files = PictureFiles([Picture("a.png", 0)])
    assert pickle.loads(pickle.dumps(files)) == files


def test_impossible_loaders_are_refused():
    with pytest.raises(SettingError, match="batch_size=0, num_workers=0; they can be 1 or more"):
        loader(pairs(0), EVAL, batch_size=0, train=True)
    with pytest.raises(DataError, match="there are no pictures to load"):
        loader([], EVAL, batch_size=1, train=True)
