"""Fine-tune any torchvision or timm classifier on your own folder of pictures.

Names are imported when they are first used (PEP 562), so ``import transferkit`` itself is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "activations": ["ActivationCache"],
    "backbones": ["list_models", "model_info"],
    "calibration": ["Calibration"],
    "callbacks": [
        "EMA",
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
    ],
    "checkpoint": ["load_artifact", "save_artifact"],
    "comparison": ["ComparisonInterrupted", "compare"],
    "create": ["adapt", "create_model"],
    "data": ["PictureData", "from_datasets", "image_folder", "loader"],
    "exceptions": [
        "ArtifactError",
        "CallbackError",
        "DataError",
        "ExportError",
        "OutputError",
        "PictureError",
        "SettingError",
        "SplitError",
        "TransferkitError",
        "UnknownModelError",
        "UnknownStageError",
        "WeightsError",
    ],
    "export": ["export_onnx", "export_program"],
    "explain": ["heat_map"],
    "finetuner": ["Finetuner"],
    "freezing": [
        "FreezeFirst",
        "FreezeMatching",
        "FreezePolicy",
        "FreezeUntil",
        "FullFinetune",
        "GradualUnfreezing",
        "LinearProbe",
        "ScheduledUnfreeze",
        "TrainLast",
    ],
    "history": ["EpochRecord", "History"],
    "hub": ["export_hub", "push_to_hub"],
    "interrupts": ["Interrupted"],
    "leaderboard": ["Leaderboard", "LeaderboardRow"],
    "lr_finder": ["LRFinding", "find_lr"],
    "metrics": ["Evaluation"],
    "model": ["Stage", "TrainingOutput", "TransferModel"],
    "optim": ["build_optimizer", "param_groups"],
    "prediction": ["Prediction", "predict", "save_predictions", "stream_predictions"],
    "preprocessing": ["Preprocessing"],
    "schedules": ["Constant", "Cosine", "ExponentialDecay", "OneCycle", "Plateau", "StepDecay"],
    "splitting": ["Split", "split"],
    "trainer": ["Trainer"],
    "transferability": ["h_score", "log_me"],
    "transforms": ["denormalize", "eval_transform", "train_transform"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'transferkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"transferkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


if TYPE_CHECKING:  # the same names, for type checkers and editors
    from transferkit.activations import ActivationCache as ActivationCache
    from transferkit.backbones import list_models as list_models, model_info as model_info
    from transferkit.calibration import Calibration as Calibration
    from transferkit.callbacks import (
        EMA as EMA,
        BestCheckpoint as BestCheckpoint,
        Callback as Callback,
        CSVLogger as CSVLogger,
        EarlyStopping as EarlyStopping,
        LRScheduler as LRScheduler,
        Progress as Progress,
        ResumeCheckpoint as ResumeCheckpoint,
        StepRecorder as StepRecorder,
        Tracker as Tracker,
        UnfreezeLogger as UnfreezeLogger,
    )
    from transferkit.checkpoint import load_artifact as load_artifact, save_artifact as save_artifact
    from transferkit.comparison import ComparisonInterrupted as ComparisonInterrupted, compare as compare
    from transferkit.create import adapt as adapt, create_model as create_model
    from transferkit.data import (
        PictureData as PictureData,
        from_datasets as from_datasets,
        image_folder as image_folder,
        loader as loader,
    )
    from transferkit.exceptions import (
        ArtifactError as ArtifactError,
        CallbackError as CallbackError,
        DataError as DataError,
        ExportError as ExportError,
        OutputError as OutputError,
        PictureError as PictureError,
        SettingError as SettingError,
        SplitError as SplitError,
        TransferkitError as TransferkitError,
        UnknownModelError as UnknownModelError,
        UnknownStageError as UnknownStageError,
        WeightsError as WeightsError,
    )
    from transferkit.explain import heat_map as heat_map
    from transferkit.export import export_onnx as export_onnx, export_program as export_program
    from transferkit.finetuner import Finetuner as Finetuner
    from transferkit.freezing import (
        FreezeFirst as FreezeFirst,
        FreezeMatching as FreezeMatching,
        FreezePolicy as FreezePolicy,
        FreezeUntil as FreezeUntil,
        FullFinetune as FullFinetune,
        GradualUnfreezing as GradualUnfreezing,
        LinearProbe as LinearProbe,
        ScheduledUnfreeze as ScheduledUnfreeze,
        TrainLast as TrainLast,
    )
    from transferkit.history import EpochRecord as EpochRecord, History as History
    from transferkit.hub import export_hub as export_hub, push_to_hub as push_to_hub
    from transferkit.interrupts import Interrupted as Interrupted
    from transferkit.leaderboard import Leaderboard as Leaderboard, LeaderboardRow as LeaderboardRow
    from transferkit.lr_finder import LRFinding as LRFinding, find_lr as find_lr
    from transferkit.metrics import Evaluation as Evaluation
    from transferkit.model import Stage as Stage, TrainingOutput as TrainingOutput, TransferModel as TransferModel
    from transferkit.optim import build_optimizer as build_optimizer, param_groups as param_groups
    from transferkit.prediction import (
        Prediction as Prediction,
        predict as predict,
        save_predictions as save_predictions,
        stream_predictions as stream_predictions,
    )
    from transferkit.preprocessing import Preprocessing as Preprocessing
    from transferkit.schedules import (
        Constant as Constant,
        Cosine as Cosine,
        ExponentialDecay as ExponentialDecay,
        OneCycle as OneCycle,
        Plateau as Plateau,
        StepDecay as StepDecay,
    )
    from transferkit.splitting import Split as Split, split as split
    from transferkit.trainer import Trainer as Trainer
    from transferkit.transferability import h_score as h_score, log_me as log_me
    from transferkit.transforms import (
        denormalize as denormalize,
        eval_transform as eval_transform,
        train_transform as train_transform,
    )
