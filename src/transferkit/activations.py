"""What frozen stages give is computed once per picture and kept; what trains is trained on that.

:class:`ActivationCache` decides for each phase of a freeze policy whether activations are kept, and where. What holds
them is an :class:`~transferkit.activation_store.ActivationStore`; :func:`~transferkit.splitting.split` cuts the
network.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from rich.filesize import decimal
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transferkit.activation_store import ActivationStore
from transferkit.batches import Inputs
from transferkit.devices import processes_per_machine
from transferkit.distribution import everywhere
from transferkit.exceptions import SettingError, SplitError
from transferkit.freezing import FreezePolicy
from transferkit.frozen_pass import FrozenPass
from transferkit.loading import Batches, none_left
from transferkit.model import TrainingOutput, TransferModel, as_output
from transferkit.ranges import check_whole_number
from transferkit.splitting import Split, Suffix, split

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ActivationCache", "Choice", "KeptBatches", "Phase", "SuffixModel"]

logger = logging.getLogger("transferkit")

DEFAULT_VIEWS = 4
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What a disk reads per second, what decoding a picture takes, and what a processor computes in a second: rough figures
# of a laptop, since only their order counts.
_DISK_BYTES, _DECODE_SECONDS, _FLOPS = 2e8, 4e-3, 1e11


class SuffixModel(nn.Module):
    """The half of a model that trains, as the trainer sees it: from kept activations to the model's output.

    Args:
        suffix: From :func:`split`.
    """

    def __init__(self, suffix: Suffix) -> None:
        """Hold it."""
        super().__init__()
        self.suffix = suffix

    def forward(self, activations: Sequence[Tensor]) -> Tensor | TrainingOutput:
        """Return what :meth:`TransferModel.forward` gives for the pictures that the activations are of."""
        return as_output(self.suffix(activations))


@dataclass(frozen=True)
class Phase:
    """What is trained and validated while the same stages are frozen.

    Attributes:
        module: What is trained: the model, or its half behind the frozen stages.
        network: The same without what training adds, to be validated.
        train_batches: What it is trained on: (inputs, labels).
        val_batches: What it is validated on.
    """

    module: nn.Module
    network: nn.Module
    train_batches: Any
    val_batches: Any


@dataclass(frozen=True)
class Choice:
    """Whether activations are kept in a phase, and what it costs.

    Attributes:
        split: The network in two halves, or ``None`` where nothing is kept.
        views: How many of each training picture.
        bytes: What is kept, in all.
        passes: Pictures that go through the frozen stages in the phase.
        instead_of: How many would if nothing were kept.
        in_memory: Whether there, or in files.
        reason: Why nothing is kept.
    """

    split: Split | None = None
    views: int = 0
    bytes: int = 0
    passes: int = 0
    instead_of: int = 0
    in_memory: bool = True
    reason: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        if self.split is None:
            return f"not kept: {self.reason}"
        where = "memory" if self.in_memory else "files"
        views = f" ({self.views} views of each training picture)" if self.views > 1 else ""
        return (
            f"kept behind {self.split.boundary}, {decimal(self.bytes)} in {where}; "
            f"{self.passes:,} pictures run through it instead of {self.instead_of:,}{views}"
        )


class KeptBatches:
    """The batches of a loader, in its order, as activations; what is not kept yet is computed when an epoch needs it.

    Args:
        batches: The loader.
        views: How many of each picture take turns over the epochs.
        make: Returns the store of a view: one row per picture of the source, the label last.
    """

    def __init__(self, batches: Batches, views: int, make: Callable[[int], ActivationStore]) -> None:
        """Compute nothing yet."""
        self.batches, self.views = batches, views
        self.sampler, self.batch_size = batches.order, batches.batch_size
        self.names = batches.names
        self._make = make
        self._stores: dict[int, ActivationStore] = {}

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Go through the epoch's batches: activations, each (B, …), and labels (B,)."""
        for keys in self.batches.batch_keys():
            wanted = [(index, (epoch + view) % self.views) for epoch, index, view in keys]
            found = [(index, view) for index, view in wanted if self._store(view).written[index]]
            if found:
                *activations, labels = self._read(torch.tensor([index for index, _ in found]), [v for _, v in found])
                yield tuple(activations), labels
            elif self.batches.order.shuffle:
                raise none_left(self.batches.lost or ())

    def close(self) -> None:
        """Let go of everything."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def _read(self, rows: Tensor, views: Sequence[int]) -> tuple[Tensor, ...]:
        if len(set(views)) == 1:
            return self._store(views[0]).read(rows)
        single = [self._store(view).read(row[None]) for view, row in zip(views, rows, strict=True)]
        return tuple(torch.cat(each) for each in zip(*single, strict=True))

    def _store(self, view: int) -> ActivationStore:
        if view not in self._stores:
            self._stores[view] = self._make(view)
        return self._stores[view]


class ActivationCache:
    """Keep what frozen stages give, so that it is computed once per picture instead of once per epoch.

    Give it to a :class:`Trainer`. While the policy leaves leading stages frozen, they run once per picture, as fast as
    an inference engine, and only the rest is trained. With transforms that draw nothing the run is the one without a
    cache, but for rounding. With augmentation, some views of each picture are kept, and take turns over the epochs:
    view 0 is the picture as it is validated on, view k as it is augmented in epoch k.

    Args:
        views: Views of each training picture where they are augmented, 0 or more; 0 keeps nothing at all. ``None`` for
            4. Where transforms draw nothing, one view is all there is.
        budget: Bytes of memory for it, a number or a text such as ``"256MiB"``; more goes into files. ``None`` for a
            quarter of what is free.
        directory: Folder where activations stay for later runs, which find them by the contents of the weights, the
            transform and the picture files; ``None`` for none, and files in the system's folder for temporary ones.
        dtype: ``"fp16"``, ``"bf16"``, ``"fp32"``, or ``"auto"`` for the type they are computed in, which loses
            nothing.

    Raises:
        SettingError: A setting is outside its range.

    Example:
        >>> ActivationCache(views=4, budget="256MiB").budget
        268435456
    """

    def __init__(
        self,
        *,
        views: int | None = None,
        budget: int | str | None = None,
        directory: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
    ) -> None:
        """Store and check the settings."""
        check_whole_number("views", views, at_least=0, or_none=True)
        if dtype not in DTYPES:
            raise SettingError(f"cache_dtype={dtype!r}; it can be {', '.join(DTYPES)}")
        self.views, self.budget = views, check_budget(budget)
        self.directory = None if directory is None else Path(directory)
        self.dtype = dtype
        self._splits: dict[tuple[TransferModel, frozenset[str]], Split | SplitError] = {}
        self._open: list[KeptBatches] = []

    def choose(
        self, model: TransferModel, train_batches: Any, val_batches: Any, *, epochs: int, obstacle: str | None = None
    ) -> Choice:
        """Say what is done while the same stages are frozen as now.

        Args:
            model: It is left as it is.
            train_batches: From :func:`loader`; nothing is kept of others.
            val_batches: The same.
            epochs: How many the phase has.
            obstacle: Why nothing can be kept, where the caller knows.
        """
        if self.views == 0:
            return Choice(reason="views=0")
        if obstacle is not None:
            return Choice(reason=obstacle)
        if model.stage_names[0] not in model.frozen:
            return Choice(reason=f"{model.stage_names[0]} trains")
        if not (isinstance(train_batches, Batches) and isinstance(val_batches, Batches)):
            return Choice(reason="the batches are not from loader()")
        halves = self._split(model)
        if isinstance(halves, SplitError):
            return Choice(reason=str(halves))
        wanted = DEFAULT_VIEWS if self.views is None else self.views
        repeated = train_batches.order.labels is not None  # balanced epochs may have several views of a picture
        views = (wanted if repeated else min(wanted, epochs)) if train_batches.augmented else 1
        train, val = len(train_batches.pictures), len(val_batches.pictures)
        rows = views * train + val
        own, kept = halves.bytes_per_picture, self._kept_bytes(halves)
        in_memory = rows * kept <= (_free_memory() // 4 if self.budget is None else self.budget)
        if not in_memory:
            if epochs == 1:
                return Choice(reason=f"one epoch is not worth {decimal(rows * kept)} in files")
            if not _worth_reading(halves, kept):
                return Choice(reason=f"reading {decimal(own)} per picture takes longer than computing it")
            if rows * kept > (free := shutil.disk_usage(_existing(self._folder())).free):
                return Choice(
                    reason=f"{decimal(rows * kept)} do not fit into {self._folder()}, which has {decimal(free)}"
                )
        return Choice(halves, views, rows * kept, rows, epochs * (train + val), in_memory)

    def plan(
        self,
        model: TransferModel,
        policy: FreezePolicy,
        train_batches: Any,
        val_batches: Any,
        *,
        epochs: int,
        obstacle: str | None = None,
    ) -> list[tuple[int, Choice]]:
        """Return each phase's first epoch, counted from 0, and what is done in it; the model is left as it is.

        Args:
            model: What is trained.
            policy: What is frozen when.
            train_batches: From :func:`loader`; nothing is kept of others.
            val_batches: The same.
            epochs: Length of the run.
            obstacle: Why nothing can be kept, where the caller knows.
        """
        starts = [0, *policy.changes(model.stage_names, epochs)]
        before = model.frozen
        choices = []
        for start, end in zip(starts, [*starts[1:], epochs], strict=True):
            model.freeze(policy.frozen_stages(model.stage_names, start))
            choice = self.choose(model, train_batches, val_batches, epochs=end - start, obstacle=obstacle)
            choices.append((start, choice))
        model.freeze(before)
        return choices

    def phase(
        self,
        model: TransferModel,
        train_batches: Any,
        val_batches: Any,
        *,
        accelerator: Accelerator,
        epochs: int,
        obstacle: str | None = None,
        each_batch: Callable[[int, int], object] = max,
        engine: str = "eager",
    ) -> Phase:
        """Return what to train and to validate while the same stages are frozen as now; every process must ask.

        Args:
            model: What is trained.
            train_batches: From :func:`loader`; nothing is kept of others.
            val_batches: The same.
            accelerator: Device, precision and processes.
            epochs: How many the phase has.
            obstacle: Why nothing can be kept, where the caller knows.
            each_batch: Called after each batch that is computed to be kept, with the number of batches that are done,
                and of all.
            engine: What computes them, one of :data:`~transferkit.inference.ENGINES`.
        """
        self.close()
        choice = self.choose(model, train_batches, val_batches, epochs=epochs, obstacle=obstacle)
        # one that has no room would leave the others waiting
        if not everywhere(accelerator, choice.split is not None) and choice.split is not None:
            choice = Choice(reason="another process cannot keep them")
        if choice.split is None:
            if self.views != 0 and model.stage_names[0] in model.frozen:
                logger.info("activations are %s", choice)
            return Phase(model, model.network, train_batches, val_batches)
        for half in (choice.split.frozen_half, choice.split.suffix):
            half.to(accelerator.device)  # they may have been made elsewhere, and hold tensors that are not the model's
        frozen_pass = FrozenPass(
            choice.split,
            model,
            accelerator,
            plain=val_batches.pictures.transform,
            passes=choice.passes,
            in_memory=choice.in_memory,
            folder=self._folder(),
            stays=self.directory is not None,
            dtype=DTYPES[self.dtype],
            engine=engine,
            each_batch=each_batch,
        )
        train = KeptBatches(train_batches, choice.views, partial(frozen_pass.store, train_batches, training=True))
        val = KeptBatches(val_batches, 1, partial(frozen_pass.store, val_batches, training=False))
        self._open = [train, val]
        return Phase(SuffixModel(choice.split.suffix), choice.split.suffix, train, val)

    def close(self) -> None:
        """Let go of everything that does not stay for later runs."""
        for each in self._open:
            each.close()
        self._open = []

    def _split(self, model: TransferModel) -> Split | SplitError:
        key = model, model.frozen
        if key not in self._splits:
            try:
                self._splits[key] = split(model)
            except SplitError as error:
                self._splits[key] = error
        return self._splits[key]

    def _kept_bytes(self, halves: Split) -> int:
        dtype = DTYPES[self.dtype]
        if dtype is None:
            return halves.bytes_per_picture
        sizes = [own.itemsize if not own.is_floating_point else dtype.itemsize for own in halves.dtypes]
        return sum(torch.Size(shape).numel() * size for shape, size in zip(halves.shapes, sizes, strict=True))

    def _folder(self) -> Path:
        return Path(tempfile.gettempdir()) if self.directory is None else self.directory


def check_budget(budget: int | str | None) -> int | None:
    """Return a budget in bytes.

    Raises:
        SettingError: It is no whole number, below 0, or a text without a unit that is known.

    Example:
        >>> check_budget("1GB")
        1000000000
    """
    if budget is None:
        return None
    try:
        size = convert_file_size_to_int(budget) if isinstance(budget, str) else budget
    except (ValueError, OverflowError):  # infinitely many gigabytes
        size = -1
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 0:
        raise SettingError(f"cache_budget={budget!r}; it can be a number of bytes, or a text such as '256MiB' or '2GB'")
    return int(size)


def _worth_reading(halves: Split, size: int) -> bool:
    images = torch.zeros(1, *halves.image_shape, device=next(halves.suffix.parameters()).device)
    with FlopCounterMode(display=False) as counted:
        halves.prefix(images)
    return size / _DISK_BYTES < _DECODE_SECONDS + int(counted.get_total_flops()) / _FLOPS


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available) // processes_per_machine()


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
