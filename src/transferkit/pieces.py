"""The pieces that a :class:`Finetuner` makes of its settings; :mod:`transferkit.fitting` puts them together."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.filesize import decimal
from torch import Tensor, nn

from transferkit.bad_pictures import facts_of, readable_data
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
from transferkit.devices import choose_device, is_main_process, processes_per_machine, usable_cores
from transferkit.exceptions import DataError, OutputError, SettingError, TransferkitError
from transferkit.identity import run_identity
from transferkit.loading import Batches, loader
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.randomness import seeded
from transferkit.reading import in_channels
from transferkit.resident import ResidentBatches, can_be_resident, resident_bytes
from transferkit.run_folder import ClearFolder, ListLeftOut, RunFolder
from transferkit.sources import LabelledPictures, PictureData, raw_labels
from transferkit.trainer import Trainer, check_class_weights
from transferkit.transforms import Transform, eval_transform, train_transform

if TYPE_CHECKING:
    from transferkit.settings import Settings

__all__ = [
    "Data",
    "build_model",
    "claimed_folder",
    "class_weights",
    "drawn_pictures",
    "identity_of",
    "keep_best",
    "make_callbacks",
    "make_loader",
    "make_loaders",
    "make_optimizer",
    "make_trainer",
    "read_pictures",
    "resume_checkpoint",
    "workers_for",
]

logger = logging.getLogger("transferkit")

Data = str | os.PathLike[str] | PictureData | tuple[Any, Any]
"""A picture folder, a :class:`PictureData`, or a pair of map-style data sets (train, val)."""

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


def read_pictures(settings: Settings, data: Data) -> PictureData:
    """Return labelled pictures that can be read from whatever :meth:`Finetuner.fit` takes; warn of what would hurt."""
    pictures = _labelled_pictures(settings, data)
    if len(pictures.class_names) < 2:
        found = f"only one class, {pictures.class_names[0]!r}," if pictures.class_names else "no class"
        raise DataError(f"{found} in the data; a classifier needs two or more")
    facts = facts_of(pictures)
    readable = readable_data(pictures, facts, on_bad_image=settings.on_bad_image)
    findings = tuple(finding.message for finding in same_files(readable, facts) if finding.hurts)
    for message in findings:
        logger.warning("%s", message)
    _warn_of_few_steps(settings, len(readable.train))
    return replace(readable, findings=findings)


def _warn_of_few_steps(settings: Settings, count: int) -> None:
    batches = -(-count // settings.batch_size)
    if settings.batch_size > count:
        logger.warning(
            "batch_size=%d is more than the %d training pictures, so that an epoch is a single step; a smaller one "
            "takes more steps",
            settings.batch_size,
            count,
        )
    elif settings.accumulate > batches:
        logger.warning(
            "accumulate=%d is more than the %d batches of an epoch, so that an epoch is a single step; a smaller one "
            "takes more steps",
            settings.accumulate,
            batches,
        )


def _labelled_pictures(settings: Settings, data: Data) -> PictureData:
    if isinstance(data, PictureData):
        return data
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"a tuple of data sets must be (train, val), got {len(data)} elements")
        return from_datasets(*data)
    if not isinstance(data, str | os.PathLike):
        raise DataError(f"cannot fit a {type(data).__name__}; give a folder, a PictureData, or (train, val) data sets")
    return image_folder(
        data, val_fraction=settings.val_fraction, seed=settings.seed, natural_sort=settings.natural_sort
    )


def build_model(settings: Settings, data: PictureData) -> TransferModel:
    """Return the network with a new head for these classes; its stages are those that the policy names."""
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
    settings.recipe.policy.changes(model.stage_names, settings.epochs)  # an unknown stage is told by now
    model.eval_preset = settings.eval_preset
    known = settings.weights is not None and settings.small_images != "stem"  # at another scale they do not hold
    model.keep_statistics = known if settings.keep_statistics is None else settings.keep_statistics
    return model.eval()


def make_loader(
    settings: Settings,
    source: LabelledPictures,
    transform: Transform,
    *,
    train: bool,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    lost: dict[str, str] | None = None,
) -> Batches:
    """Return the batches of one process; where a device is given, its pictures may stay there.

    ``lost`` is where files are noted that go bad while it is used, as for :func:`loader`.
    """
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
        lost=lost,
    )
    if device is None or not _is_resident(settings, batches, device):
        return batches
    logger.info(
        "%s pictures stay on %s: %s", "training" if train else "validation", device, decimal(resident_bytes(batches))
    )
    return ResidentBatches(batches, device)


def make_loaders(
    settings: Settings, model: TransferModel, data: PictureData, trainer: Trainer
) -> tuple[Batches, Batches]:
    """Return what a trainer trains and validates on, in each of its processes."""
    given: dict[str, Any] = {
        "channels": model.preprocessing.channels,
        "rank": trainer.accelerator.process_index,
        "world_size": trainer.accelerator.num_processes,
        "device": trainer.device,
        "lost": data.left_out if settings.on_bad_image == "skip" else None,
    }
    train = train_transform(settings.recipe.train_preset, model.preprocessing)
    val = eval_transform(settings.eval_preset, model.preprocessing)
    return (
        make_loader(settings, data.train, train, train=True, **given),
        make_loader(settings, data.val, val, train=False, **given),
    )


def _is_resident(settings: Settings, batches: Batches, device: torch.device) -> bool:
    if settings.resident is not None or device.type != "cuda" or not can_be_resident(batches, sharp=True):
        return bool(settings.resident)
    free, _ = torch.cuda.mem_get_info(device)
    return resident_bytes(batches) <= free // 4


def workers_for(settings: Settings, count: int) -> int:
    """Say how many processes read so many pictures, if they have enough.

    It is one per core that this process leaves free. Where a CPU computes it is one less, and none on two cores: this
    process then reads in threads between its batches, which costs less than processes that compete with it.
    """
    busy = 2 if choose_device(settings.device).type == "cpu" else 1
    spare = usable_cores() // processes_per_machine() - busy
    workers = max(0, min(8, spare)) if settings.num_workers is None else settings.num_workers
    return min(workers, count // settings.batch_size)


def make_optimizer(settings: Settings, model: TransferModel) -> torch.optim.Optimizer:
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


def make_trainer(
    settings: Settings, model: TransferModel, *, callbacks: Sequence[Callback], weights: Sequence[float] | None
) -> Trainer:
    """Return the trainer of a model, with the weights of its classes."""
    recipe = settings.recipe
    trainer = Trainer(
        model,
        make_optimizer(settings, model),
        policy=recipe.policy,
        callbacks=callbacks,
        seed=settings.seed,
        label_smoothing=recipe.label_smoothing,
        class_weights=weights,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        accumulate=settings.accumulate,
        clip_grad_norm=settings.clip_grad_norm,
        device=settings.device,
        precision=settings.precision,
        shard=settings.shard,
        sync_batch_norm=settings.sync_batch_norm,
        activations=settings.activation_cache,
        engine=settings.engine,
        torch_compile=settings.torch_compile,
    )
    trainer.settings = _deciding(settings)
    return trainer


def class_weights(settings: Settings, data: PictureData) -> Sequence[float] | None:
    """Return one weight per class, or ``None``; ``"balanced"`` ones are inverse to the classes' shares."""
    if not isinstance(settings.class_weights, str):
        check_class_weights(settings.class_weights, len(data.class_names))
        return settings.class_weights
    counts = Counter(data.train.labels() if hasattr(data.train, "labels") else raw_labels(data.train))
    if missing := [name for label, name in enumerate(data.class_names) if not counts[label]]:
        raise DataError(
            f"class_weights='balanced' needs training pictures of every class, and there are none of {missing[0]!r}; "
            "add some, or give a list of weights"
        )
    return [len(data.train) / (len(counts) * counts[label]) for label in range(len(data.class_names))]


