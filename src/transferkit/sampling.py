"""The order of an epoch's pictures: a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
from torch.utils.data import Sampler

from transferkit.exceptions import SettingError
from transferkit.randomness import derive_seed
from transferkit.ranges import check_seed, check_whole_number

__all__ = ["EpochSampler", "SampleKey"]

SampleKey = tuple[int, int, int]
"""(epoch, index, view): what an :class:`EpochSampler` asks of a :class:`TransformedDataset`.

``view`` counts how often the epoch has had the picture before: 0 unless balanced sampling repeats it.
"""


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
        SettingError: ``seed``, ``rank`` or ``world_size`` is outside its range, there are more processes than pictures
            to shuffle, or ``labels`` are not one per picture or for an order that is not shuffled.

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
        check_seed(seed)
        check_whole_number("world_size", world_size, at_least=1)
        check_whole_number("rank", rank, at_least=0)
        if rank >= world_size:
            raise SettingError(f"rank must be below world_size={world_size}, got {rank}")
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
