"""Callbacks of the :class:`~transferkit.Trainer`."""

from transferkit.callbacks._base import HOOKS, Callback
from transferkit.callbacks.checkpointing import BestCheckpoint, EarlyStopping
from transferkit.callbacks.logging import CSVLogger, Progress, TensorBoard, UnfreezeLogger
from transferkit.callbacks.lr_scheduler import LRScheduler

__all__ = [
    "HOOKS",
    "BestCheckpoint",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LRScheduler",
    "Progress",
    "TensorBoard",
    "UnfreezeLogger",
]
