"""A learning rate to begin with, found by trying them all on a copy (the learning rate range test)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transferkit.devices import choose_device
from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.freezing import FreezePolicy
from transferkit.model import TransferModel
from transferkit.randomness import keeps_generators, seed_generators
from transferkit.ranges import MOST_EPOCHS, check_number, check_seed, check_whole_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HIGHEST", "LOWEST", "STEPS", "LRFinding", "check_sweep", "find_lr"]

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
"""What :func:`find_lr` tries unless told otherwise: rates of the head from one to the other, in so many steps."""

_FEWEST_STEPS = 10
_WORST = 4.0  # times the best smoothed loss
_CLEAR = 1.5  # times the batches' spread; pure noise falls further once in a hundred tests


@dataclass(frozen=True)
class LRFinding:
    """What a learning rate range test saw, and the rate it suggests.

    Attributes:
        lrs: Learning rate of the head at each step, growing by one factor.
        losses: Loss of each step's batch, before that step changed the weights.
        smoothed: The losses, each averaged with those of the tenth of all steps before and after it.
        suggestion: The rate of ``lrs`` where the smoothed loss falls most steeply.

    Example:
        >>> finding = LRFinding((0.01, 0.1, 1.0), (2.0, 1.0, 3.0), (1.8, 1.4, 2.2), suggestion=0.1)
        >>> finding.plot().axes[0].get_title(loc="right")
        'suggested lr 0.1'
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the loss over the learning rate, the suggestion marked.

        Args:
            path: File to write as well, ``.png``, ``.svg`` or ``.pdf``; ``None`` writes none.

        Returns:
            A figure of one panel, 6 × 3.8 inches.

        Raises:
            SettingError: The extension is none of the three.
            OutputError: The file cannot be written.
        """
        from transferkit.plots import plot_lr_finding, save_figure

        figure = plot_lr_finding(self.lrs, self.losses, self.smoothed, suggestion=self.suggestion)
        if path is not None:
            save_figure(figure, path)
        return figure


def find_lr(
    model: TransferModel,
    optimizer: torch.optim.Optimizer,
    train_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    policy: FreezePolicy | None = None,
    loss_function: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
    seed: int = 0,
    device: str | None = None,
) -> LRFinding:
    """Train a copy for some steps, each at a higher learning rate, and suggest the rate to train with.

    The learning rate of the head grows from ``lowest`` to ``highest`` by one factor per step; all other groups keep
    their ratio to it (layer-wise decay). The test ends early when the smoothed loss is more than 4 times its best, or
    no number; that step is left out. It trains in float32, without mixing or accumulation.

    The suggestion is where the smoothed loss falls most steeply. The minimum is at a higher rate, but already on the
    edge of what diverges. The smoothing looks both ways: an average of the past alone, as it is often used, lags behind
    and so suggests too high a rate.

    Model and optimizer are copied, so memory must hold both twice. Those that are given stay as they are, bit by bit,
    and so do the generators of Python, numpy and torch and the epoch and generator of the batches, also after an
    error. Step hooks of the optimizer are not copied.

    Args:
        model: What is to be trained. Its frozen stages stay frozen.
        optimizer: Any torch optimizer that holds the head; its state is the one that the test begins with.
        train_batches: An iterable of (images (B, C, H, W) float, labels (B,) int) that can be gone through again and
            again, :func:`loader` for example; where its sampler has ``set_epoch``, each round is an epoch.
        policy: Decides which stages are frozen, as before epoch 0; ``None`` for those that are frozen now.
        loss_function: From (logits, labels) to a scalar, as for :meth:`TransferModel.loss`; an
            ``nn.CrossEntropyLoss`` brings class weights and label smoothing.
        lowest: First learning rate of the head; above 0.
        highest: Last learning rate of the head; above ``lowest``.
        steps: Number of optimizer steps, 10 or more; one batch each.
        seed: Dropout and stochastic depth are functions of (seed, step).
        device: ``"cpu"``, ``"cuda"`` …; ``None`` for the best there is.

    Returns:
        Rates, losses and the suggestion, which is a learning rate of the head.

    Raises:
        SettingError: A value is outside its range; the optimizer has no lr above 0 for the head; everything is frozen;
            or the loss never fell clearly further than it differs between batches, so that no rate can be suggested.
        DataError: There are no batches, or they can be gone through only once.
        UnknownStageError: The policy names a stage that the model does not have.
        TransferkitError: The loss of the first batch is no number.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", §3.3; the steepest point is fastai's
    ``steep``.

    Example:
        >>> from transferkit.create import adapt
        >>> from transferkit.optim import build_optimizer, param_groups
        >>> from transferkit.preprocessing import Preprocessing
        >>> with keeps_generators():
        ...     seed_generators(0)
        ...     network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        ...     model = adapt(network, num_classes=2, preprocessing=Preprocessing(4, 4))
        ...     images = torch.randn(16, 3, 4, 4)
        >>> batches = [(images, (images.mean((1, 2, 3)) > 0).long())]
        >>> finding = find_lr(model, build_optimizer("sgd", param_groups(model, lr=1.0)), batches, device="cpu")
        >>> 1e-3 < finding.suggestion < 1
        True
    """
    check_sweep(lowest=lowest, highest=highest, steps=steps)
    check_seed(seed)
    factors = np.geomspace(lowest, highest, steps) / _head_lr(model, optimizer)
    chosen = choose_device(device)
    # Copied as one, so that the new optimizer holds the new parameters.
    model, optimizer, loss_function = copy.deepcopy((model, optimizer, loss_function))
    if policy is not None:
        model.freeze(policy.frozen_stages(model.stage_names, 0))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingError("every stage is frozen, so no learning rate can be found; leave the head free to train")
    _move(model, optimizer, loss_function, chosen)
    model.train()
    with _left_as_they_are(train_batches), keeps_generators():
        seed_generators(seed)  # what the first batch draws
        losses = _sweep(model, optimizer, train_batches, factors.tolist(), loss_function, seed=seed, device=chosen)
    return _finding(np.geomspace(lowest, highest, steps), losses)


def check_sweep(*, lowest: float = LOWEST, highest: float = HIGHEST, steps: int = STEPS) -> None:
    """Raise ``SettingError`` unless these settings of :func:`find_lr` are within their ranges."""
    check_number("lowest", lowest, above=0)
    check_number("highest", highest, above=0)
    if not lowest < highest:
        raise SettingError(f"lowest={lowest} must be below highest={highest}")
    check_whole_number("steps", steps, at_least=_FEWEST_STEPS, at_most=MOST_EPOCHS)


def _head_lr(model: TransferModel, optimizer: torch.optim.Optimizer) -> float:
    head = {id(parameter) for parameter in model.stages[-1].parameters}
    groups = [group for group in optimizer.param_groups if any(id(each) in head for each in group["params"])]
    if not groups or not groups[0]["lr"] > 0:
        raise SettingError(
            "the optimizer has no parameter of the head, or lr 0 for it; give it param_groups(model, lr=…), whose "
            "ratios the test keeps"
        )
    return float(groups[0]["lr"])


def _move(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_function: Callable[..., Tensor], device: torch.device
) -> None:
    if next(model.parameters()).device != device:
        model.to(device)
        optimizer.load_state_dict(optimizer.state_dict())  # torch puts each tensor where its parameter is
    if isinstance(loss_function, nn.Module):
        loss_function.to(device)


def _sweep(
    model: TransferModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    factors: Sequence[float],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    device: torch.device,
) -> list[float]:
    """Take one step per factor of the groups' own rates; returns the losses, until they explode."""
    losses: list[float] = []
    base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
    with closing(_rounds(batches)) as endless:
        for step, (factor, (images, labels)) in enumerate(zip(factors, endless, strict=False)):
            seed_generators(seed, step)
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * factor
            optimizer.zero_grad()
            loss = model.loss(model(images.to(device)), labels.to(device), loss_function)
            value = loss.item()
            if not math.isfinite(value) or _exploded([*losses, value], len(factors)):
                break
            losses.append(value)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return losses


