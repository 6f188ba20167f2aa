"""Callbacks of the :class:`~transferkit.Trainer`."""

from transferkit.callbacks._base import HOOKS, Callback
from transferkit.callbacks.averaging import EMA
from transferkit.callbacks.checkpointing import BestCheckpoint, EarlyStopping
from transferkit.callbacks.logging import CSVLogger, Progress, TensorBoard, UnfreezeLogger
from transferkit.callbacks.lr_scheduler import LRScheduler
from transferkit.callbacks.recording import StepRecorder
from transferkit.callbacks.resuming import ResumeCheckpoint

__all__ = [
    "EMA",
    "HOOKS",
    "BestCheckpoint",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LRScheduler",
    "Progress",
    "ResumeCheckpoint",
    "StepRecorder",
    "TensorBoard",
    "UnfreezeLogger",
]
