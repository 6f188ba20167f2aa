"""Running a model over labelled batches without changing anything about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.batches import Inputs, moved
from transferkit.inference import fast_forward
from transferkit.randomness import keeps_generators

__all__ = ["collect_logits", "is_worth_preparing", "keeps_mode", "logits_by_batch", "undisturbed"]

_WORTH = 64 * 224 * 224  # pixels


@contextmanager
def keeps_mode(model: nn.Module) -> Iterator[None]:
    """Put every module back into the training or eval mode it was in.

    What is frozen meanwhile stays in eval mode; what was frozen and is free again gets the mode of the model.
    """
    modes = [(module, (model if _is_frozen(module) else module).training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode and not _is_frozen(module)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a block without gradients, then put modes, buffers and random generators back.

    Args:
        module: Whatever the block runs, in whatever mode.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     moved = norm(torch.rand(3, 2)).mean(), norm.running_mean.clone()
        >>> torch.equal(moved[1], norm.running_mean), norm.running_mean
        (False, tensor([0., 0.]))
    """
    modes = {each: each.training for each in module.modules()}
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with keeps_generators(), torch.no_grad():
        try:
            yield
        finally:
            for each, mode in modes.items():
                each.training = mode
            for buffer, value in values:
                buffer.copy_(value)


def _is_frozen(module: nn.Module) -> bool:
    return "train" in module.__dict__  # what TransferModel.freeze puts there


def collect_logits(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    device: torch.device,
    *,
    engine: str = "eager",
    before_batch: Callable[[], object] | None = None,
    views: Callable[[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a model over labelled batches in eval mode; its training mode is left as it was.

    Args:
        model: A classifier that is on ``device``.
        batches: An iterable of (images (B, C, H, W) float, or whatever the model takes, labels (B,) int). Where their
            number is known and they are worth the preparation, :func:`fast_forward` computes them.
        device: Where to compute.
        engine: What computes then, one of :data:`~transferkit.inference.ENGINES`.
        before_batch: Called before each batch is computed.
        views: Of :func:`~transferkit.tta.tta_views`, to look at each picture several times; ``None`` for once.

    Returns:
        Logits (N, num_classes) float32 and labels (N,) int64, on the CPU. With ``views`` they are the logarithms of the
        mean probabilities.

    Raises:
        SettingError: The engine does not exist, is not installed, or cannot compute this model.
    """
    classify = _Classifier(model, batches, device, engine, views)
    logits, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    with keeps_mode(model):
        model.eval()
        for inputs, targets in batches:
            if before_batch is not None:
                before_batch()
            logits.append(classify(inputs))
            labels.append(targets.cpu())
    return torch.cat(logits[1:] or logits), torch.cat(labels)


def logits_by_batch(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    device: torch.device,
    *,
    engine: str = "eager",
    views: Callable[[Tensor], list[Tensor]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Do the same batch by batch, and keep nothing; between two batches the model is in its own training mode.

    Args:
        model: As for :func:`collect_logits`, and so are all others.
        batches: A loader with workers reads the next batches meanwhile.
        device: Where to compute.
        engine: What computes.
        views: To look at each picture several times.

    Yields:
        Logits (B, num_classes) float32 and labels (B,) int64, on the CPU.

    Raises:
        SettingError: The engine does not exist, is not installed, or cannot compute this model.

    Example:
        >>> pictures = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
        >>> [logits.shape for logits, _ in logits_by_batch(nn.Linear(3, 2), pictures, torch.device("cpu"))]
        [torch.Size([2, 2])]
    """
    classify = _Classifier(model, batches, device, engine, views)
    for inputs, targets in batches:
        with keeps_mode(model):
            model.eval()
            logits = classify(inputs)
        yield logits, targets.cpu()


class _Classifier:
    """From the inputs of one batch after the other to logits (B, num_classes) float32 on the CPU.

    The model is in eval mode. Where there is enough to compute, the first batch prepares for those that follow.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Inputs, Tensor]],
        device: torch.device,
        engine: str,
        views: Callable[[Tensor], list[Tensor]] | None,
    ) -> None:
        self.model, self.batches, self.device, self.engine, self.views = model, batches, device, engine, views
        self.forward: Callable[[Any], Any] | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            inputs = moved(inputs, self.device)
            looks: Sequence[Inputs] = [inputs]
            if self.views is not None and isinstance(inputs, Tensor):
                looks = self.views(inputs)
            if self.forward is None:
                self.forward = self._prepared(looks[0])
            given = [self.forward(each).float() for each in looks]
            return (given[0] if len(given) == 1 else _averaged(given)).cpu()

    def _prepared(self, inputs: Inputs) -> Callable[[Any], Any]:
        if isinstance(inputs, Tensor) and is_worth_preparing(self.batches, inputs):
            return fast_forward(self.model, inputs, engine=self.engine)
        return self.model


def _averaged(logits: list[Tensor]) -> Tensor:
    """Return the logarithms of the mean probabilities."""
    shares = torch.stack([torch.log_softmax(each, 1) for each in logits])
    return torch.logsumexp(shares, 0) - math.log(len(logits))


def is_worth_preparing(batches: Any, images: Tensor) -> bool:
    """Whether there is so much to compute that :func:`fast_forward` soon makes up for its preparation.

    Args:
        batches: Of which there is a number, or not.
        images: The first of them, (B, C, H, W).

    Example:
        >>> [is_worth_preparing(range(count), torch.empty(16, 3, 224, 224)) for count in (2, 20)]
        [False, True]
    """
    return hasattr(batches, "__len__") and len(batches) * images.numel() >= _WORTH * images.shape[1]
