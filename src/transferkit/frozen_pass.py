"""Running what is frozen over all pictures, once: each process its share, or none where an earlier run left files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transferkit.activation_store import ActivationStore
from transferkit.distribution import everywhere
from transferkit.evaluation import is_worth_preparing
from transferkit.exceptions import PictureError
from transferkit.identity import contents_of
from transferkit.inference import fast_forward
from transferkit.loading import Batches, none_left
from transferkit.model import TransferModel
from transferkit.splitting import Split
from transferkit.transforms import Transform, is_preset

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FrozenPass"]

logger = logging.getLogger("transferkit")


class FrozenPass:
    """Runs the frozen half over all pictures, once per view; every process must ask alike.

    Args:
        split: The network in two halves.
        model: Whose weights the frozen half has.
        accelerator: Device, precision and processes.
        plain: The transform of the first view of augmented pictures.
        passes: How many pictures will run through it, in all.
        in_memory: Whether what it gives has room there.
        folder: Where files are made.
        stays: Whether they stay there for later runs.
        dtype: Type in which floating point numbers are kept; ``None`` for their own.
        engine: What computes them, one of :data:`~transferkit.inference.ENGINES`.
        each_batch: Called after each batch with the number of batches that are done, and of all.
    """

    def __init__(
        self,
        split: Split,
        model: TransferModel,
        accelerator: Accelerator,
        *,
        plain: Transform,
        passes: int,
        in_memory: bool,
        folder: Path,
        stays: bool,
        dtype: torch.dtype | None,
        engine: str,
        each_batch: Callable[[int, int], object],
    ) -> None:
        """Compute nothing yet."""
        self.split, self.model, self.accelerator, self.plain = split, model, accelerator, plain
        self.passes, self.in_memory, self.folder, self.stays = passes, in_memory, folder, stays
        self.dtype, self.engine, self.each_batch = dtype, engine, each_batch
        self._forwards: dict[torch.dtype | None, Callable[[Tensor], Any]] = {}
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def store(self, batches: Batches, view: int, *, training: bool) -> ActivationStore:
        """Return the activations of a view of all pictures, with their labels last: an earlier run's, or new ones.

        Args:
            batches: The loader of these pictures.
            view: Which one; 0 is the plain one.
            training: Whether they are trained on, and computed in the precision of training.

        Raises:
            PictureError: A picture cannot be read and may not be left out, or none can be read.
            OutputError: The files cannot be written.
        """
        self._precision = self.accelerator.autocast if training else nullcontext  # a model is measured as it predicts
        if batches.augmented:
            ordered = batches.ordered(epoch=view) if view else batches.ordered(transform=self.plain)
        else:
            ordered = batches.ordered()
        facts = self._facts(ordered) if self.stays else None
        if facts is None:
            return self._computed(ordered, in_files=not self.in_memory)
        kept = self.folder / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        found = ActivationStore.open(kept, facts=facts, rows=len(ordered.pictures), in_memory=self.in_memory)
        if everywhere(self.accelerator, found is not None) and found is not None:
            logger.info("activations of %d pictures are those of an earlier run, %s", len(ordered.pictures), kept)
            return found
        store = self._computed(ordered, in_files=True)
        if bool(store.written.all()):
            store.keep(kept, facts=facts)
        return store

    def _computed(self, ordered: Batches, *, in_files: bool) -> ActivationStore:
        count, world = len(ordered.pictures), ordered.order.world_size
        folder = self.folder / f"transferkit-{secrets.token_hex(8)}.partial" if in_files else None
        store: ActivationStore | None = None
        batches = ordered.with_rows()
        rounds = math.ceil(math.ceil(count / world) / (ordered.batch_size or count))
        try:
            for done in range(1, rounds + 1):
                rows, batch = next(batches, ([], None))
                for some_rows, tensors in self._shared(rows, batch):
                    if store is None:
                        store = ActivationStore.create(count, tensors, dtype=self.dtype, folder=folder)
                    store.write(torch.tensor(some_rows), tensors)
                self.each_batch(done, rounds)
        except BaseException:
            if store is not None:
                store.close()
            raise
        if store is None:
            raise none_left(ordered.lost or ())
        return store

    def _shared(self, rows: list[int], batch: tuple[Tensor, Tensor] | None) -> list[tuple[list[int], list[Tensor]]]:
        """Compute a batch; returns its rows and those of the other processes."""
        mine: list[tuple[list[int], list[Tensor]]] = []
        if batch is not None:
            images, labels = batch
            images = images.to(self.accelerator.device, non_blocking=True)
            halved = self._halved
            if halved not in self._forwards:  # every view of this phase goes through the same weights
                self._forwards[halved] = self._prepared(images, halved)
            with self._precision():
                activations = self._forwards[halved](images)
            mine = [(rows, [*(each.cpu() for each in activations), labels])]
        if self.accelerator.num_processes == 1:
            return mine
        from accelerate.utils import gather_object

        return list(gather_object(mine))

    @property
    def _halved(self) -> torch.dtype | None:
        """What autocast computes in on a CPU, where it does."""
        here = self._precision is not nullcontext and self.accelerator.device.type == "cpu"
        return torch.bfloat16 if here and self.accelerator.mixed_precision == "bf16" else None

    def _prepared(self, images: Tensor, halved: torch.dtype | None) -> Callable[[Tensor], Any]:
        if not is_worth_preparing(range(self.passes), images[:1]):
            return self.split.prefix
        return fast_forward(self.split.frozen_half, images, engine=self.engine, autocast=halved)

    def _facts(self, ordered: Batches) -> dict[str, Any] | None:
        """Say what the activations are a function of, or ``None`` where that is not known."""
        pictures = ordered.pictures
        try:
            contents = contents_of(pictures.source)
        except PictureError:
            if not pictures.skip:
                raise
            return None  # the pass will say which, and do without
        if contents is None or not is_preset(pictures.transform):
            logger.info("activations are not kept for later runs: only those of files under a named transform are")
            return None
        weights = hashlib.sha256()
        for stage in self.model.stages:
            if stage.name in self.split.stages:
                for tensor in (*stage.parameters, *stage.buffers):
                    weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {
            **{name: version(name) for name in ("transferkit", "torch", "torchvision", "timm", "pillow")},
            "network": self.model.name,
            "architecture": hashlib.sha256(str(self.model.network).encode()).hexdigest(),
            "weights": weights.hexdigest(),
            "stages": list(self.split.stages),
            "shapes": [list(shape) for shape in self.split.shapes],
            "pictures": contents,
            "picture shape": list(self.split.image_shape),
            "transform": repr(pictures.transform),
            "augmentation": [pictures.seed, ordered.order.epoch] if pictures.augmented else None,
            "device": self.accelerator.device.type,
            "precision": "fp32" if self._precision is nullcontext else str(self.accelerator.mixed_precision),
            "kept as": str(self.dtype),
            "engine": self.engine,
        }
