"""The pieces that a :class:`Finetuner`'s settings make, one function each; :meth:`Finetuner.fit` puts them together."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.filesize import decimal
from torch import nn

from transferkit.activations import ActivationCache
from transferkit.bad_pictures import facts_of, readable_data, save_bad_images
from transferkit.callbacks import (
    EMA,
    BestCheckpoint,
    Callback,
    CSVLogger,
    EarlyStopping,
    LRScheduler,
    Progress,
    ResumeCheckpoint,
    UnfreezeLogger,
)
from transferkit.check import same_files
from transferkit.checkpoint import HISTORY
from transferkit.create import adapt, create_model
from transferkit.data import from_datasets, image_folder
from transferkit.devices import is_main_process, processes_per_machine
from transferkit.exceptions import DataError, SettingError
from transferkit.identity import run_identity
from transferkit.loading import Batches, in_channels, loader
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.resident import ResidentBatches, can_be_resident, resident_bytes
from transferkit.run_folder import BAD_IMAGES, RunFolder
from transferkit.sources import LabelledPictures, PictureData
from transferkit.transforms import Transform

if TYPE_CHECKING:
    from transferkit.finetuner import Data, Finetuner
    from transferkit.trainer import Trainer

__all__ = [
    "build_model",
    "claimed_folder",
    "class_weights",
    "identity_of",
    "make_activations",
    "make_callbacks",
    "make_loader",
    "make_optimizer",
    "read_pictures",
    "resume_checkpoint",
    "workers_for",
]

logger = logging.getLogger("transferkit")

# Settings that a resumed run may change: where it runs, what it shows, how often it saves, where it keeps activations.
# Of precision the one in use counts, which "auto" does not tell; the trainer compares it.
_WITHOUT_EFFECT = {
    "cache_budget",
    "cache_dir",
    "callbacks",
    "checkpoint_every",
    "checkpoint_interval",
    "device",
    "num_workers",
    "on_bad_image",
    "output_dir",
    "overwrite",
    "precision",
    "progress",
}


def read_pictures(settings: Finetuner, data: Data) -> PictureData:
    """Return labelled pictures that can be read from whatever :meth:`Finetuner.fit` takes; warn of what would hurt."""
    pictures = _labelled_pictures(settings, data)
    facts = facts_of(pictures)
    readable = readable_data(pictures, facts, on_bad_image=settings.on_bad_image)
    for finding in same_files(readable, facts):
        if finding.hurts:
            logger.warning("%s", finding.message)
    return readable


def _labelled_pictures(settings: Finetuner, data: Data) -> PictureData:
    if isinstance(data, PictureData):
        return data
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"a tuple of data sets must be (train, val), got {len(data)} elements")
        return from_datasets(*data)
    if not isinstance(data, str | os.PathLike):
        raise DataError(f"cannot fit a {type(data).__name__}; give a folder, a PictureData, or (train, val) data sets")
    return image_folder(data, val_fraction=settings.val_fraction, seed=settings.seed)


def build_model(settings: Finetuner, data: PictureData) -> TransferModel:
    """Return the network with a new head for these classes."""
    shape: dict[str, Any] = {"dropout": settings.dropout, "hidden_size": settings.hidden_size, "seed": settings.seed}
    if isinstance(settings.backbone, nn.Module):
        model = adapt(
            settings.backbone,
            class_names=data.class_names,
            head=settings.head,
            preprocessing=settings.preprocessing,
            **shape,
        )
    else:
        model = create_model(
            settings.backbone,
            class_names=data.class_names,
            weights=settings.weights,
            image_size=settings.image_size,
            in_chans=settings.in_chans,
            aux=settings.aux,
            small_images=settings.small_images,
            preprocessing=settings.preprocessing,
            **shape,
        )
    model.eval_preset = settings.eval_preset
    known = settings.weights is not None and settings.small_images != "stem"  # at another scale they do not hold
    model.keep_statistics = known if settings.keep_statistics is None else settings.keep_statistics
    return model.eval()


def make_loader(
    settings: Finetuner,
    source: LabelledPictures,
    transform: Transform,
    *,
    train: bool,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Batches:
    """Return the batches of one process; where a device is given, its pictures may stay there."""
    batches = loader(
        in_channels(source, channels),
        transform,
        batch_size=settings.batch_size,
        seed=settings.seed,
        train=train,
        balanced=train and settings.balanced,
        num_workers=workers_for(settings, len(source)),
        rank=rank,
        world_size=world_size,
        pin_memory=device is not None and device.type == "cuda",
    )
    if device is None or not _is_resident(settings, batches, device):
        return batches
    logger.info(
        "%s pictures stay on %s: %s", "training" if train else "validation", device, decimal(resident_bytes(batches))
    )
    return ResidentBatches(batches, device)


def _is_resident(settings: Finetuner, batches: Batches, device: torch.device) -> bool:
    if settings.resident is not None or device.type != "cuda" or not can_be_resident(batches, sharp=True):
        return bool(settings.resident)
    free, _ = torch.cuda.mem_get_info(device)
    return resident_bytes(batches) <= free // 4


def workers_for(settings: Finetuner, count: int) -> int:
    """Say how many processes read so many pictures: one per core that this one does not use, if they have enough."""
    spare = (os.cpu_count() or 1) // processes_per_machine() - 1
    workers = max(0, min(8, spare)) if settings.num_workers is None else settings.num_workers
    return min(workers, count // settings.batch_size)


def make_activations(settings: Finetuner) -> ActivationCache:
    """Return what keeps activations."""
    return ActivationCache(
        views=settings.views, budget=settings.cache_budget, directory=settings.cache_dir, dtype=settings.cache_dtype
    )


def make_optimizer(settings: Finetuner, model: TransferModel) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters, each group at the rate of its stage."""
    recipe = settings.recipe
    groups = param_groups(
        model,
        lr=recipe.lr / recipe.head_lr_multiplier,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        head_lr_multiplier=recipe.head_lr_multiplier,
    )
    return build_optimizer(settings.optimizer, groups)


