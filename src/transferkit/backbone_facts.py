"""What is known of a backbone before it is trained: size, cost, speed of the frozen pass, licence, and its features."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transferkit.backbones import model_info, resolve_name
from transferkit.batches import moved
from transferkit.devices import make_accelerator
from transferkit.exceptions import WeightsError
from transferkit.finetuner import Finetuner
from transferkit.freezing import LinearProbe
from transferkit.model import TransferModel
from transferkit.pieces import build_model, make_loader
from transferkit.sources import PictureData
from transferkit.transforms import eval_transform

__all__ = ["BackboneFacts", "Look", "count_macs", "licence_of", "look_at", "peak_memory"]

# What the scores are computed from; more pictures change their first digits no more.
_MOST_SCORED = 10_000


@dataclass(frozen=True)
class BackboneFacts:
    """What is known of a backbone on some data, whatever the seed; of random weights, on the first one.

    Attributes:
        weights: What was loaded, in words; ``None`` for random weights.
        licence: Of the weights, ``"not stated"`` where it is not known; ``None`` for random ones.
        image_size: Side of its input in pixels.
        parameters: Scalars in its parameters, the new head's included.
        macs: Multiply-accumulates for one picture, as :func:`count_macs` counts them.
        pictures_per_second: Of the frozen pass, decoding included; ``None`` where it was over after one batch, or
            nothing was kept.
        peak_memory: Bytes; of a GPU what its tensors took, else what the process took, Python and libraries included.
            ``None`` where it had no process of its own.
        log_me: :func:`~transferkit.transferability.log_me` of its features, before training.
        h_score: :func:`~transferkit.transferability.h_score` of its features, the regularised one.
    """

    weights: str | None
    licence: str | None
    image_size: int
    parameters: int
    macs: int
    pictures_per_second: float | None
    peak_memory: int | None
    log_me: float
    h_score: float


class Look(NamedTuple):
    """A backbone before training.

    Attributes:
        facts: Those of :class:`BackboneFacts` that are known then, by name.
        features: (N, D) float32, what the head receives of the training pictures; 10,000 of them at most.
        labels: (N,) int64.
    """

    facts: Mapping[str, Any]
    features: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


def look_at(tuner: Finetuner, data: PictureData) -> Look:
    """Run the frozen pass of a backbone over the training pictures; what it gives is kept in ``cache_dir``.

    Args:
        tuner: Its settings decide how the network is built and where it runs; a module of your own gets a new head.
        data: Its training pictures are seen as in validation, without augmentation.

    Raises:
        TransferkitError: Whatever keeps :meth:`Finetuner.fit` from beginning.
    """
    accelerator = make_accelerator(tuner.device, tuner.precision)
    model = build_model(tuner, data).to(accelerator.device)
    preprocessing = model.preprocessing
    facts = {
        "weights": model.weights,
        "licence": licence_of(tuner.backbone, tuner.weights),
        "image_size": preprocessing.size,
        "parameters": sum(each.numel() for each in model.network.parameters()),
        "macs": count_macs(model),
    }
    model.freeze(LinearProbe().frozen_stages(model.stage_names, 0))
    transform = eval_transform(tuner.eval_preset, preprocessing)
    train, val = (
        make_loader(
            tuner,
            source,
            transform,
            train=False,
            channels=preprocessing.channels,
            device=accelerator.device,
            lost={} if tuner.on_bad_image == "skip" else None,
        )
        for source in (data.train, data.val)
    )
    activations = tuner.activation_cache
    done: list[float] = []
    phase = activations.phase(
        model,
        train,
        val,
        accelerator=accelerator,
        epochs=tuner.epochs,
        each_batch=lambda *_: done.append(time.perf_counter()),
        engine=tuner.engine,
    )
    try:
        features, labels = _head_inputs(
            model, phase.network, phase.train_batches, every=-(-len(data.train) // _MOST_SCORED)
        )
    finally:
        activations.close()
    # The first batch waits for what is prepared once.
    speed = (len(data.train) - tuner.batch_size) / (done[-1] - done[0]) if len(done) > 1 else None
    return Look({**facts, "pictures_per_second": speed}, features, labels)


def _head_inputs(
    model: TransferModel, network: nn.Module, batches: Any, *, every: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return what :meth:`TransferModel.features` gives for every so many pictures, and their labels."""
    device = next(model.parameters()).device
    vectors, labels, seen = [], [], 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches:
            mine = slice(-seen % every, None, every)
            vectors.append(model.features(moved(inputs, device), network=network)[mine].float().cpu())
            labels.append(targets[mine].cpu())
            seen += len(targets)
    return torch.cat(vectors).numpy(), torch.cat(labels).numpy()


def count_macs(model: TransferModel) -> int:
    """Count the multiply-accumulates of one picture: convolutions, matrix products and attention; nothing else counts.

    Args:
        model: One made picture of its input size is run through it, in eval mode.

    Source: half of what ``torch.utils.flop_counter`` counts.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=32)
        >>> head = model.num_features * 2
        >>> count_macs(model) > 100 * head
        True
    """
    side, channels = model.preprocessing.size, model.preprocessing.channels
    images = torch.zeros(1, channels, side, side, device=next(model.parameters()).device)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.network(images)
    return int(counted.get_total_flops()) // 2


def licence_of(backbone: str | nn.Module, weights: str | os.PathLike[str] | None) -> str | None:
    """Return the licence of a backbone's weights, as timm states it; torchvision states none.

    Args:
        backbone: As for :class:`Finetuner`.
        weights: The same.

    Returns:
        ``"not stated"`` where it is not known; ``None`` for random weights, which need none.

    Example:
        >>> licence_of("timm/mobilenetv2_050", "default"), licence_of("timm/mobilenetv2_050", "own.pth")
        ('apache-2.0', 'not stated')
    """
    if weights is None:
        return None
    if weights == "bundled":
        return "apache-2.0"
    licence = None
    if isinstance(backbone, str) and isinstance(weights, str):
        library, architecture = resolve_name(backbone)
        if library == "timm" and weights != "default":
            architecture = f"{architecture.partition('.')[0]}.{weights}"
        if library == "timm" or weights == "default":
            with suppress(WeightsError):  # a path is no tag
                licence = model_info(f"{library}/{architecture}").licence
    return licence or "not stated"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use at a time: of a GPU this process's tensors, else all of this process.

    Args:
        device: Which of them is meant.

    Source: ``torch.cuda.max_memory_allocated``; on Linux ``VmHWM`` of ``/proc``, on macOS ``getrusage``, on Windows
        ``psutil``.

    Example:
        >>> peak_memory(torch.device("cpu")) > 10_000_000
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage begins with what the process that started this one had
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
