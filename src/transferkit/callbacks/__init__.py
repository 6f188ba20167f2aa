"""Callbacks of the :class:`~transferkit.Trainer`."""

from transferkit.callbacks._base import HOOKS, Callback
from transferkit.callbacks.averaging import EMA
from transferkit.callbacks.checkpointing import BestCheckpoint, EarlyStopping
from transferkit.callbacks.logging import CSVLogger, Progress, UnfreezeLogger
from transferkit.callbacks.lr_scheduler import LRScheduler
from transferkit.callbacks.recording import StepRecorder
from transferkit.callbacks.resuming import ResumeCheckpoint
from transferkit.callbacks.tracking import Tracker

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
    "Tracker",
    "UnfreezeLogger",
]