def _exploded(losses: Sequence[float], steps: int) -> bool:
    smoothed = _smoothed(losses, steps)
    return bool(smoothed[-1] > _WORST * smoothed.min())


def _rounds(batches: Iterable[tuple[Tensor, Tensor]]) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Go through the batches again and again, each round as another epoch."""
    set_epoch = getattr(getattr(batches, "sampler", None), "set_epoch", None)
    for epoch in count():
        if set_epoch is not None:
            set_epoch(epoch)
        empty = True
        for images, labels in batches:
            empty = False
            yield images, labels
        if empty:
            raise DataError(
                "there are no batches to find a learning rate with; give a loader or a list that holds some and can "
                "be gone through again"
            )


@contextmanager
def _left_as_they_are(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put back what orders the batches: their sampler's epoch, and the generators of both."""
    sampler = getattr(batches, "sampler", None)
    attributes = dict(getattr(sampler, "__dict__", {}))
    generators = [getattr(each, "generator", None) for each in (batches, sampler)]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        if attributes:
            vars(sampler).update(attributes)
        for generator, state in states:
            generator.set_state(state)


def _smoothed(losses: Sequence[float], steps: int) -> NDArray[np.float64]:
    """Average each loss with those a tenth of all steps before and after it, the nearest counting most."""
    reach = max(1, steps // 10)
    kernel = np.hanning(2 * reach + 3)[1:-1]
    inside = slice(reach, reach + len(losses))
    averaged: NDArray[np.float64] = (
        np.convolve(losses, kernel)[inside] / np.convolve(np.ones(len(losses)), kernel)[inside]
    )
    return averaged


def _finding(lrs: NDArray[np.float64], losses: Sequence[float]) -> LRFinding:
    """Suggest the rate of the steepest descent; raises SettingError where there is none."""
    if not losses:
        raise TransferkitError(
            "the loss of the first batch is no number, whatever the learning rate; see what is in it"
        )
    steps, lrs = len(lrs), lrs[: len(losses)]
    smoothed = _smoothed(losses, steps)
    best = int(smoothed.argmin())
    spread = float(np.std(losses[: best + 1] - smoothed[: best + 1]))
    if smoothed[0] - smoothed[best] <= _CLEAR * spread:
        advice = "a higher highest" if len(losses) == steps else "a lower lowest"
        raise SettingError(
            f"no learning rate from {lrs[0]:.2g} to {lrs[-1]:.2g} lowers the loss, {smoothed[0]:.3g} at first and "
            f"{smoothed[best]:.3g} at best, clearly further than batches differ; give {advice}, more steps or larger "
            "batches, and see that the labels fit the pictures"
        )
    # The rates grow by one factor, so the slope over their logarithm is that over the steps.
    steepest = int(np.gradient(smoothed[: best + 1]).argmin())
    return LRFinding(tuple(lrs.tolist()), tuple(losses), tuple(smoothed.tolist()), float(lrs[steepest]))
