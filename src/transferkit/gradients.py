"""The gradients of one optimizer step, added up over its batches, and over pieces of them where memory is short."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.batches import Inputs, cut_up, moved
from transferkit.distribution import whole
from transferkit.exceptions import TransferkitError
from transferkit.fusing import Fusion, find_fusions, fused
from transferkit.model import TransferModel
from transferkit.randomness import seed_generators

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FiniteCheck", "Gradients", "Step", "Window"]

logger = logging.getLogger("transferkit")

Window = Sequence[tuple[Inputs, Tensor]]
"""The batches (images (B, C, H, W) or kept activations, labels (B,)) of one optimizer step in this process."""


@dataclass(frozen=True)
class Step:
    """What the batches of one optimizer step have in common; :meth:`Gradients.begin` makes it.

    Attributes:
        accelerator: Device, precision and processes.
        wrapped: The model as it was prepared for them.
        window: The step's batches in this process.
        weight: What the means of its pieces are divided by: its pictures, or their class weights, in all processes.
        seeds: What each batch's random numbers are a function of.
        statistics: The running statistics before the step, to which one that is begun again returns.
    """

    accelerator: Accelerator
    wrapped: nn.Module
    window: Window
    weight: Tensor
    seeds: Sequence[Sequence[int]]
    statistics: Sequence[Tensor]


class Gradients:
    """Forward, loss and backward for the batches of an optimizer step.

    The loss of a step is one mean over its pictures, of all its batches in all processes, weighed by class where there
    are class weights. When memory runs out, batches are computed in halves, quarters …, whose gradients add up to the
    same; only batch norms in training notice.

    Args:
        model: What is trained.
        loss_function: From (logits, targets) to a mean; a ``CrossEntropyLoss``.
        mix: Mixes a batch's pictures and labels, or ``None``.

    Attributes:
        micro_batch: Pictures computed at a time since memory ran out, else ``None``.
    """

    def __init__(
        self, model: TransferModel, loss_function: nn.CrossEntropyLoss, mix: Callable[..., Any] | None
    ) -> None:
        """Store the pieces."""
        self.model, self.loss_function, self.mix = model, loss_function, mix
        self.micro_batch: int | None = None
        self._norms = [each for each in model.network.modules() if isinstance(each, _BatchNorm)]
        self._to_fuse: nn.Module | None = None
        self._fusions: list[Fusion] = []

    def fuse(self, module: nn.Module | None) -> None:
        """Compute from the next batch on with the fusions (:func:`find_fusions`) of what is trained.

        Args:
            module: It, not wrapped; ``None`` for computing as it is.
        """
        self._to_fuse, self._fusions = module, []

    def begin(
        self, accelerator: Accelerator, wrapped: nn.Module, window: Window, *, seeds: Sequence[Sequence[int]]
    ) -> Step:
        """Begin a step; every process must.

        Args:
            accelerator: Device, precision and processes.
            wrapped: The model as it was prepared for them.
            window: The step's batches.
            seeds: What each batch's random numbers are a function of.
        """
        weight = sum(self._weight_of(labels, accelerator.device) for _, labels in window)
        statistics = [each.clone() for each in self._statistics()]
        return Step(accelerator, wrapped, window, accelerator.reduce(weight), seeds, statistics)

    def add(self, step: Step, position: int) -> Tensor:
        """Add the gradients of one batch of a step to those of the batches before it.

        Args:
            step: From :meth:`begin`.
            position: Which of its batches.

        Returns:
            The sum of the batch's losses, and of what they weigh, (2,) float.

        Raises:
            TransferkitError: Not even one picture fits into memory.
        """
        try:
            return self._add(step, position)
        except RuntimeError as error:
            # Processes would have to fail together; a single one leaves the others waiting for its gradients.
            if step.accelerator.num_processes > 1 or not should_reduce_batch_size(error):
                raise
        # Outside of the except block, so that nothing holds on to the memory of the failed attempt.
        return self._add_smaller(step, position)

    def _add(self, step: Step, position: int) -> Tensor:
        accelerator = step.accelerator
        seed_generators(*step.seeds[position])
        inputs, labels = step.window[position]
        inputs, labels = moved(inputs, accelerator.device), labels.to(accelerator.device, non_blocking=True)
        targets = labels
        if self.mix is not None:
            inputs, targets = self.mix(inputs, labels)
        size = self.micro_batch or len(labels)
        pieces = list(zip(cut_up(inputs, size), torch.split(targets, size), torch.split(labels, size), strict=True))
        sums = torch.zeros(2, device=accelerator.device)
        if self._to_fuse is not None:
            self._fusions = find_fusions(self._to_fuse, cut_up(inputs, 2)[0])
            self._to_fuse = None
        for number, (some_inputs, some_targets, some_labels) in enumerate(pieces, 1):
            last = position + 1 == len(step.window) and number == len(pieces)
            synchronised = _synchronised(accelerator, self.model.network, step.wrapped, last)
            with synchronised, accelerator.autocast(), fused(self._fusions):
                loss = self.model.loss(step.wrapped(some_inputs), some_targets, self.loss_function)
                part = self._weight_of(some_labels, accelerator.device)
                # Gradients are averaged over the processes; the loss is a mean over the pictures in all of them.
                accelerator.backward(loss * (accelerator.num_processes * part / step.weight))
            sums += torch.stack([loss.detach() * part, part])
        return sums

    def _add_smaller(self, step: Step, position: int) -> Tensor:
        """Do the step's batches so far again in smaller pieces."""
        largest = size = self.micro_batch or max(len(labels) for _, labels in step.window)

        def halved() -> int:
            nonlocal size
            size //= 2
            return size

        def attempt(size: int) -> Tensor:
            self.micro_batch = size
            for buffer, value in zip(self._statistics(), step.statistics, strict=True):
                buffer.copy_(value)
            for parameter in self.model.parameters():
                parameter.grad = None
            return [self._add(step, each) for each in range(position + 1)][-1]

        again = find_executable_batch_size(attempt, starting_batch_size=halved(), reduce_batch_size_fn=halved)
        try:
            sums = cast(Tensor, again())
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise TransferkitError(
                f"not even one picture fits into the memory of {step.accelerator.device}; choose a smaller image_size "
                "or network"
            ) from None
        logger.warning(
            "out of memory: batches of %d pictures are now computed %d at a time, and their gradients added up, so a "
            "step still sees %d pictures%s",
            largest,
            self.micro_batch,
            sum(len(labels) for _, labels in step.window),
            "; batch norms in training see the smaller ones" if step.statistics else "",
        )
        return sums

    def _statistics(self) -> list[Tensor]:
        """Return the running statistics that a forward pass in training changes."""
        return [buffer for norm in self._norms if norm.training for buffer in norm.buffers(recurse=False)]

    def _weight_of(self, labels: Tensor, device: torch.device) -> Tensor:
        weights = self.loss_function.weight
        if weights is None or self.mix is not None:  # torch weighs mixed targets too, but divides by their number
            return torch.full((), float(len(labels)), device=device)  # no copy that a GPU would be waited for
        return weights[labels.to(device)].sum()


