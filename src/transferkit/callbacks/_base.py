"""The contract of callbacks: what the trainer calls, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transferkit.exceptions import CallbackError, TransferkitError, closest, one_line

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["HOOKS", "Callback", "call", "callback_states", "named", "restore_callbacks"]

HOOKS = (
    "on_fit_start",
    "on_train_epoch_start",
    "on_frozen_pass_batch_end",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_fit_end",
    "on_exception",
)
"""The hooks in the order in which they are called; the names are Lightning's, which has no frozen pass."""

_ENDINGS = ("on_validation_end", "on_train_epoch_end", "on_fit_end", "on_exception")


class Callback:
    """Something that happens at certain points of training. Every hook gets the trainer and may read all of it.

    ``on_validation_end`` and later see the epoch's record as ``trainer.history.records[-1]``; setting
    ``trainer.should_stop = True`` ends training after the epoch. A method whose name begins with ``on_`` but is no
    hook fails when the class is defined, since it would never be called.

    A hook that raises an error ends the run with :class:`~transferkit.CallbackError`; what was learnt by then is kept.
    Where an epoch or the run ends, the callbacks behind it are called first.

    Raises:
        TypeError: A subclass defines an unknown ``on_*`` method.

    Example:
        >>> class Shout(Callback):
        ...     def on_epoch_end(self, trainer): print("done")
        Traceback (most recent call last):
        TypeError: Shout.on_epoch_end is no hook — did you mean 'on_train_epoch_end' or ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse hooks that do not exist."""
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("on_") and name not in HOOKS:
                raise TypeError(
                    f"{cls.__name__}.{name} is no hook{closest(name, HOOKS, count=2)}; the hooks are {', '.join(HOOKS)}"
                )

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first epoch; the model is on its device."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Before an epoch's first batch; the freeze policy has been applied."""

    def on_frozen_pass_batch_end(self, trainer: Trainer) -> None:
        """After activations of a batch were computed to be kept, in training or validation; see ``frozen_pass``."""

    def on_train_batch_start(self, trainer: Trainer) -> None:
        """Before a batch goes through the network."""

    def on_before_optimizer_step(self, trainer: Trainer) -> None:
        """After the gradients of a step are complete, before the optimizer uses them."""

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """After a batch, and after the optimizer's step where one was due."""

    def on_validation_start(self, trainer: Trainer) -> None:
        """Before the validation of an epoch."""

    def on_validation_end(self, trainer: Trainer) -> None:
        """After the validation of an epoch; its record is complete."""

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """At the end of an epoch, after all callbacks have seen its validation."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch."""

    def on_exception(self, trainer: Trainer) -> None:
        """When training is broken off by an error or an interrupt, which is then raised again."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback must remember across an interruption; nothing by default.

        JSON values and tensors, in dictionaries with text keys, lists and tuples.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Args:
            state: That dictionary.
        """


def call(callbacks: Iterable[Callback], hook: str, trainer: Trainer) -> None:
    """Call one hook of every callback, in their order.

    Where an epoch or the run ends, the callbacks behind one that fails are called too, so that what they save is saved.
    Errors of this package are raised as they are, at once but in ``on_exception``.

    Args:
        callbacks: Those of the trainer.
        hook: One of :data:`HOOKS`.
        trainer: What each gets.

    Raises:
        CallbackError: A hook has raised something else, which is the error's cause; the first one where several have.
    """
    failure: TransferkitError | None = None
    for callback in callbacks:
        try:
            getattr(callback, hook)(trainer)
        except TransferkitError as error:
            if hook != "on_exception":
                raise
            failure = failure or error
        except Exception as error:
            failure = failure or _failure(callback, hook, error)
            if hook not in _ENDINGS:
                break
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # an error and a frame that know each other wait for the garbage collector


def _failure(callback: Callback, method: str, error: Exception) -> CallbackError:
    said = one_line(error)
    failure = CallbackError(
        f"{type(callback).__name__}.{method} has failed ({type(error).__name__}{': ' if said else ''}{said})"
    )
    failure.__cause__ = error
    return failure


def named(callbacks: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Name callbacks by their class, and by their place among those of one class.

    Example:
        >>> [name for name, _ in named([Callback(), Callback()])]
        ['Callback 1', 'Callback 2']
    """
    seen: Counter[str] = Counter()
    for callback in callbacks:
        name = type(callback).__name__
        seen[name] += 1
        yield f"{name} {seen[name]}", callback


def callback_states(callbacks: Iterable[Callback]) -> dict[str, dict[str, Any]]:
    """Return what callbacks must remember, by the names :func:`named` gives; those that never have any are left out.

    Raises:
        CallbackError: The ``state_dict`` of a callback has failed.
    """
    return {
        name: _state_of(callback)
        for name, callback in named(callbacks)
        if type(callback).state_dict is not Callback.state_dict
    }


def _state_of(callback: Callback) -> dict[str, Any]:
    try:
        return callback.state_dict()
    except TransferkitError:
        raise
    except Exception as error:
        raise _failure(callback, "state_dict", error) from error


def restore_callbacks(callbacks: Iterable[Callback], states: Mapping[str, dict[str, Any]]) -> None:
    """Give callbacks back what :func:`callback_states` returned.

    Args:
        callbacks: As many of each class as there were.
        states: Those of the callbacks that have any, by the names :func:`named` gives.

    Raises:
        CallbackError: The ``load_state_dict`` of a callback has failed.
    """
    for name, callback in named(callbacks):
        if name in states:
            try:
                callback.load_state_dict(states[name])
            except TransferkitError:
                raise
            except Exception as error:
                raise _failure(callback, "load_state_dict", error) from error
