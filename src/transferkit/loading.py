"""Batches for training and evaluation whose order and augmentation depend on (seed, epoch, index) alone."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, default_collate

from transferkit.exceptions import DataError, PictureError, SettingError, TransferkitError
from transferkit.ranges import MOST_PER_BATCH, MOST_WORKERS, check_whole_number
from transferkit.reading import LostPicture, TransformedDataset
from transferkit.sampling import EpochSampler, SampleKey
from transferkit.sources import LabelledPictures, raw_labels
from transferkit.transforms import Transform

__all__ = ["Batches", "loader", "none_left"]

logger = logging.getLogger("transferkit")


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
    lost: dict[str, str] | None = None,
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
        num_workers: Processes that read and transform; 0 does it in this process, files in its threads. The batches are
            the same.
        rank: This process, 0 to ``world_size - 1``.
        world_size: How many processes share the pictures; see :class:`EpochSampler`.
        pin_memory: Whether batches are put in page-locked memory, for faster copies to a GPU.
        lost: Where files that cannot be read are noted, with the cause, when a batch goes without them; ``None`` raises
            for the first one.

    Returns:
        A loader of batches (images (B, C, S, S) float32, labels (B,) int64). Its ``names(batch)`` says which pictures
        are in a batch of the current epoch.

    Raises:
        DataError: The source is empty, or its pictures do not have the transform's channels.
        SettingError: ``batch_size`` or ``num_workers`` is outside its range, processes outnumber pictures, or
            ``balanced`` is asked for without ``train``.
        PictureError: While iterating, also from worker processes: a picture cannot be read and ``lost`` is ``None``, or
            no picture of a batch to train on can be read.

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
    check_whole_number("batch_size", batch_size, at_least=1, at_most=MOST_PER_BATCH)
    check_whole_number("num_workers", num_workers, at_least=0, at_most=MOST_WORKERS)
    if len(source) == 0:
        raise DataError("there are no pictures to load; give a source with at least one")
    if balanced and not train:
        raise SettingError("balanced=True is for training; evaluate on every picture once, with balanced=False")
    labels = _labels_of(source) if balanced else None
    sampler = EpochSampler(len(source), seed=seed, shuffle=train, labels=labels, rank=rank, world_size=world_size)
    return _batches(
        TransformedDataset(
            source,
            transform,
            seed=seed,
            augmented=train and _is_random(source, transform),
            skip=lost is not None,
        ),
        sampler,
        lost=lost,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=train and len(sampler) > 1 and len(sampler) % batch_size == 1,
    )


def _batches(
    dataset: TransformedDataset,
    sampler: EpochSampler,
    *,
    lost: dict[str, str] | None,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    drop_last: bool = False,
) -> Batches:
    return Batches(
        dataset,
        lost=lost,
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


class _Smaller(NamedTuple):
    """A batch without the pictures that cannot be read; ``None`` where no other is left."""

    batch: Any
    lost: list[LostPicture]


def _collated(samples: list[Any]) -> Any:
    lost = [sample for sample in samples if isinstance(sample, LostPicture)]
    if not lost:
        return default_collate(samples)
    read = [sample for sample in samples if not isinstance(sample, LostPicture)]
    return _Smaller(default_collate(read) if read else None, lost)


class Batches(DataLoader[Any]):
    """What :func:`loader` builds: a ``DataLoader`` that names its pictures.

    Worker processes report a bad picture as plainly as this process would.

    Args:
        pictures: What the batches are made of.
        lost: As for :func:`loader`.
        **options: As for ``DataLoader``.

    Attributes:
        lost: The files that were left out since they cannot be read any more, with the cause, or ``None``.
        lost_rows: Their indices.
    """

    def __init__(
        self,
        pictures: TransformedDataset,
        *,
        lost: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Set the loader up; nothing is read."""
        super().__init__(pictures, collate_fn=_collated, **options)
        self.lost = lost
        self.lost_rows: set[int] = set()

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
            ours.source,
            transform or ours.transform,
            seed=ours.seed,
            augmented=epoch is not None,
            skip=ours.skip,
        )
        sampler = EpochSampler(len(ours), seed=ours.seed, shuffle=False, rank=order.rank, world_size=order.world_size)
        sampler.set_epoch(epoch or 0)
        size = cast(int, self.batch_size)
        return _batches(pictures, sampler, lost=self.lost, batch_size=size, num_workers=self.num_workers)

    def with_rows(self) -> Iterator[tuple[list[int], Any]]:
        """Go through the batches, each with the indices of its pictures; for one pass that has each picture once."""
        keys = self.batch_keys()
        for batch in self:
            rows: list[int] = []
            while not rows:  # a batch of which nothing could be read did not come
                rows = [index for _, index, _ in next(keys) if index not in self.lost_rows]
            yield rows, batch

    def names(self, batch: int) -> list[str]:
        """Say which pictures are in a batch of the current epoch, counted from 0; none is read.

        A source that has no ``name`` for them gives their indices.
        """
        source, size = self.pictures.source, cast(int, self.batch_size)
        keys = self.order.keys(batch * size, (batch + 1) * size)
        return [source.name(index) if hasattr(source, "name") else str(index) for _, index, _ in keys]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator
        """Go through the batches of the current epoch."""
        for batch in self._read():
            if not isinstance(batch, _Smaller):
                yield batch
                continue
            self._leave_out(batch.lost)
            if batch.batch is not None:
                yield batch.batch
            elif self.order.shuffle:
                raise none_left(each.name for each in batch.lost)

    def _read(self) -> Iterator[Any]:
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

    def _leave_out(self, pictures: Sequence[LostPicture]) -> None:
        assert self.lost is not None
        for each in pictures:
            self.lost_rows.add(each.row)
            if each.name not in self.lost:
                self.lost[each.name] = each.cause
                logger.warning("left out from here on: %s cannot be read (%s)", each.name, each.cause)


def none_left(names: Iterable[str]) -> PictureError:
    """Return the error for a batch to train on of which no picture can be read."""
    return PictureError(
        f"no picture of a whole batch can be read any more ({', '.join(names)}); look whether their folder is still "
        "there, put them back, and go on with resume"
    )
