"""What every peer shares: one command line, the network with its weights, what a policy freezes, and one last line.

Nothing here imports transferkit: a peer may run in an interpreter that does not have it. The stages below are
transferkit's; a test holds them against it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import models
from torchvision.transforms import v2

__all__ = ["STAGES", "Clock", "begin", "frozen_modules", "make_network", "transforms"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "mobilenet_v2": {
        "stem": ("features.0",),
        "stage1": ("features.1",),
        "stage2": ("features.2", "features.3"),
        "stage3": ("features.4", "features.5", "features.6"),
        "stage4": tuple(f"features.{number}" for number in range(7, 14)),
        "stage5": tuple(f"features.{number}" for number in range(14, 19)),
        "head": ("classifier.1",),
    },
    "resnet18": {
        "stem": ("conv1", "bn1"),
        "stage1": ("layer1",),
        "stage2": ("layer2",),
        "stage3": ("layer3",),
        "stage4": ("layer4",),
        "head": ("fc",),
    },
}
"""The modules of each stage, in the order in which they run."""


class Clock:
    """Seconds from epoch to epoch: call :meth:`tick` where each begins, and once more when training is over."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())

    def report(self, val_accuracy: float) -> None:
        """Print the line that the benchmark reads, the last of all."""
        epochs = [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]
        print(json.dumps({"seconds": sum(epochs), "val_accuracy": val_accuracy, "epochs_seconds": epochs}))


def begin(description: str | None) -> argparse.Namespace:
    """Read the command line, then set threads and seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", default="none", help="state dict of the ImageNet network, or none for random ones")
    parser.add_argument("--model", choices=list(STAGES), default="mobilenet_v2")
    parser.add_argument("--policy", default="head", help="head, full, until:STAGE or last:N (stages before the head)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002  # the generator that the libraries draw from
    torch.manual_seed(options.seed)
    return options


def make_network(options: argparse.Namespace, classes: int) -> nn.Module:
    """Make torchvision's network with its weights and a new linear head."""
    network: nn.Module = models.get_model(options.model, weights=None)
    if options.weights != "none":
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    (head,) = STAGES[options.model]["head"]
    network.set_submodule(head, nn.Linear(network.get_submodule(head).in_features, classes))
    return network


def frozen_modules(network: nn.Module, model: str, policy: str) -> list[nn.Module]:
    """Return the modules that a policy freezes; every parameter of theirs is frozen, and no other."""
    stages = STAGES[model]
    names = list(stages)
    word, _, value = policy.partition(":")
    first_trained = {
        "full": lambda: 0,
        "head": lambda: len(names) - 1,
        "until": lambda: names.index(value),
        "last": lambda: max(0, len(names) - 1 - int(value)),
    }[word]()
    return [network.get_submodule(path) for name in names[:first_trained] for path in stages[name]]


def transforms(size: int) -> dict[str, Callable[[Any], torch.Tensor]]:
    """Return PyTorch's tutorial's transforms for train and val."""
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return {
        "train": v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_tensor]),
        "val": v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_tensor]),
    }
