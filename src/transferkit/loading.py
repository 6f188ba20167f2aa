"""Batches for training and evaluation whose order and augmentation depend on (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.randomness import derive_seed, seeded
from transferkit.sources import LabelledPictures
from transferkit.transforms import Transform

__all__ = ["EpochSampler", "SampleKey", "TransformedDataset", "loader"]

SampleKey = tuple[int, int]
"""(epoch, index): what an :class:`EpochSampler` asks of a :class:`TransformedDataset`."""


class TransformedDataset(Dataset[tuple[Tensor, int]]):
    """Pictures of a source as tensors, ready for a network.

    A transform of :mod:`transferkit.transforms` knows the network's ``channels``, and the source is asked for them. For
    one of your own the source decides, RGB if nothing else: ``source.with_channels(4)`` gives RGBA.

    Args:
        source: Where pictures and labels come from.
        transform: From a picture to a float32 tensor (C, S, S).
        seed: The run's seed, 0 or more.
        augmented: Whether reading or transforming draws random numbers. They are then a function of (seed, epoch,
            index), whatever worker process draws them. ``False`` saves the 0.1 ms this costs per picture.

    Source: counter-based randomness, Salmon et al. 2011.

    Example:
        >>> from PIL import Image
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.transforms import light
        >>> pictures = [(Image.effect_noise((9, 9), 50).convert("RGB"), 1)]
        >>> dataset = TransformedDataset(pictures, light(Preprocessing(size=8, resize_size=8)), seed=0)
        >>> torch.equal(dataset[3, 0][0], dataset[3, 0][0]), torch.equal(dataset[3, 0][0], dataset[4, 0][0])
        (True, False)
    """

    def __init__(
        self, source: LabelledPictures, transform: Transform, *, seed: int = 0, augmented: bool = True
    ) -> None:
        """Ask the source for the transform's channels; nothing is read yet."""
        channels = getattr(transform, "channels", None)
        # A plain list of (picture, label) pairs is a source too; it gives its pictures as they are.
        if channels is not None and hasattr(source, "with_channels"):
            source = source.with_channels(channels)
        self.source = source
        self.transform = transform
        self.seed = seed
        self.augmented = augmented

    def __len__(self) -> int:
        """Count the pictures of the source."""
        return len(self.source)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int]:
        """Return one picture, transformed, and its label.

        Args:
            key: (epoch, index), or an index alone for epoch 0.

        Raises:
            PictureError: The picture cannot be read.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, 1, epoch, index) if self.augmented else nullcontext():
            picture, label = self.source[index]
            return self.transform(picture), label


class EpochSampler(Sampler[SampleKey]):
    """Order of an epoch's pictures, as (epoch, index) keys, for one of ``world_size`` processes.

    Process ``rank`` takes every ``world_size``-th position of the common order. Shuffled, all processes get equally
    many and up to ``world_size - 1`` pictures of the order's tail wait for another epoch. In order, every picture comes
    exactly once in one of the processes, so their counts may differ by one.

    Args:
        count: How many pictures there are.
        seed: The run's seed, 0 or more.
        shuffle: Whether the order is a permutation drawn from (seed, epoch), or 0, 1, 2, ….
        rank: This process, 0 to ``world_size - 1``.
        world_size: How many processes share the pictures.

    Raises:
        SettingError: ``rank`` is outside its range, or there are more processes than pictures to shuffle.

    Source: torch ``DistributedSampler``, which repeats or drops pictures in evaluation.

    Example:
        >>> sampler = EpochSampler(5, seed=0, shuffle=False, rank=1, world_size=2)
        >>> sampler.set_epoch(7)
        >>> list(sampler)
        [(7, 1), (7, 3)]
    """

    def __init__(self, count: int, *, seed: int = 0, shuffle: bool, rank: int = 0, world_size: int = 1) -> None:
        """Start at epoch 0."""
        if not 0 <= rank < world_size:
            raise SettingError(f"rank={rank} with world_size={world_size}; a rank is 0 to world_size - 1")
        if shuffle and count < world_size:
            raise SettingError(f"{count} pictures cannot be shared by {world_size} processes; start {count} or fewer")
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs through.

        Args:
            epoch: Its number, 0 or more.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Count this process's pictures in an epoch."""
        return self.count // self.world_size if self.shuffle else len(range(self.rank, self.count, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        """Go through this process's (epoch, index) keys."""
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng(derive_seed(self.seed, 0, self.epoch)).permutation(order)
            order = order[: self.count - self.count % self.world_size]
        epoch = self.epoch
        return ((epoch, index) for index in order[self.rank :: self.world_size].tolist())


