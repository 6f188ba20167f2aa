"""Running a model over labelled batches without changing anything about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transferkit.batches import Inputs, moved
from transferkit.inference import fast_forward

__all__ = ["collect_logits", "is_worth_preparing", "keeps_mode"]

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


def _is_frozen(module: nn.Module) -> bool:
    return "train" in module.__dict__  # what TransferModel.freeze puts there


def collect_logits(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    device: torch.device,
    *,
    engine: str = "eager",
    before_batch: Callable[[], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a model over labelled batches in eval mode; its training mode is left as it was.

    Args:
        model: A classifier that is on ``device``.
        batches: An iterable of (images (B, C, H, W) float, or whatever the model takes, labels (B,) int). Where their
            number is known and they are worth the preparation, :func:`fast_forward` computes them.
        device: Where to compute.
        engine: What computes then, one of :data:`~transferkit.inference.ENGINES`.
        before_batch: Called before each batch is computed.

    Returns:
        Logits (N, num_classes) float32 and labels (N,) int64, on the CPU.

    Raises:
        SettingError: The engine does not exist, is not installed, or cannot compute this model.
    """
    logits, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    forward: Callable[[Any], Any] = model
    with keeps_mode(model), torch.no_grad():
        model.eval()
        for inputs, targets in batches:
            if before_batch is not None:
                before_batch()
            inputs = moved(inputs, device)
            if len(logits) == 1 and isinstance(inputs, Tensor) and is_worth_preparing(batches, inputs):
                forward = fast_forward(model, inputs, engine=engine)
            logits.append(forward(inputs).float().cpu())
            labels.append(targets.cpu())
    return torch.cat(logits[1:] or logits), torch.cat(labels)


def is_worth_preparing(batches: Any, images: Tensor) -> bool:
    """Whether there is so much to compute that :func:`fast_forward` soon makes up for the second it takes.

    Args:
        batches: Of which there is a number, or not.
        images: The first of them, (B, C, H, W).

    Example:
        >>> [is_worth_preparing(range(count), torch.empty(16, 3, 224, 224)) for count in (2, 20)]
        [False, True]
    """
    return hasattr(batches, "__len__") and len(batches) * images.numel() >= _WORTH * images.shape[1]
