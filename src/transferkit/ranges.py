"""Numbers within their ranges: every numeric setting is checked here, so that all are refused in the same words.

The largest values are no limits of what works. Beyond them a number is a slip of the keyboard, which would otherwise be
noticed when memory or patience ends.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any

from transferkit.exceptions import SettingError

__all__ = [
    "LARGEST_SEED",
    "LARGEST_SIDE",
    "MOST_CHANNELS",
    "MOST_EPOCHS",
    "MOST_PER_BATCH",
    "MOST_UNITS",
    "MOST_WORKERS",
    "check_number",
    "check_seed",
    "check_whole_number",
]

LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 16_384
MOST_CHANNELS = 1_000
MOST_EPOCHS = 1_000_000
MOST_PER_BATCH = 1_000_000
MOST_UNITS = 1_000_000
MOST_WORKERS = 1_024


def check_whole_number(
    name: str, value: Any, *, at_least: int, at_most: int | None = None, or_none: bool = False, hint: str = ""
) -> None:
    """Raise ``SettingError`` unless a setting is a whole number within its range.

    Args:
        name: What the user calls it.
        value: What was given. numpy's whole numbers are as good as Python's; ``True``, ``5.0`` and ``"5"`` are none.
        at_least: The smallest value.
        at_most: The largest value, or ``None``.
        or_none: Whether ``None`` may be given instead.
        hint: What to know or to do instead, said at the end.

    Raises:
        SettingError: It is not.

    Example:
        >>> check_whole_number("epochs", 2.5, at_least=1)
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: epochs must be a whole number, 1 or more, got 2.5
    """
    if value is None and or_none:
        return
    kind = "" if isinstance(value, Integral) and not isinstance(value, bool) else "a whole number"
    if kind or value < at_least or (at_most is not None and value > at_most):
        allowed = f"{at_least:,} or more" if at_most is None else f"from {at_least:,} to {at_most:,}"
        raise _refusal(name, value, kind, allowed, or_none=or_none, hint=hint)


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    or_none: bool = False,
    hint: str = "",
) -> None:
    """Raise ``SettingError`` unless a setting is a finite number within its range.

    Args:
        name: What the user calls it.
        value: What was given; ``True`` and ``"0.1"`` are no numbers.
        at_least: The smallest value, or ``None``.
        above: What it must be larger than, or ``None``.
        at_most: The largest value, or ``None``.
        below: What it must be smaller than, or ``None``.
        or_none: Whether ``None`` may be given instead.
        hint: What to know or to do instead, said at the end.

    Raises:
        SettingError: It is not.

    Example:
        >>> check_number("lr", float("nan"), above=0)
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: lr must be a finite number, above 0, got nan
    """
    if value is None and or_none:
        return
    kind = "" if isinstance(value, Real) and not isinstance(value, bool) else "a number"
    if not kind and not _is_finite(value):
        kind = "a finite number"
    within = not kind and all(
        (
            at_least is None or value >= at_least,
            above is None or value > above,
            at_most is None or value <= at_most,
            below is None or value < below,
        )
    )
    if not within:
        raise _refusal(name, value, kind, _allowed(at_least, above, at_most, below), or_none=or_none, hint=hint)


def check_seed(seed: Any) -> None:
    """Raise ``SettingError`` unless a seed is a whole number from 0 to :data:`LARGEST_SEED`.

    Args:
        seed: What was given.

    Raises:
        SettingError: It is not.

    Example:
        >>> check_seed(0)
    """
    check_whole_number("seed", seed, at_least=0, at_most=LARGEST_SEED)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _allowed(at_least: float | None, above: float | None, at_most: float | None, below: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f"from {at_least:,} to {at_most:,}"
    if at_least is not None and below is None:
        return f"{at_least:,} or more"
    bounds = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
    return " and ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)


def _refusal(name: str, value: Any, kind: str, allowed: str, *, or_none: bool, hint: str) -> SettingError:
    words = [each for each in (kind, allowed, "or None" if or_none else "") if each]
    return SettingError(f"{name} must be {', '.join(words)}, got {shortened(value)}" + (f"; {hint}" if hint else ""))
