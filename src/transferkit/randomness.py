"""Randomness as a function of (seed, epoch, index, ...), never of a generator's position.

Runs that are interrupted, use another number of workers, or share a process with other code therefore see the same
pictures, the same augmentation and the same dropout.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "keeps_generators", "seed_generators", "seeded"]


def derive_seed(*parts: int) -> int:
    """Mix whole numbers into one 63-bit seed; equal parts give equal seeds on every machine.

    Args:
        *parts: Non-negative whole numbers such as seed, epoch and sample index; their order matters.

    Returns:
        A number from 0 to 2**63 - 1. Source: ``numpy.random.SeedSequence``.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_generators(*parts: int) -> None:
    """Seed torch's global generators (of all devices), numpy's and Python's.

    Args:
        *parts: As for :func:`derive_seed`.

    Example:
        >>> with keeps_generators():
        ...     seed_generators(0, 3)
        ...     first = torch.rand(2)
        >>> with seeded(0, 3):
        ...     assert torch.equal(first, torch.rand(2))
    """
    seed = derive_seed(*parts)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # it would note for each kind of device that may come yet who has called, which takes a millisecond
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def keeps_generators() -> Iterator[None]:
    """Put torch's global generators (of the CPU and all CUDA devices), numpy's and Python's back after a block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Run a block with torch's (CPU), numpy's and Python's global generators seeded, then put them back.

    Args:
        *parts: As for :func:`derive_seed`.

    Example:
        >>> with seeded(0, 3):
        ...     first = torch.rand(2)
        >>> with seeded(0, 3):
        ...     assert torch.equal(first, torch.rand(2))
    """
    seed = derive_seed(*parts)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
