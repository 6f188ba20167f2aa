"""Pictures of a source as tensors, one at a time or a batch, where what is random depends on (seed, epoch, index)."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from transferkit.devices import processes_per_machine, usable_cores
from transferkit.exceptions import PictureError
from transferkit.randomness import seeded
from transferkit.sampling import SampleKey
from transferkit.sources import LabelledPictures
from transferkit.transforms import Transform, is_preset

__all__ = ["LostPicture", "TransformedDataset", "in_channels"]

# Some work is done by one thread at a time, so that more gain little.
_MOST_THREADS = 16


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


class LostPicture(NamedTuple):
    """A picture that could be read when the run began, and no longer can.

    Attributes:
        row: Which one of its source.
        name: Its file.
        cause: Why it cannot be read.
    """

    row: int
    name: str
    cause: str


class TransformedDataset(Dataset[tuple[Tensor, int] | LostPicture]):
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
        skip: Whether a file that cannot be read is given as a :class:`LostPicture` instead of raised.

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
        self,
        source: LabelledPictures,
        transform: Transform,
        *,
        seed: int = 0,
        augmented: bool = True,
        skip: bool = False,
    ) -> None:
        """Ask the source for the channels and pixels that the transform needs; nothing is read yet."""
        channels, least_side = (getattr(transform, name, None) for name in ("channels", "least_side"))
        self.source: Any = source if channels is None else in_channels(source, channels)
        if least_side is not None and hasattr(self.source, "with_least_side"):
            self.source = self.source.with_least_side(least_side)
        self.transform = transform
        self.seed = seed
        self.augmented = augmented
        self.skip = skip

    def __len__(self) -> int:
        """Count the pictures of the source."""
        return len(self.source)

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int] | LostPicture:
        """Return one picture, transformed, and its label.

        Args:
            key: (epoch, index, view), or an index alone for the first view in epoch 0.

        Raises:
            PictureError: The picture cannot be read, and may not be left out.
        """
        return self._sample(key, self.transform, self.source.__getitem__)

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[tuple[Tensor, int] | LostPicture]:
        """Return the pictures of a batch, for which torch's ``DataLoader`` asks.

        Where this process has none that read for it, files are read in threads. What is random is drawn in this one,
        picture by picture, since it comes from generators that all threads share. A named transform normalises the
        whole batch in one go.

        Args:
            keys: As for a single one.

        Raises:
            PictureError: As there.
        """
        if not is_preset(self.transform):
            return [self[key] for key in keys]
        samples = list(self._levels(keys))
        alike: dict[torch.dtype, list[int]] = defaultdict(list)
        for row, sample in enumerate(samples):
            if not isinstance(sample, LostPicture):
                alike[sample[0].dtype].append(row)
        for rows in alike.values():
            levels, labels = zip(*(samples[row] for row in rows), strict=True)
            images = cast(Any, self.transform).normalized(torch.stack(levels))
            for row, image, label in zip(rows, images, labels, strict=True):
                samples[row] = image, label
        return samples

    def _levels(self, keys: Sequence[int | SampleKey]) -> Iterable[tuple[Tensor, int] | LostPicture]:
        """Read pictures and bring them to the network's size, before normalisation."""
        levels = cast(Any, self.transform).levels
        threads = _threads() if hasattr(self.source, "decode") and len(keys) > 1 else None
        if threads is None:
            yield from (self._sample(key, levels, self.source.__getitem__) for key in keys)
            return
        # Pillow warns of much that is harmless, and the filters belong to all threads, so none of them may change them.
        with warnings.catch_warnings(action="ignore"):
            if not self.augmented:
                yield from threads.map(lambda key: self._sample(key, levels, self.source.decode), keys)
                return
            ahead = [threads.submit(self.source.decode, _place(key)[1]) for key in keys]
            for key, picture in zip(keys, ahead, strict=True):
                yield self._sample(key, levels, partial(_result, picture))

    def _sample(
        self, key: int | SampleKey, transform: Transform, read: Callable[[int], Any]
    ) -> tuple[Tensor, int] | LostPicture:
        epoch, index, view = _place(key)
        repeated = (view,) if view else ()
        try:
            with seeded(self.seed, 1, epoch, index, *repeated) if self.augmented else nullcontext():
                picture, label = read(index)
                return transform(picture), label
        except PictureError as error:
            if not (self.skip and error.path):
                raise
            return LostPicture(index, error.path, error.cause)


def _result(picture: Future[Any], index: int) -> Any:
    return picture.result()


def _place(key: int | SampleKey) -> SampleKey:
    return key if isinstance(key, tuple) else (0, key, 0)


def _threads() -> ThreadPoolExecutor | None:
    """Return this process's threads that read, or ``None`` where it is one of several that read, or has one core."""
    cores = min(usable_cores() // processes_per_machine(), _MOST_THREADS)
    return None if get_worker_info() is not None or cores < 2 else _pool(os.getpid(), cores)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=f"reading for {process}")  # threads do not outlive a fork
