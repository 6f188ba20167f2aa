"""Batches for training and evaluation whose order and augmentation depend on (seed, epoch, index) alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.randomness import derive_seed, seeded
from transferkit.sources import LabelledPictures, raw_labels
from transferkit.transforms import Transform

__all__ = ["Batches", "EpochSampler", "SampleKey", "TransformedDataset", "in_channels", "loader"]

SampleKey = tuple[int, int, int]
"""(epoch, index, view): what an :class:`EpochSampler` asks of a :class:`TransformedDataset`.

``view`` counts how often the epoch has had the picture before: 0 unless balanced sampling repeats it.
"""


def in_channels(source: LabelledPictures, channels: int) -> LabelledPictures:
    """Return the same pictures for a network that takes so many channels.

    Args:
        source: Where pictures and labels come from. One without ``with_channels``, such as a plain list of (picture,
            label) pairs, gives its pictures as they are.
        channels: What the network takes, 1 or more.

    Raises:
        DataError: The pictures are files, and files do not have so many channels.

    Example:
        >>> from transferkit.sources import Picture, PictureFiles
        >>> in_channels(PictureFiles([Picture("cats/1.jpg", 0)]), 4).channels, in_channels([("a picture", 0)], 4)
        (4, [('a picture', 0)])
    """
    return source.with_channels(channels) if hasattr(source, "with_channels") else source


class TransformedDataset(Dataset[tuple[Tensor, int]]):
    """Pictures of a source as tensors, ready for a network.

    A transform of :mod:`transferkit.transforms` knows the network's ``channels``, and how many pixels it needs at least
    of a picture's shorter side, so that large JPEG files need not be decoded whole; the source is asked for both. For
    one of your own the source decides, RGB if nothing else: ``source.with_channels(4)`` gives RGBA.

    Args:
        source: Where pictures and labels come from.
        transform: From a picture to a float32 tensor (C, S, S).
        seed: The run's seed, 0 or more.
        augmented: Whether reading or transforming draws random numbers. They are then a function of (seed, epoch,
            index, view), whatever worker process draws them. ``False`` saves the 0.1 ms this costs per picture.

    Source: counter-based randomness, Salmon et al. 2011.

    Example:
        >>> from PIL import Image
        >>> from transferkit.preprocessing import Preprocessing
        >>> from transferkit.transforms import light
        >>> pictures = [(Image.effect_noise((9, 9), 50).convert("RGB"), 1)]
        >>> dataset = TransformedDataset(pictures, light(Preprocessing(size=8, resize_size=8)), seed=0)
        >>> picture = dataset[3, 0, 0][0]
        >>> torch.equal(picture, dataset[3, 0, 0][0]), torch.equal(picture, dataset[4, 0, 0][0])
        (True, False)
    """

    def __init__(
        self, source: LabelledPictures, transform: Transform, *, seed: int = 0, augmented: bool = True
    ) -> None:
        """Ask the source for the channels and pixels that the transform needs; nothing is read yet."""
        channels, least_side = (getattr(transform, name, None) for name in ("channels", "least_side"))
        self.source: Any = source if channels is None else in_channels(source, channels)
        if least_side is not None and hasattr(self.source, "with_least_side"):
            self.source = self.source.with_least_side(least_side)
        self.transform = transform
        self.seed = seed
        self.augmented = augmented

    def __len__(self) -> int:
        """Count the pictures of the source."""
        return len(self.source)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int]:
        """Return one picture, transformed, and its label.

        Args:
            key: (epoch, index, view), or an index alone for the first view in epoch 0.

        Raises:
            PictureError: The picture cannot be read.
        """
        epoch, index, view = key if isinstance(key, tuple) else (0, key, 0)
        repeated = (view,) if view else ()
        with seeded(self.seed, 1, epoch, index, *repeated) if self.augmented else nullcontext():
            picture, label = self.source[index]
            return self.transform(picture), label


class EpochSampler(Sampler[SampleKey]):
    """Order of an epoch's pictures, as (epoch, index, view) keys, for one of ``world_size`` processes.

    Process ``rank`` takes every ``world_size``-th position of the common order. Shuffled, all processes get equally
    many and up to ``world_size - 1`` pictures of the order's tail wait for another epoch. In order, every picture comes
    exactly once in one of the processes, so their counts may differ by one.

    Balanced, an epoch is as long, but every class comes equally often (give or take one): pictures of small classes are
    repeated, and those of large ones take turns over the epochs. No picture comes again before all of its class have.

    Args:
        count: How many pictures there are.
        seed: The run's seed, 0 or more.
        shuffle: Whether the order is drawn from (seed, epoch), or 0, 1, 2, ….
        labels: The class of each picture, to balance the classes; ``None`` for a permutation of the pictures.
        rank: This process, 0 to ``world_size - 1``.
        world_size: How many processes share the pictures.

    Raises:
        SettingError: ``rank`` is outside its range, there are more processes than pictures to shuffle, or ``labels``
            are not one per picture or for an order that is not shuffled.

    Source: torch ``DistributedSampler``, which repeats or drops pictures in evaluation.

    Example:
        >>> sampler = EpochSampler(5, seed=0, shuffle=False, rank=1, world_size=2)
        >>> sampler.set_epoch(7)
        >>> list(sampler)
        [(7, 1, 0), (7, 3, 0)]
        >>> sorted(EpochSampler(6, shuffle=True, labels=[0, 1, 1, 1, 1, 1]))[:3]
        [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        shuffle: bool,
        labels: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start at epoch 0."""
        if not 0 <= rank < world_size:
            raise SettingError(f"rank={rank} with world_size={world_size}; a rank is 0 to world_size - 1")
        if shuffle and count < world_size:
            raise SettingError(f"{count} pictures cannot be shared by {world_size} processes; start {count} or fewer")
        if labels is not None and not shuffle:
            raise SettingError("labels balance the classes of a shuffled order; leave them out, or give shuffle=True")
        if labels is not None and len(labels) != count:
            raise SettingError(f"{len(labels)} labels for {count} pictures; give one label per picture")
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self.labels = None if labels is None else np.asarray(labels)
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Choose the epoch that the next iteration runs through.

        Args:
            epoch: Its number, 0 or more.
            skip: How many of this process's pictures are left out at its beginning, unread; a multiple of the batch
                size, to go on within an epoch. The sampler's length stays that of the whole epoch.
        """
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        """Count this process's pictures in a whole epoch."""
        return self.count // self.world_size if self.shuffle else len(range(self.rank, self.count, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        """Go through this process's keys, but for those that are skipped."""
        return self.keys(self.skip)

    def keys(self, start: int = 0, stop: int | None = None) -> Iterator[SampleKey]:
        """Go through a part of this process's keys of the epoch, whatever is skipped.

        Args:
            start: The first position, counted from 0.
            stop: The position after the last one; ``None`` for the end.

        Example:
            >>> list(EpochSampler(5, shuffle=False).keys(1, 3))
            [(0, 1, 0), (0, 2, 0)]
        """
        indices = np.arange(self.count)
        views = np.zeros_like(indices)
        if self.shuffle:
            generator = np.random.default_rng(derive_seed(self.seed, 0, self.epoch))
            if self.labels is None:
                indices = generator.permutation(indices)
            else:
                indices, views = _balanced_order(self.labels, generator)
        end = self.count - self.count % self.world_size if self.shuffle else self.count
        mine = slice(self.rank, end, self.world_size)
        return zip(repeat(self.epoch), indices[mine][start:stop].tolist(), views[mine][start:stop].tolist())


def _balanced_order(labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many indices as there are labels, every class equally often; returns them and each one's view."""
    by_class = np.argsort(labels, kind="stable")
    classes = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
    draws = np.full(len(classes), len(labels) // len(classes))
    draws[generator.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = [
        np.concatenate([generator.permutation(own) for _ in range(-(-count // len(own)))])[:count]
        for own, count in zip(classes, draws, strict=True)
    ]
    views = [np.arange(count) // len(own) for own, count in zip(classes, draws, strict=True)]
    # Shuffled are the classes of the positions; each class fills its own in turn, so repeats keep their distance.
    turns = generator.permutation(np.repeat(np.arange(len(classes)), draws))
    place = np.argsort(np.argsort(turns, kind="stable"), kind="stable")
    return np.concatenate(drawn)[place], np.concatenate(views)[place]


def loader(
    source: LabelledPictures,
    transform: Transform,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool,
    balanced: bool = False,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Batches:
    """Build a torch ``DataLoader`` over a source; ``loader.sampler.set_epoch(epoch)`` chooses the epoch.

    Args:
        source: Where pictures and labels come from; a transform with ``channels`` gets its pictures in these, as
            :class:`TransformedDataset` says.
        transform: From a picture to a float32 tensor (C, S, S).
        batch_size: Pictures per batch and process, 1 or more.
        seed: The run's seed, 0 or more.
        train: Shuffled and augmented, or in order with a deterministic transform. In training a last batch of one
            picture is left out where it is not the only one, since batch norm cannot train on it.
        balanced: Whether every class comes equally often in training, as :class:`EpochSampler` says. Where the source
            lists its labels, no picture is decoded for it.
        num_workers: Processes that read and transform; 0 does it in this process. The batches are the same.
        rank: This process, 0 to ``world_size - 1``.
        world_size: How many processes share the pictures; see :class:`EpochSampler`.
        pin_memory: Whether batches are put in page-locked memory, for faster copies to a GPU.

    Returns:
        A loader of batches (images (B, C, S, S) float32, labels (B,) int64). Its ``names(batch)`` says which pictures
        are in a batch of the current epoch.

    Raises:
        DataError: The source is empty, or its pictures do not have the transform's channels.
        SettingError: ``batch_size`` or ``num_workers`` is outside its range, processes outnumber pictures, or
            ``balanced`` is asked for without ``train``.
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
        >>> batches.names(1)
        ['2']
    """
    if batch_size < 1 or num_workers < 0:
        raise SettingError(
            f"batch_size={batch_size}, num_workers={num_workers}; they can be 1 or more and 0 or more respectively"
        )
    if len(source) == 0:
        raise DataError("there are no pictures to load; give a source with at least one")
    if balanced and not train:
        raise SettingError("balanced=True is for training; evaluate on every picture once, with balanced=False")
    labels = _labels_of(source) if balanced else None
    sampler = EpochSampler(len(source), seed=seed, shuffle=train, labels=labels, rank=rank, world_size=world_size)
    return _batches(
        TransformedDataset(source, transform, seed=seed, augmented=train and _is_random(source, transform)),
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=train and len(sampler) > 1 and len(sampler) % batch_size == 1,
    )


def _batches(
    dataset: TransformedDataset,
    sampler: EpochSampler,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> Batches:
    return Batches(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_interrupts,
        # Without its own generator every epoch would move the global one.
        generator=torch.Generator().manual_seed(dataset.seed),
    )


def _is_random(source: LabelledPictures, transform: Transform) -> bool:
    return bool(getattr(source, "random", True) or getattr(transform, "random", True))


def _labels_of(source: LabelledPictures) -> list[int]:
    return source.labels() if hasattr(source, "labels") else raw_labels(source)


def _leave_interrupts(worker: int) -> None:
    # Ctrl-C, and often SIGTERM, go to a whole group of processes; the one that trains wants the pictures of its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class Batches(DataLoader[tuple[Tensor, int]]):
    """What :func:`loader` builds: a ``DataLoader`` that names its pictures.

    Worker processes report a bad picture as plainly as this process would.
    """

    @property
    def pictures(self) -> TransformedDataset:
        """What the batches are made of."""
        return cast(TransformedDataset, self.dataset)

    @property
    def order(self) -> EpochSampler:
        """The sampler."""
        return cast(EpochSampler, self.sampler)

    @property
    def augmented(self) -> bool:
        """Whether a picture is another one in every epoch."""
        return self.pictures.augmented

    def batch_keys(self) -> Iterator[list[SampleKey]]:
        """Go through the batches of the current epoch, without those that are skipped, as their pictures' keys."""
        return iter(cast(Any, self.batch_sampler))

    def ordered(self, *, epoch: int | None = None, transform: Transform | None = None) -> Batches:
        """Return all pictures of this process in their source's order, none left out, in batches of the same size.

        Args:
            epoch: The one whose augmentation is meant; ``None`` for none, where ``transform`` draws no random numbers.
            transform: ``None`` for the same.
        """
        ours, order = self.pictures, self.order
        pictures = TransformedDataset(
            ours.source, transform or ours.transform, seed=ours.seed, augmented=epoch is not None
        )
        sampler = EpochSampler(len(ours), seed=ours.seed, shuffle=False, rank=order.rank, world_size=order.world_size)
        sampler.set_epoch(epoch or 0)
        return _batches(pictures, sampler, batch_size=cast(int, self.batch_size), num_workers=self.num_workers)

    def names(self, batch: int) -> list[str]:
        """Say which pictures are in a batch of the current epoch, counted from 0; none is read.

        A source that has no ``name`` for them gives their indices.
        """
        source, size = self.pictures.source, cast(int, self.batch_size)
        keys = self.order.keys(batch * size, (batch + 1) * size)
        return [source.name(index) if hasattr(source, "name") else str(index) for _, index, _ in keys]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        """Go through the batches of the current epoch."""
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