@contextmanager
def claimed_folder(settings: Settings, *, resume: bool) -> Iterator[RunFolder | None]:
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


def identity_of(settings: Settings, model: TransferModel, data: PictureData) -> dict[str, Any]:
    """Say what a run must have in common with one that goes on with it, and in all its processes."""
    return run_identity(model, data, _deciding(settings))


def _deciding(settings: Settings) -> dict[str, Any]:
    """Return the settings that a run's outcome depends on, the recipe's where none was given."""
    recipe = settings.recipe
    given = {each.name: getattr(settings, each.name) for each in fields(settings) if each.init}
    chosen = {each.name: getattr(recipe, each.name) for each in fields(recipe)}
    return {name: value for name, value in {**given, **chosen}.items() if name not in _WITHOUT_EFFECT}


def resume_checkpoint(settings: Settings, folder: RunFolder, identity: dict[str, Any]) -> ResumeCheckpoint:
    """Return what saves the run's state beside its model."""
    return ResumeCheckpoint(
        folder.resume_path,
        every=settings.checkpoint_every,
        min_interval=settings.checkpoint_interval,
        identity=identity,
    )


def make_callbacks(
    settings: Settings, folder: RunFolder | None, checkpoint: ResumeCheckpoint | None, *, left_out: Mapping[str, str]
) -> list[Callback]:
    """Return the callbacks in their order: what looks at an epoch's weights after what makes them.

    Those that are given come before what touches a run that is there already, since they may fail.
    """
    callbacks: list[Callback] = [LRScheduler(settings.recipe.schedule)]
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
    if folder is not None:
        callbacks += [ClearFolder(folder)] if folder.overwrite else []
        callbacks.append(ListLeftOut(folder, left_out))
    return callbacks if checkpoint is None else [*callbacks, checkpoint]


def keep_best(trainer: Trainer, error: BaseException) -> str:
    """Put the best weights so far into the model of a run that was broken off; returns where they are, in words.

    After an :class:`OutputError` they may not have been written, and the model is left as it is.
    """
    best = next(each for each in trainer.callbacks if isinstance(each, BestCheckpoint))
    if best.best is None:
        return "no epoch had ended by then, so mend it and start the run again"
    if trainer.accelerator.num_processes == 1 and not isinstance(error, OutputError):
        with suppress(TransferkitError):  # what is told is what broke the run off
            best.restore(trainer)
    if best.directory is None:
        return f"the best weights so far, of epoch {best.best.epoch}, are in the model"
    return (
        f"the best model so far, of epoch {best.best.epoch}, is in {best.directory}; mend it and go on with "
        "resume='auto' (--resume)"
    )


def drawn_pictures(
    source: LabelledPictures, *, count: int, seed: int, channels: int
) -> list[tuple[Image.Image | Tensor, int]]:
    """Return so many labelled pictures of a source, or all there are, drawn by seed."""
    source = in_channels(source, channels)
    with seeded(seed, 4):
        chosen = torch.randperm(len(source))[:count].tolist()
    return [source[index] for index in chosen]