class FiniteCheck:
    """Ends a run whose loss or gradient is no number any more, before that is saved.

    On a CPU it asks after every step, before the optimizer acts. A GPU would have to wait for the answer each time, so
    there several steps are asked for at once, and before every validation and checkpoint.

    Example:
        >>> check = FiniteCheck(every=1)
        >>> check.note(torch.tensor(0.7), torch.tensor(math.inf), "step 3 of epoch 1 at lr 2", lambda: "a.jpg, b.jpg")
        Traceback (most recent call last):
        transferkit.exceptions.TransferkitError: the gradient is no longer a number in step 3 ...
    """

    def __init__(self, *, every: int) -> None:
        """Store the pace.

        Args:
            every: Steps between two questions, 1 or more.
        """
        self.every = every
        self._noted: list[tuple[Tensor, str, Callable[[], str]]] = []

    def note(self, loss: Tensor, norm: Tensor, where: str, names: Callable[[], str]) -> None:
        """Remember a step.

        Args:
            loss: A scalar.
            norm: Of the gradient, a scalar.
            where: The step, in words.
            names: Names its pictures.

        Raises:
            TransferkitError: One of the steps noted so far had no number.
        """
        self._noted.append((torch.stack([loss.detach(), whole(norm).to(loss.device)]), where, names))
        if len(self._noted) >= self.every:
            self.ask()

    def ask(self) -> None:
        """Raise ``TransferkitError`` for the first step noted whose loss or gradient is no number."""
        for numbers, where, names in self._noted:
            if not bool(numbers.isfinite().all()):
                what = "gradient" if math.isfinite(numbers[0]) else "training loss"
                raise TransferkitError(
                    f"the {what} is no longer a number in {where}, whose pictures are {names()}; lower lr or set "
                    "clip_grad_norm, and look at these pictures"
                )
        self.clear()

    def clear(self) -> None:
        """Forget the steps noted so far."""
        self._noted.clear()


def _synchronised(
    accelerator: Accelerator, network: nn.Module, wrapped: nn.Module, last: bool
) -> AbstractContextManager[Any]:
    """Let processes exchange gradients in the last pass of a step only."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else cast(AbstractContextManager[Any], accelerator.no_sync(wrapped))
