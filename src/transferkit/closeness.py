"""Whether two computations of the same thing agree but for rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["same_but_for_rounding"]


def same_but_for_rounding(given: Any, expected: Any, *, reordered: bool = True, least: float = 0.0) -> bool:
    """Whether all tensors agree but for what rounding leaves of their largest number.

    Args:
        given: A tensor, or nested tuples, lists and dicts of such.
        expected: The same; the largest finite number of each is what differences in it are measured by.
        reordered: Whether the same operations may have run in another order: differences may then be a ten-thousandth
            of it, else a hundred units of the last digit, 1.2e-5 in single precision. More is allowed on accelerators,
            which may multiply in ten bits (TF32) and choose another kernel the second time.
        least: What stands for the largest number where that is smaller.

    Example:
        >>> same_but_for_rounding(torch.tensor([1.00001, 2]), torch.tensor([1.0, 2]))
        True
        >>> same_but_for_rounding(torch.tensor([1.00001, 2]), torch.tensor([1.0, 2]), reordered=False)
        True
        >>> same_but_for_rounding(torch.tensor([1.0001, 2]), torch.tensor([1.0, 2]), reordered=False)
        False
    """
    leaves, wanted = tree_leaves(given), tree_leaves(expected)
    return len(leaves) == len(wanted) and all(
        _tensors_close(*pair, reordered, least) if isinstance(pair[1], Tensor) else pair[0] == pair[1]
        for pair in zip(leaves, wanted, strict=True)
    )


def _tensors_close(given: Any, expected: Tensor, reordered: bool, least: float) -> bool:
    if not isinstance(given, Tensor) or given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(given, expected)
    on_cpu, unit = expected.device.type == "cpu", torch.finfo(expected.dtype).eps
    share = max(8 * unit, 1e-4 if on_cpu else 2e-3) if reordered else max(100 * unit, 0.0 if on_cpu else 1e-3)
    largest = float(expected.where(expected.isfinite(), 0).abs().max())
    close = (given - expected).abs() <= share * max(least, largest)
    return bool((close | (given == expected)).all())  # the difference of equal infinities is no number
