"""Telling an experiment tracker what a run does: TensorBoard, Weights & Biases, MLflow and others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transferkit.callbacks._base import Callback
from transferkit.callbacks.checkpointing import BestCheckpoint
from transferkit.callbacks.recording import stage_groups
from transferkit.exceptions import SettingError, closest
from transferkit.identity import in_plain_values

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from transferkit.history import EpochRecord
    from transferkit.trainer import Trainer

__all__ = ["Tracker"]

_EXTRAS = ("mlflow", "tensorboard", "wandb")


class Tracker(Callback):
    """Log a run to an experiment tracker, through accelerate's trackers.

    At the start the run's hyperparameters; after each epoch its figures and, as ``lr/STAGE``, the last lr of each stage
    that trained, with the epoch as step; at the end the best epoch's figures as ``best/FIGURE``, where
    :class:`BestCheckpoint` says which it is. Only the main process logs. After an error what was logged is kept, and
    Weights & Biases and MLflow call the run failed.

    Variables of the environment go before the arguments: ``WANDB_PROJECT``, ``WANDB_DIR``, ``MLFLOW_TRACKING_URI``,
    ``MLFLOW_EXPERIMENT_NAME`` and the others of accelerate's ``MLflowTracker``.

    A run that goes on after an interruption goes on in TensorBoard too, and is a new run elsewhere, which is told of
    the epochs before first, without their rates.

    Args:
        tracker: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``, another name that accelerate knows, or a tracker of
            accelerate, whose run is then yours to choose.
        directory: Folder in which the tracker makes its own: ``tensorboard``, ``wandb`` or ``mlruns``. ``None`` for
            the folder of :class:`BestCheckpoint`, which is ``output_dir`` of a :class:`Finetuner`, or else the current
            one.
        project: What the run belongs to, where the tracker knows projects; MLflow calls it an experiment.
        **settings: More arguments of accelerate's tracker, which for W&B are those of ``wandb.init``:
            ``mode="offline"`` for example.

    Raises:
        SettingError: There is no such tracker, its package is not installed (``pip install transferkit[wandb]``), or
            settings are given with a tracker that is there already.

    Source: ``accelerate.tracking``.

    Example:
        >>> Tracker("tensorboard", "runs/bees").name
        'tensorboard'
        >>> Tracker("tensorbord")
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: no tracker 'tensorbord'; there are ... — did you mean 'tensorboard'?
    """

    def __init__(
        self,
        tracker: str | GeneralTracker,
        directory: str | os.PathLike[str] | None = None,
        *,
        project: str = "transferkit",
        **settings: Any,
    ) -> None:
        """Store the settings, and see that the tracker's package is there; nothing is opened yet."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

        self._given: GeneralTracker | None = None
        self.name = str(tracker)
        if isinstance(tracker, GeneralTracker):
            if settings or directory is not None:
                raise SettingError("a directory and settings go with a tracker's name; set up your tracker with them")
            self._given, self.name = tracker, str(tracker.name)
        elif self.name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise SettingError(f"no tracker {self.name!r}; there are {', '.join(known)}{closest(self.name, known)}")
        elif LOGGER_TYPE_TO_CLASS[self.name].__module__ == "accelerate.tracking" and not _is_installed(self.name):
            package = f"'transferkit[{self.name}]'" if self.name in _EXTRAS else self.name
            raise SettingError(f"the tracker {self.name} is not installed; install it with pip install {package}")
        self.directory = None if directory is None else Path(directory)
        self.project, self.settings = project, settings
        self._tracker: Any = None
        self._opened = ExitStack()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the tracker's run, and tell it the hyperparameters and the epochs that are done."""
        if not trainer.is_main_process:
            return
        tracker = self._make(trainer) if self._given is None else self._given
        tracker.start()
        self._opened.callback(tracker.finish)
        self._tracker = tracker
        tracker.store_init_configuration(_hyperparameters(trainer))
        if self._given is None and self.name != "tensorboard":
            for record in trainer.history:
                self._log(record)

    def on_validation_end(self, trainer: Trainer) -> None:
        """Log the epoch."""
        if self._tracker is not None:
            self._log(trainer.history.records[-1], _rates(trainer))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Log the best epoch, and end the tracker's run."""
        best = _best_checkpoint(trainer)
        if self._tracker is not None and best is not None and best.best is not None:
            figures = {f"best/{name}": value for name, value in best.best.to_dict().items()}
            self._tracker.log(figures, step=len(trainer.history))
        self._close()

    def on_exception(self, trainer: Trainer) -> None:
        """End the tracker's run as a failed one, so that what was logged is kept."""
        try:
            if self._tracker is not None and self.name == "wandb":
                self._tracker.tracker.finish(exit_code=1)
            elif self._tracker is not None and self.name == "mlflow":
                import mlflow

                mlflow.end_run("FAILED")
        finally:
            self._close()

    def _log(self, record: EpochRecord, rates: Mapping[str, float] | None = None) -> None:
        figures = record.to_dict()
        epoch = figures.pop("epoch")
        self._tracker.log({**figures, **(rates or {})}, step=epoch)

    def _close(self) -> None:
        self._tracker = None
        self._opened.close()

    def _make(self, trainer: Trainer) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder, project, settings = self._folder(trainer), self.project, dict(self.settings)
        if self.name == "tensorboard":
            project = ""  # it would be one more folder
            # of what an older run has left in the folder, later epochs are not shown
            settings = {"purge_step": len(trainer.history) + 1, **settings}
        elif self.name == "wandb":
            project = os.environ.get("WANDB_PROJECT", project)
            folder = Path(os.environ.get("WANDB_DIR", folder))
            folder.mkdir(parents=True, exist_ok=True)  # wandb takes another folder where there is none
            settings = {"dir": str(folder), **settings}
        elif self.name == "mlflow":
            self._opened.enter_context(_file_store(folder / "mlruns"))
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        return kind(project, *([folder / self.name] if kind.requires_logging_directory else []), **settings)

    def _folder(self, trainer: Trainer) -> Path:
        best = _best_checkpoint(trainer)
        return self.directory or (best and best.directory) or Path()


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a folder that a tracker has written can be imported too


