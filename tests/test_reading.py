"""Batches whose files are read in threads: the same pictures as one after the other, and the same errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from transferkit import reading
from transferkit.data import Picture, PictureFiles, TransformedDataset, from_datasets, loader
from transferkit.exceptions import PictureError
from transferkit.pictures import read_picture
from transferkit.prediction import stream_predictions
from transferkit.preprocessing import Preprocessing
from transferkit.reading import LostPicture
from transferkit.transforms import EVAL_PRESETS, TRAIN_PRESETS, Transform, is_preset

SIZE = Preprocessing(size=24, resize_size=28)
PRESETS: dict[str, Transform] = {
    name: make(SIZE) for name, make in {**TRAIN_PRESETS, **EVAL_PRESETS, "cifar_eval": EVAL_PRESETS["cifar"]}.items()
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PictureFiles:
    folder = tmp_path_factory.mktemp("pictures")
    pictures = []
    for index in range(7):
        noise = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        file = folder / f"{index}.{'png' if index % 2 else 'jpg'}"
        Image.fromarray(noise).save(file)
        pictures.append(Picture(str(file), index % 3))
    return PictureFiles(pictures)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, whatever this one has."""
    monkeypatch.setattr(reading, "usable_cores", lambda: 4)


def one_by_one(batches: Any) -> list[tuple[Tensor, list[int]]]:
    """Return what a loader should give: each picture transformed by itself, in the order of its keys."""
    dataset = batches.pictures
    samples = [[dataset[key] for key in keys] for keys in batches.batch_keys()]
    return [(torch.stack([image for image, _ in batch]), [label for _, label in batch]) for batch in samples]


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_is_its_pictures_one_by_one_bit_for_bit(files: PictureFiles, name: str, workers: int) -> None:
    train = name in TRAIN_PRESETS
    batches = loader(files, PRESETS[name], batch_size=3, train=train, num_workers=workers, seed=4)
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        found, expected = list(batches), one_by_one(batches)
        assert len(found) == len(expected)
        for (images, labels), (wanted, their_labels) in zip(found, expected, strict=True):
            assert images.dtype == torch.float32
            assert images.is_contiguous()
            assert torch.equal(images, wanted)
            assert labels.tolist() == their_labels


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(0, 3), st.integers(0, 2), st.integers(1, 8))
def test_any_keys_give_the_same_in_any_number_of_threads(
    files: PictureFiles, indices: list[int], epoch: int, view: int, cores: int
) -> None:
    dataset = TransformedDataset(files, PRESETS["light"], seed=9)
    keys = [(epoch, index, view) for index in indices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "usable_cores", lambda: cores)
        together = dataset.__getitems__(keys)
    for (image, label), key in zip(together, keys, strict=True):
        assert torch.equal(image, dataset[key][0])
        assert label == dataset[key][1]


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("name", ["light", "imagenet"])
def test_generators_stay_where_they_are(files: PictureFiles, name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(loader(files, PRESETS[name], batch_size=4, train=name == "light"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("name", ["light", "imagenet"])
def test_a_file_that_cannot_be_read_is_named_or_left_out(tmp_path: Path, files: PictureFiles, name: str) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(files.pictures[1].path).read_bytes()[:200])
    source = PictureFiles([*files.pictures[:2], Picture(str(damaged), 0), *files.pictures[2:]])
    with pytest.raises(PictureError, match=r"cannot read picture .*damaged.png"):
        list(loader(source, PRESETS[name], batch_size=4, train=False))
    lost: dict[str, str] = {}
    batches = loader(source, PRESETS[name], batch_size=4, train=False, lost=lost)
    assert [len(labels) for _, labels in batches] == [3, 4]
    assert list(lost) == [str(damaged)]
    assert isinstance(TransformedDataset(source, PRESETS[name], skip=True)[2], LostPicture)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("name", ["light", "imagenet"])
def test_what_pillow_warns_of_stays_silent_in_threads(tmp_path: Path, name: str) -> None:
    file = tmp_path / "palette.png"
    picture = Image.new("P", (30, 30))
    picture.putpalette([index % 256 for index in range(768)])
    picture.info["transparency"] = b"\x00\x80"
    picture.save(file, transparency=b"\x00\x80")
    source = PictureFiles([Picture(str(file), 0)] * 8)
    before = list(warnings.filters)
    with warnings.catch_warnings(action="error"):
        assert len(list(loader(source, PRESETS[name], batch_size=8, train=False))) == 1
    assert warnings.filters == before


@pytest.mark.usefixtures("in_threads")
def test_data_sets_and_transforms_that_may_not_be_used_in_threads_are_not(
    files: PictureFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(nn.Module):
        def forward(self, picture: Image.Image) -> Tensor:
            return torch.zeros(3, 4, 4)

    def no_threads(process: int, threads: int) -> None:
        raise AssertionError

    monkeypatch.setattr(reading, "_pool", no_threads)
    pairs = [(read_picture(picture.path), picture.label) for picture in files.pictures]
    assert not is_preset(Own())
    list(loader(files, Own(), batch_size=3, train=True))
    list(loader(from_datasets(pairs, pairs).train, PRESETS["light"], batch_size=3, train=True))
    with pytest.raises(AssertionError):
        list(loader(files, PRESETS["light"], batch_size=3, train=True))


def test_bytes_and_floats_in_one_batch_become_what_each_becomes_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8, generator=generator)
    pairs = [(levels, 0), (levels / 255, 1), (levels.double() / 255, 1)]
    batches = loader(from_datasets(pairs, pairs).val, PRESETS["cifar_eval"], batch_size=3, train=False)
    [(images, _)] = batches
    [(expected, _)] = one_by_one(batches)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert images.dtype == torch.float32


def test_another_loader_over_the_same_data_set_gives_the_same(files: PictureFiles) -> None:
    ours = loader(files, PRESETS["imagenet"], batch_size=4, train=False)
    for (images, labels), (theirs, their_labels) in zip(ours, DataLoader(ours.dataset, batch_size=4), strict=True):
        assert torch.equal(images, theirs)
        assert torch.equal(labels, their_labels)


@pytest.mark.usefixtures("in_threads")
def test_predictions_of_files_are_read_in_threads(files: PictureFiles, tiny_model: Any, monkeypatch: Any) -> None:
    model, paths = tiny_model(), [picture.path for picture in files.pictures]
    together = [said.probabilities for said in stream_predictions(model, paths)]
    monkeypatch.setattr(reading, "usable_cores", lambda: 1)
    alone = [said.probabilities for said in stream_predictions(model, paths)]
    assert together == alone
