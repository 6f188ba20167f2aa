"""What is noted of a finished run beside its model: for its report, and for whoever asks later how it came about."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from transferkit.callbacks import BestCheckpoint
from transferkit.evaluation import collect_logits
from transferkit.loading import Batches
from transferkit.sources import PictureData
from transferkit.validation import Judgement, judge

if TYPE_CHECKING:
    from transferkit.settings import Settings
    from transferkit.trainer import Trainer

__all__ = ["judged_pictures", "run_record"]


def run_record(settings: Settings, trainer: Trainer, data: PictureData, *, plan: str, seconds: float) -> dict[str, Any]:
    """Describe a run in JSON values.

    Args:
        settings: Those that were given.
        trainer: After its last epoch.
        data: What it saw.
        plan: Of :func:`transferkit.plan.plan_text`.
        seconds: How long it all took.
    """
    return {
        "settings": settings.settings(),
        "best": trainer.history.best(settings.monitor).to_dict(),
        "seconds": seconds,
        "plan": plan,
        "unfreeze_epochs": [epoch + 1 for epoch in trainer.policy.changes(trainer.model.stage_names, trainer.epochs)],
        "data": {"train": data.train_counts(), "val": data.val_counts()},
        "findings": list(data.findings),
        "environment": {"python": platform.python_version(), "machine": _machine(trainer.device)},
    }


def judged_pictures(trainer: Trainer, val: Batches) -> list[Judgement]:
    """Say what the best weights said of each validation picture; nothing is computed again where that is known.

    Args:
        trainer: After its last epoch; its model has the best weights.
        val: What it was validated on, this process's share.

    Returns:
        One judgement per picture. Where several processes lost a picture on the way nobody knows whose logits are
        whose, so it is empty.
    """
    best = next((each for each in trainer.callbacks if isinstance(each, BestCheckpoint)), None)
    logits, labels = trainer.val_logits if best is None else best.val_logits
    source, lost = val.pictures.source, val.lost or {}
    names = [source.name(index) if hasattr(source, "name") else str(index) for index in range(len(source))]
    processes = trainer.accelerator.num_processes
    order = [index for rank in range(processes) for index in range(rank, len(names), processes)]
    pictures = [names[index] for index in order if names[index] not in lost]
    if len(pictures) != len(labels):
        if processes > 1:
            return []
        # The best epoch lies before a resume, or pictures were lost after it.
        logits, labels = collect_logits(trainer.model.network, val, trainer.device, engine=trainer.engine)
        pictures = [name for index, name in enumerate(names) if index not in val.lost_rows]
    model = trainer.model
    return judge(logits, labels, model.class_names, pictures, temperature=model.temperature)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {os.cpu_count()} cores, {platform.machine()}"
