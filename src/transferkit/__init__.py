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
    "callbacks": [
        "EMA",
        "BestCheckpoint",
        "CSVLogger",
        "Callback",
        "EarlyStopping",
        "LRScheduler",
        "Progress",
        "ResumeCheckpoint",
        "TensorBoard",
        "UnfreezeLogger",
    ],
    "checkpoint": ["load_artifact", "save_artifact"],
    "create": ["adapt", "create_model"],
    "data": ["PictureData", "from_datasets", "image_folder", "loader"],
    "exceptions": [
        "ArtifactError",
        "DataError",
        "OutputError",
        "PictureError",
        "SettingError",
        "SplitError",
        "TransferkitError",
        "UnknownModelError",
        "UnknownStageError",
        "WeightsError",
    ],
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
    "interrupts": ["Interrupted"],
    "lr_finder": ["LRFinding", "find_lr"],
    "metrics": ["Evaluation"],
    "model": ["Stage", "TrainingOutput", "TransferModel"],
    "optim": ["build_optimizer", "param_groups"],
    "prediction": ["Prediction", "predict"],
    "preprocessing": ["Preprocessing"],
    "schedules": ["Constant", "Cosine", "ExponentialDecay", "OneCycle", "Plateau", "StepDecay"],
    "splitting": ["Split", "split"],
    "trainer": ["Trainer"],
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
    from transferkit.callbacks import (
        EMA as EMA,
        BestCheckpoint as BestCheckpoint,
        Callback as Callback,
        CSVLogger as CSVLogger,
        EarlyStopping as EarlyStopping,
        LRScheduler as LRScheduler,
        Progress as Progress,
        ResumeCheckpoint as ResumeCheckpoint,
        TensorBoard as TensorBoard,
        UnfreezeLogger as UnfreezeLogger,
    )
    from transferkit.checkpoint import load_artifact as load_artifact, save_artifact as save_artifact
    from transferkit.create import adapt as adapt, create_model as create_model
    from transferkit.data import (
        PictureData as PictureData,
        from_datasets as from_datasets,
        image_folder as image_folder,
        loader as loader,
    )
    from transferkit.exceptions import (
        ArtifactError as ArtifactError,
        DataError as DataError,
        OutputError as OutputError,
        PictureError as PictureError,
        SettingError as SettingError,
        SplitError as SplitError,
        TransferkitError as TransferkitError,
        UnknownModelError as UnknownModelError,
        UnknownStageError as UnknownStageError,
        WeightsError as WeightsError,
    )
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
    from transferkit.interrupts import Interrupted as Interrupted
    from transferkit.lr_finder import LRFinding as LRFinding, find_lr as find_lr
    from transferkit.metrics import Evaluation as Evaluation
    from transferkit.model import Stage as Stage, TrainingOutput as TrainingOutput, TransferModel as TransferModel
    from transferkit.optim import build_optimizer as build_optimizer, param_groups as param_groups
    from transferkit.prediction import Prediction as Prediction, predict as predict
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
    from transferkit.transforms import (
        denormalize as denormalize,
        eval_transform as eval_transform,
        train_transform as train_transform,
    )
