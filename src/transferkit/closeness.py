"""Whether two computations of the same thing agree but for rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["same_but_for_rounding"]


def same_but_for_rounding(given: Any, expected: Any, *, within: float = 1e-4, least: float = 0.0) -> bool:
    """Whether all tensors agree but for what rounding leaves of their largest number.

    Args:
        given: A tensor, or nested tuples, lists and dicts of such.
        expected: The same; the largest finite number of each is what differences in it are measured by.
        within: The share of it that they may have on a CPU. The default allows for another order of the same
            operations. Types of few digits may have eight units of their last one, and accelerators 0.002, since they
            may multiply in ten bits (TF32).
        least: What stands for the largest number where that is smaller.

    Example:
        >>> same_but_for_rounding(torch.tensor([1.00001, 2]), torch.tensor([1.0, 2]))
        True
        >>> same_but_for_rounding(torch.tensor([1.00001, 2]), torch.tensor([1.0, 2]), within=1e-6)
        False
    """
    leaves, wanted = tree_leaves(given), tree_leaves(expected)
    return len(leaves) == len(wanted) and all(
        _tensors_close(*pair, within, least) if isinstance(pair[1], Tensor) else pair[0] == pair[1]
        for pair in zip(leaves, wanted, strict=True)
    )


def _tensors_close(given: Any, expected: Tensor, within: float, least: float) -> bool:
    if not isinstance(given, Tensor) or given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(given, expected)
    share = max(within, 8 * torch.finfo(expected.dtype).eps, 0.0 if expected.device.type == "cpu" else 2e-3)
    largest = float(expected.where(expected.isfinite(), 0).abs().max())
    close = (given - expected).abs() <= share * max(least, largest)
    return bool((close | (given == expected)).all())  # the difference of equal infinities is no number
