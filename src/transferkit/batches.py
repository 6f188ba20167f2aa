"""What a trainer asks of its batches: whole optimizer steps, a place in an epoch, the pictures' names.

Any sized iterable of (images, labels) will do; an epoch and a place in it are told to those that understand them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from transferkit.sampling import EpochSampler

__all__ = ["Inputs", "cut_up", "moved", "names_of", "start_epoch", "windows"]

Inputs = Tensor | tuple[Tensor, ...]
"""What a module is given for some pictures: (B, C, H, W) images, or kept activations, each (B, …)."""

_NAMED = 32


def start_epoch(batches: Any, epoch: int, *, skip: int = 0) -> None:
    """Choose the epoch that the next iteration runs through, and how many of its batches :func:`windows` leaves out."""
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, EpochSampler):
        sampler.set_epoch(epoch, skip=skip * batches.batch_size)
    elif sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Return inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return tuple(each.to(device, non_blocking=True) for each in inputs)


def cut_up(inputs: Inputs, size: int) -> list[Inputs]:
    """Cut inputs into pieces of so many pictures; the last may have fewer.

    Example:
        >>> [len(piece) for piece in cut_up(torch.zeros(5, 3, 8, 8), 2)]
        [2, 2, 1]
    """
    if isinstance(inputs, Tensor):
        return list(torch.split(inputs, size))
    return list(zip(*(torch.split(each, size) for each in inputs), strict=True))


def windows(
    batches: Any, size: int, *, skip: int = 0, before: Callable[[int], object] = int
) -> Iterator[list[tuple[Inputs, Tensor]]]:
    """Yield the batches of one optimizer step after the other.

    Args:
        batches: Of (images, labels), once :func:`start_epoch` was called.
        size: Batches per step; the last step may have fewer.
        skip: Batches to leave out at the epoch's beginning.
        before: Called with the number of each batch before that is read, also before one that is read to be left out.

    Example:
        >>> [len(window) for window in windows(["a batch"] * 5, 2, skip=2)]
        [2, 1]
    """
    first = skip if isinstance(getattr(batches, "sampler", None), EpochSampler) else 0  # it does not read what it skips
    read = islice(_read(batches, first, before), skip - first, None)
    while window := list(islice(read, size)):
        yield window


def _read(batches: Any, first: int, before: Callable[[int], object]) -> Iterator[tuple[Inputs, Tensor]]:
    iterator = iter(batches)
    for number in count(first):
        before(number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch


def names_of(batches: Any, first: int, number: int) -> str:
    """Name the pictures of ``number`` batches of the current epoch in one line.

    Example:
        >>> names_of([], 4, 2)
        'those of batches 4 to 5'
    """
    if not hasattr(batches, "names"):
        return f"those of batches {first} to {first + number - 1}"
    names = [name for batch in range(first, first + number) for name in batches.names(batch)]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