def loader(
    source: LabelledPictures,
    transform: Transform,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, int]]:
    """Build a torch ``DataLoader`` over a source; ``loader.sampler.set_epoch(epoch)`` chooses the epoch.

    Args:
        source: Where pictures and labels come from; a transform with ``channels`` gets its pictures in these, as
            :class:`TransformedDataset` says.
        transform: From a picture to a float32 tensor (C, S, S).
        batch_size: Pictures per batch and process, 1 or more.
        seed: The run's seed, 0 or more.
        train: Shuffled and augmented, or in order with a deterministic transform. In training a last batch of one
            picture is left out where it is not the only one, since batch norm cannot train on it.
        num_workers: Processes that read and transform; 0 does it in this process. The batches are the same.
        rank: This process, 0 to ``world_size - 1``.
        world_size: How many processes share the pictures; see :class:`EpochSampler`.
        pin_memory: Whether batches are put in page-locked memory, for faster copies to a GPU.

    Returns:
        A loader of batches (images (B, C, S, S) float32, labels (B,) int64).

    Raises:
        DataError: The source is empty, or its pictures do not have the transform's channels.
        SettingError: ``batch_size`` or ``num_workers`` is outside its range, or processes outnumber pictures.
        PictureError: While iterating, also from worker processes: a picture cannot be read.

    Source: ``torch.utils.data.DataLoader``.

    Example:
        >>> from PIL import Image
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.transforms import imagenet_eval
        >>> pictures = [(Image.new("RGB", (9, 9)), label) for label in (0, 1, 1)]
        >>> batches = loader(pictures, imagenet_eval(Preprocessing(8, 8)), batch_size=2, train=False)
        >>> [labels.tolist() for _, labels in batches]
        [[0, 1], [1]]
    """
    if batch_size < 1 or num_workers < 0:
        raise SettingError(
            f"batch_size={batch_size}, num_workers={num_workers}; they can be 1 or more and 0 or more respectively"
        )
    if len(source) == 0:
        raise DataError("there are no pictures to load; give a source with at least one")
    sampler = EpochSampler(len(source), seed=seed, shuffle=train, rank=rank, world_size=world_size)
    return _Batches(
        TransformedDataset(source, transform, seed=seed, augmented=train),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=train and len(sampler) > 1 and len(sampler) % batch_size == 1,
        persistent_workers=num_workers > 0,
        # Without its own generator every epoch would move the global one.
        generator=torch.Generator().manual_seed(seed),
    )


class _Batches(DataLoader[tuple[Tensor, int]]):
    """A ``DataLoader`` whose worker processes report a bad picture as plainly as this process would."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        try:
            yield from super().__iter__()
        except TransferkitError as error:
            if self.num_workers == 0:
                raise
            # torch wraps the worker's whole traceback into the message; its last line is "Class: our sentence".
            sentence = str(error).strip().splitlines()[-1].partition(": ")[2]
            mended = type(error)(sentence)
            # An error and a frame that know each other wait for the garbage collector, and it 10 s for their workers.
            error.__traceback__ = None
        else:
            return
        try:
            raise mended
        finally:
            del mended