def _best_checkpoint(trainer: Trainer) -> BestCheckpoint | None:
    return next((each for each in trainer.callbacks if isinstance(each, BestCheckpoint)), None)


def _hyperparameters(trainer: Trainer) -> dict[str, str | int | float | bool | None]:
    """Return what the run was set to, and what became of it with this network on this machine."""
    model = trainer.model
    facts = {
        **trainer.settings,
        "backbone": model.name,
        "weights": model.weights,
        "parameters": sum(each.numel() for each in model.network.parameters()),
        "classes": len(model.class_names),
        "image_size": model.preprocessing.size,
        "in_chans": model.preprocessing.channels,
        "policy": trainer.policy,
        "epochs": trainer.epochs,
        "steps_per_epoch": trainer.steps_per_epoch,
        "accumulate": trainer.accumulate,
        "seed": trainer.seed,
        "precision": trainer.precision_used,
        "device": trainer.device,
        "processes": trainer.accelerator.num_processes,
    }
    return in_plain_values(facts)  # MLflow drops what is much longer


def _rates(trainer: Trainer) -> dict[str, float]:
    """Return the lr of each stage that trains."""
    groups = trainer.optimizer.param_groups
    return {
        f"lr/{name}": float(groups[group]["lr"]) for name, group in stage_groups(trainer).items() if group is not None
    }


@contextmanager
def _file_store(folder: Path) -> Iterator[None]:
    """Let MLflow write into a folder, unless it has been told where to write."""
    import mlflow

    if mlflow.is_tracking_uri_set():
        yield
        return
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE")
    # MLflow would rather have a database, which needs packages of its own, and refuses files unless told
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(folder.absolute().as_uri())
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if allowed is None:
            del os.environ["MLFLOW_ALLOW_FILE_STORE"]
