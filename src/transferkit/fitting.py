"""One run of a :class:`~transferkit.Finetuner`: data, network, plan, training, and what is kept of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferkit.checkpoint import save_artifact
from transferkit.devices import choose_device
from transferkit.distribution import check_same_everywhere, load_network_state, share_object
from transferkit.exceptions import CallbackError
from transferkit.history import History
from transferkit.identity import check_same_run
from transferkit.model import TransferModel
from transferkit.pieces import (
    Data,
    build_model,
    claimed_folder,
    class_weights,
    identity_of,
    keep_best,
    make_callbacks,
    make_loaders,
    make_trainer,
    read_pictures,
    resume_checkpoint,
)
from transferkit.plan import note_enlarging, plan_text
from transferkit.run_folder import VALIDATION, RunFolder
from transferkit.run_record import judged_pictures, run_record
from transferkit.validation import save_judgements

if TYPE_CHECKING:
    from transferkit.finetuner import Finetuner

__all__ = ["fit"]

logger = logging.getLogger("transferkit")


def fit(tuner: Finetuner, data: Data, *, resume: bool) -> History:
    """Train as a :class:`~transferkit.Finetuner` is set, and give it the model, the history and the data.

    Args:
        tuner: Its settings have been checked.
        data: As for :meth:`Finetuner.fit`.
        resume: Whether to go on with the run in ``output_dir`` where there is one.

    Returns:
        The history, one record per epoch.

    Raises:
        TransferkitError: As for :meth:`Finetuner.fit`.
    """
    with claimed_folder(tuner, resume=resume) as folder:
        return _fit(tuner, data, folder, resume=resume)


def _fit(tuner: Finetuner, data: Data, folder: RunFolder | None, *, resume: bool) -> History:
    started = time.perf_counter()
    if tuner.device is not None:
        choose_device(tuner.device)  # all pictures are looked at next, which may take a while
    tuner.data = read_pictures(tuner, data)
    weights = class_weights(tuner, tuner.data)
    tuner.model = build_model(tuner, tuner.data)
    note_enlarging(tuner.model, tuner.data.train)
    recipe = tuner.recipe
    identity = identity_of(tuner, tuner.model, tuner.data)
    checkpoint = None if folder is None else resume_checkpoint(tuner, folder, identity)
    callbacks = make_callbacks(tuner, folder, checkpoint, left_out=tuner.data.left_out)
    trainer = make_trainer(tuner, tuner.model, callbacks=callbacks, weights=weights)
    tuner.history = trainer.history
    train, val = make_loaders(tuner, tuner.model, tuner.data, trainer)
    # before a state is taken back: the optimizer still has each group's own lr
    shown = tuner.progress and trainer.is_main_process
    plan = plan_text(
        tuner.model,
        tuner.data,
        recipe,
        trainer.optimizer,
        epochs=tuner.epochs,
        steps_per_epoch=-(-len(train) // tuner.accumulate),
        activations=trainer.plan_activations(train, val, epochs=tuner.epochs),
    )
    check_same_everywhere(trainer.accelerator, identity)
    if checkpoint is not None and resume:
        state = share_object(trainer.accelerator, folder.state() if folder and trainer.is_main_process else None)
        if state is not None:
            check_same_run(state["identity"], checkpoint.identity, folder=tuner.output_dir or "")
            if "weights" in state:
                return _finished(tuner, tuner.model, state)
            trainer.load_state_dict(state)
    if shown:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(plan)
    try:
        trainer.fit(train, val, epochs=tuner.epochs)
    except BaseException as error:
        kept = keep_best(trainer, error)
        if isinstance(error, CallbackError):
            raise CallbackError(f"{error}; {kept}") from error.__cause__
        raise
    if tuner.output_dir is not None and trainer.is_main_process:
        save_judgements(judged_pictures(trainer, val), Path(tuner.output_dir) / VALIDATION)
        record = run_record(tuner, trainer, tuner.data, plan=plan, seconds=time.perf_counter() - started)
        save_artifact(tuner.model, tuner.output_dir, extra={**record, "identity": checkpoint and checkpoint.identity})
        if checkpoint is not None:
            checkpoint.store.clear()
    return tuner.history


def _finished(tuner: Finetuner, model: TransferModel, state: dict[str, Any]) -> History:
    """Take over what a run has left that needs nothing more."""
    load_network_state(model.network, state["weights"])
    model.temperature = state["temperature"]
    tuner.history = state["history"]
    logger.info("the run in %s is finished; Finetuner.load(%r) trains on from it", tuner.output_dir, tuner.output_dir)
    return tuner.history
