"""Ctrl-C and SIGTERM as a wish that training grants at the end of the step, so that nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["EXIT_CODE", "Interrupted", "Interrupts"]

EXIT_CODE = 130
"""How a process ends that was asked to stop and has saved what it did."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did so at the end of a step; the message says where.

    Example:
        >>> issubclass(Interrupted, KeyboardInterrupt)
        True
    """


class Interrupts:
    """While this is entered, SIGINT and SIGTERM are noted in :attr:`name` instead of ending the process.

    A second SIGINT ends the run at once, as without this. Handlers that the program has set itself are left alone, and
    outside the main thread, where Python allows none to be set, nothing happens.

    Attributes:
        name: ``"SIGINT"`` or ``"SIGTERM"`` once one has come, else ``None``.

    Example:
        >>> with Interrupts() as interrupts:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     interrupts.name
        'SIGTERM'
    """

    def __init__(self, *, patient: bool = False) -> None:
        """Store the settings.

        Args:
            patient: Whether further signals are only noted as well; where several processes run, a launcher repeats
                those the terminal has already sent.
        """
        self.patient = patient
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Begin to note signals."""
        self.name = None
        ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for number, usual in ours.items():
                if signal.getsignal(number) is usual:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the handlers back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and not self.patient and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
