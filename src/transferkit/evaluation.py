"""Running a model over labelled batches without changing anything about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from transferkit.batches import Inputs, moved

__all__ = ["collect_logits", "keeps_mode"]


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
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Run a model over labelled batches in eval mode; its training mode is left as it was.

    Args:
        model: A classifier that is on ``device``.
        batches: An iterable of (images (B, C, H, W) float, or whatever the model takes, labels (B,) int).
        device: Where to compute.

    Returns:
        Logits (N, num_classes) float32 and labels (N,) int64, on the CPU.
    """
    logits, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    with keeps_mode(model), torch.no_grad():
        model.eval()
        for inputs, targets in batches:
            logits.append(model(moved(inputs, device)).float().cpu())
            labels.append(targets)
    return torch.cat(logits[1:] or logits), torch.cat(labels)
