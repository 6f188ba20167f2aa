"""Validating, and keeping, an average of the weights instead of the last ones."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transferkit.callbacks._base import Callback
from transferkit.callbacks.checkpointing import BestCheckpoint
from transferkit.distribution import reshard, share_buffers, spread_like, whole
from transferkit.ranges import check_number

if TYPE_CHECKING:
    from transferkit.trainer import Trainer

__all__ = ["EMA"]


class EMA(Callback):
    """Validate with the exponential moving average of the weights, and leave it in the model at the end.

    After each optimizer step the average moves towards the weights and the running statistics by ``1 - decay`` of the
    difference. It stands in the network during validation, so that :class:`BestCheckpoint` measures and keeps averages;
    training goes on from its own weights. What is not floating point, such as the number of batches that a batch norm
    has seen, has no average and keeps its last value.

    Only stages that train have an average; it begins with their values when they are unfrozen. A frozen stage is never
    written to: one that is frozen again drops its average, since the others go on training beside its own values.

    Args:
        decay: Share of the average that stays at each step, at least 0 and below 1. An average looks back about
            ``1 / (1 - decay)`` steps; let that be less than the run has.
        warmup: Whether the first updates decay faster, update t = 0, 1, 2, … by ``min(decay, (1 + t) / (10 + t))``, so
            that the weights that training began with are soon forgotten.

    Raises:
        SettingError: ``decay`` is outside its range.

    Source: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; ``torch.optim.swa_utils``;
    timm ``ModelEmaV3``.

    Example:
        >>> EMA(0.99).updates
        0
    """

    def __init__(self, decay: float = 0.999, *, warmup: bool = True) -> None:
        """Store and check the settings."""
        check_number("decay", decay, at_least=0, below=1, hint="0.999 is usual")
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self._averages: dict[str, Tensor] = {}
        self._aside: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] = {}
        self._step = 0

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin the averages of stages that train anew, and drop those of stages that no longer train."""
        self._tensors = _training_tensors(trainer)
        self._averages = {
            key: spread_like(self._averages[key], tensor).to(tensor.device)
            if key in self._averages
            else tensor.detach().clone()
            for key, tensor in self._tensors.items()
        }

    def on_train_batch_start(self, trainer: Trainer) -> None:
        """Remember the step, to know whether the batch takes one."""
        self._step = trainer.step

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Move the averages where a step was taken."""
        if trainer.step == self._step:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        # Apart, since in a sharded network only parameters are DTensors, and one call takes no mixture.
        parameters = [key for key, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)]
        buffers = [key for key, tensor in self._tensors.items() if not isinstance(tensor, nn.Parameter)]
        with torch.no_grad():
            for keys in filter(None, (parameters, buffers)):
                averages, current = ([held[key] for key in keys] for held in (self._averages, self._tensors))
                torch._foreach_lerp_(averages, current, 1 - decay)
        self.updates += 1

    def on_validation_start(self, trainer: Trainer) -> None:
        """Put the averages into the network, and its own values aside."""
        self._aside = {key: tensor.detach().clone() for key, tensor in self._tensors.items()}
        self._write_averages(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Put the network's own values back."""
        self._write(trainer, self._aside)
        self._aside = {}

    def on_fit_end(self, trainer: Trainer) -> None:
        """Leave the averages in the network, and begin anew should it be trained again.

        Where :class:`BestCheckpoint` has put the best ones there, or will, they are what stays.
        """
        self.on_train_epoch_start(trainer)  # a run that was resumed when it was complete has had no epoch
        if not any(isinstance(each, BestCheckpoint) and each.best is not None for each in trainer.callbacks):
            self._write_averages(trainer)
        self._averages, self._tensors, self.updates = {}, {}, 0

    def on_exception(self, trainer: Trainer) -> None:
        """Put the network's own values back where validation was broken off."""
        self.on_train_epoch_end(trainer)

    def _write_averages(self, trainer: Trainer) -> None:
        self._write(trainer, self._averages)
        share_buffers(trainer.accelerator, trainer.model.network)

    def _write(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        reshard(trainer.model.network)
        with torch.no_grad():
            for key, value in values.items():
                self._tensors[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by native name, and how often they were moved; training goes on changing them."""
        return {"updates": self.updates, "averages": {key: whole(value) for key, value in self._averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take averages and count back; the averages go to their device when the next epoch starts."""
        self.updates = int(state["updates"])
        self._averages = {key: value.detach().clone() for key, value in state["averages"].items()}


def _training_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return what has an average, by native name: tensors of stages that train, where an average of them exists."""
    model = trainer.model
    reshard(model.network)
    stages = [stage for stage in model.stages if stage.name not in model.frozen]
    training = {id(tensor) for stage in stages for tensor in (*stage.parameters, *stage.buffers)}
    # Infinities, of attention masks for example, have no difference to move by.
    buffers = ((key, buffer) for key, buffer in model.network.named_buffers() if bool(buffer.isfinite().all()))
    return {
        key: tensor
        for key, tensor in chain(model.network.named_parameters(), buffers)
        if id(tensor) in training and tensor.is_floating_point()
    }
