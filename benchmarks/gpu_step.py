"""Does the loader hold a GPU up? Pictures per second of training against the bare step on tensors that are there.

    python benchmarks/gpu_step.py                        made pictures of 32 px and made photos
    python benchmarks/gpu_step.py ASSETS                 the photos are those of ASSETS/hymenoptera_data
    python benchmarks/gpu_step.py --quick                a few tiny steps, on a CPU too: does everything run?

Everything is trained, from random weights (what they are costs nothing). The first three rows of a network have the
same network, optimizer, precision (bf16) and memory format (channels last for convolutions); the fourth is the loop of
PyTorch's transfer-learning tutorial as people paste it: float32, SGD, a wait for the GPU per step. An epoch's seconds
are those of its training, the device synchronised before and after; the first epoch warms up and is left out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import markdown_table, median_range
from _runs import commit
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from transferkit import create_model, image_folder
from transferkit.callbacks import Callback
from transferkit.devices import runs_channels_last
from transferkit.loading import loader
from transferkit.model import TransferModel
from transferkit.optim import build_optimizer, param_groups
from transferkit.reading import TransformedDataset
from transferkit.resident import ResidentBatches, resident_bytes
from transferkit.sources import DatasetPictures, PictureFiles
from transferkit.trainer import Trainer
from transferkit.transforms import Transform, cifar_train, light

ASKED = 0.85
CLASSES = 10
BARE, RESIDENT, LOADER, TUTORIAL = "bare step", "kept on the device", "loader", "tutorial loop, float32"


@dataclass(frozen=True)
class Case:
    """One network on one kind of pictures."""

    network: str
    photos: bool
    batch: int
    pictures: int
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> TransferModel:
        """Make the network."""
        return create_model(self.network, num_classes=CLASSES, weights=None, seed=0, **self.options)

    def transform(self, model: TransferModel) -> Transform:
        """Return what is usual for such pictures."""
        return (light if self.photos else cifar_train)(model.preprocessing)


PHOTOS = ("torchvision/resnet18", "torchvision/resnet50", "timm/vit_small_patch16_224")
CASES = (
    Case("torchvision/resnet18", False, 128, 10_240, {"small_images": "stem"}),
    *(Case(name, True, 64, 2048) for name in PHOTOS),
)
QUICK = (Case("timm/test_efficientnet", False, 4, 8, {"image_size": 32}), Case("timm/test_vit", True, 4, 8))


class Clock(Callback):
    """Seconds of each epoch's training, without its validation."""

    def __init__(self, device: torch.device) -> None:
        """Begin with none."""
        self.device = device
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Note the time."""
        self.started = now(self.device)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Keep the difference."""
        self.seconds.append(now(self.device) - self.started)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: torch.device, epoch: Callable[[], object], epochs: int) -> list[float]:
    seconds = []
    for _ in range(epochs):
        started = now(device)
        epoch()
        seconds.append(now(device) - started)
    return seconds


def bare_step(case: Case, device: torch.device, epochs: int) -> list[float]:
    model = case.model().to(device).train()
    images = torch.randn(case.batch, 3, *[model.preprocessing.size] * 2, device=device)
    if runs_channels_last(model):
        model.network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    optimizer = build_optimizer("adamw", param_groups(model, lr=1e-4))

    def epoch() -> None:
        for _ in range(case.pictures // case.batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return timed(device, epoch, epochs)


def trained(case: Case, source: Any, device: torch.device, epochs: int, workers: int, *, resident: bool) -> list[float]:
    model, pinned = case.model(), device.type == "cuda"
    given: dict[str, Any] = {"batch_size": case.batch, "num_workers": workers, "pin_memory": pinned}
    train = loader(source, case.transform(model), train=True, **given)
    if resident:
        train = ResidentBatches(train, device)
    val = [(torch.zeros(1, 3, *[model.preprocessing.size] * 2), torch.zeros(1, dtype=torch.int64))]  # not timed
    clock = Clock(device)
    optimizer = build_optimizer("adamw", param_groups(model, lr=1e-4))
    trainer = Trainer(model, optimizer, callbacks=[clock], device=device.type, precision="bf16" if pinned else "fp32")
    trainer.fit(train, val, epochs=epochs)
    return clock.seconds


def tutorial_loop(case: Case, source: Any, device: torch.device, epochs: int, workers: int) -> list[float]:
    model = case.model()
    expected = model.preprocessing
    crop = v2.RandomResizedCrop(expected.size) if case.photos else v2.RandomCrop(expected.size, padding=4)
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(expected.mean, expected.std)]
    dataset = TransformedDataset(source, v2.Compose([crop, v2.RandomHorizontalFlip(), *to_tensor]), augmented=False)
    dataloader = DataLoader(dataset, batch_size=case.batch, shuffle=True, num_workers=workers)
    network, criterion = model.network.to(device), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)

    def epoch() -> None:
        network.train()
        running_loss = running_corrects = 0.0
        for inputs, labels in dataloader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            outputs = network(inputs)
            _, preds = torch.max(outputs, 1)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * inputs.size(0)
            running_corrects += torch.sum(preds == labels.data)

    return timed(device, epoch, epochs)