def class_weights(settings: Finetuner, data: PictureData) -> Sequence[float] | None:
    """Return one weight per class, or ``None``; ``"balanced"`` ones are inverse to the classes' shares."""
    if not isinstance(settings.class_weights, str):
        return settings.class_weights
    counts = Counter(data.train.labels())
    return [len(data.train) / (len(counts) * counts[label]) for label in range(len(data.class_names))]


@contextmanager
def claimed_folder(settings: Finetuner, *, resume: bool) -> Iterator[RunFolder | None]:
    """Give the folder to write into, which has been looked at and belongs to this run, or ``None``."""
    if settings.output_dir is None:
        if resume:
            raise SettingError("resume goes on with the run in output_dir, and there is none; set output_dir")
        yield None
        return
    folder = RunFolder(settings.output_dir, overwrite=settings.overwrite, resume=resume)
    # The first process looks before it writes; others might see what it has written.
    with folder.claimed() if is_main_process() else nullcontext():
        yield folder


def identity_of(settings: Finetuner, model: TransferModel, data: PictureData) -> dict[str, Any]:
    """Say what a run must have in common with one that goes on with it, and in all its processes."""
    recipe = settings.recipe
    given = {each.name: getattr(settings, each.name) for each in fields(settings) if each.init}
    chosen = {each.name: getattr(recipe, each.name) for each in fields(recipe)}
    facts = {name: value for name, value in {**given, **chosen}.items() if name not in _WITHOUT_EFFECT}
    return run_identity(model, data, facts)


def resume_checkpoint(settings: Finetuner, folder: RunFolder, identity: dict[str, Any]) -> ResumeCheckpoint:
    """Return what saves the run's state beside its model."""
    return ResumeCheckpoint(
        folder.resume_path,
        every=settings.checkpoint_every,
        min_interval=settings.checkpoint_interval,
        identity=identity,
    )


def make_callbacks(
    settings: Finetuner, folder: RunFolder | None, checkpoint: ResumeCheckpoint | None
) -> list[Callback]:
    """Return the callbacks in their order: what looks at an epoch's weights after what makes them."""
    callbacks: list[Callback] = [_Clear(folder)] if folder is not None and folder.overwrite else []
    if folder is not None and settings.data is not None and settings.data.left_out:
        callbacks.append(_ListLeftOut(folder, settings.data.left_out))
    callbacks.append(LRScheduler(settings.recipe.schedule))
    if settings.ema is not None:
        callbacks.append(EMA(settings.ema))  # before what looks at the epoch's weights
    callbacks += [BestCheckpoint(settings.output_dir, monitor=settings.monitor), UnfreezeLogger()]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(patience=settings.patience, monitor=settings.monitor))
    if settings.output_dir is not None:
        callbacks.append(CSVLogger(Path(settings.output_dir) / HISTORY))
    if settings.progress:
        callbacks.append(Progress(monitor=settings.monitor))
    callbacks += settings.callbacks
    return callbacks if checkpoint is None else [*callbacks, checkpoint]


class _ListLeftOut(Callback):
    """Write down what could not be read, before anything else can fail."""

    def __init__(self, folder: RunFolder, causes: Mapping[str, str]) -> None:
        self.folder, self.causes = folder, causes

    def on_fit_start(self, trainer: Trainer) -> None:
        """Do it where the run begins."""
        if trainer.is_main_process:
            save_bad_images(self.causes, self.folder.path / BAD_IMAGES)


class _Clear(Callback):
    """Remove the run that is to be replaced, once nothing but training can fail."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer) -> None:
        """Do it where the run begins."""
        if trainer.is_main_process and trainer.at_beginning:
            self.folder.clear()