def small_pictures(count: int) -> DatasetPictures:
    noise = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return DatasetPictures(
        [(Image.fromarray(each), i % CLASSES) for i, each in enumerate(noise)], tuple(range(CLASSES))
    )


def photos(assets: Path | None, place: Path, count: int) -> PictureFiles:
    """Return so many photos; those that there are come several times, so that an epoch has steps enough to be timed."""
    if assets is not None:
        files = image_folder(assets / "hymenoptera_data").train.pictures
    else:
        rng = np.random.default_rng(0)
        for label, number in np.ndindex(CLASSES, 25):
            (place / str(label)).mkdir(exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / str(label) / f"{number}.jpg")
        files = image_folder(place, val_fraction=0.01).train.pictures
    return PictureFiles((list(files) * -(-count // len(files)))[:count])


def compare(case: Case, source: Any, device: torch.device, epochs: int, workers: int) -> tuple[list[list[str]], str]:
    """Return a row per way to train, and what was asked beside what came out."""
    ways: dict[str, Callable[[], list[float]]] = {
        BARE: lambda: bare_step(case, device, epochs),
        RESIDENT: lambda: trained(case, source, device, epochs, workers, resident=True),
        LOADER: lambda: trained(case, source, device, epochs, workers, resident=False),
        TUTORIAL: lambda: tutorial_loop(case, source, device, epochs, workers),
    }
    rates = {name: [case.pictures / seconds for seconds in run()[1:]] for name, run in ways.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    model = case.model()
    title = f"{case.network}, {model.preprocessing.size} px, batches of {case.batch}"
    against = {name: [f"{each / medians[other]:.2f}" for other in (BARE, TUTORIAL)] for name, each in medians.items()}
    rows = [[title, name, median_range(each), *against[name]] for name, each in rates.items()]
    kept = resident_bytes(loader(source, case.transform(model), batch_size=case.batch, train=True)) / 2**20
    return rows, (
        f"{title}: asked at least {ASKED} of the bare step, came to {against[RESIDENT][0]}; "
        f"{case.pictures} pictures an epoch take {kept:.0f} MiB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, nargs="?", help="folder with hymenoptera_data/; made photos by default")
    parser.add_argument("--epochs", type=int, default=6, help="the first one warms up")
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) - 1)))
    parser.add_argument("--output", type=Path, help="also a file for the report")
    parser.add_argument("--quick", action="store_true", help="two epochs of two steps, also without a GPU")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.quick):
        print(f"no GPU: torch {torch.__version__} finds none that it can use, and there is nothing to measure")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    epochs, workers = (2, 0) if options.quick else (options.epochs, options.workers)
    rows, said = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in QUICK if options.quick else CASES:
            source = (
                photos(options.assets, Path(folder), case.pictures) if case.photos else small_pictures(case.pictures)
            )
            more, verdict = compare(case, source, device, epochs, workers)
            rows += more
            said.append(f"- {verdict}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU, to see that everything runs"
    setting = (
        f"{datetime.date.today()}, {where}, {os.cpu_count()} CPU cores, {workers} worker processes, torch "
        f"{torch.__version__}, commit {commit()}; medians of {epochs - 1} epochs, lowest to highest in brackets. "
        f"Photos: {'those of hymenoptera_data' if options.assets else 'made'}, repeated."
    )
    table = markdown_table(["network", "run", "pictures/s", "× bare step", "× tutorial loop"], rows)
    report = "\n".join([f"# Training on a GPU\n\n{setting}\n\n{table}\n", *said])
    if options.output is not None:
        options.output.write_text(f"{report}\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
