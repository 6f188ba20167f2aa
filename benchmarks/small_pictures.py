"""32-px pictures: enlarge them, or adapt the stem? CIFAR-10 as pictures, two real networks, 3 seeds.

python benchmarks/small_pictures.py ASSETS            accuracy
python benchmarks/small_pictures.py ASSETS --speed    pictures per second, on an idle machine
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from transferkit import Finetuner, FullFinetune, LinearProbe, ScheduledUnfreeze, create_model, image_folder
from transferkit.sources import PictureData, PictureFiles

NETWORKS = {
    "torchvision/mobilenet_v2": "mobilenet_v2-77326c9b.pth",
    "torchvision/squeezenet1_1": "squeezenet1_1-a3c258a5.pth",
}
WAYS: dict[str, dict[str, Any]] = {
    "none (32 px)": {"image_size": 32},
    "upsample to 64 px": {"image_size": 64},
    "upsample to 128 px": {"image_size": 128},
    "upsample to 224 px": {"image_size": 224},
    "stem (32 px)": {"small_images": "stem"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "head first, then everything at 3e-5": {
        "policy": ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune()}, lr={0: 3e-3, 2: 3e-3}),
        "head_lr_multiplier": 100.0,
    },
    "everything at 3e-4": {"policy": FullFinetune(), "head_lr_multiplier": 10.0},
}
TRAIN, TEST, EPOCHS = 50, 50, 5  # pictures per class, and passes


def pictures(assets: Path, folder: Path) -> PictureData:
    """Unpack the first pictures of each class, as many as are used."""
    with zipfile.ZipFile(assets / "cifar10_jpg.zip") as archive:
        kept: dict[str, int] = {}
        for name in sorted(each for each in archive.namelist() if each.endswith(".jpg")):
            place = name.rpartition("/")[0]
            if kept.setdefault(place, 0) < (TRAIN if "/train/" in name else TEST):
                kept[place] += 1
                archive.extract(name, folder)
    train = image_folder(folder / "cifar10_jpg" / "train", val_fraction=0.01)
    test = image_folder(folder / "cifar10_jpg" / "test", val_fraction=0.01)
    everything = [PictureFiles([*data.train.pictures, *data.val.pictures]) for data in (train, test)]
    return PictureData(*everything, class_names=train.class_names)


def accuracy(data: PictureData, name: str, weights: Path, way: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Return mean and spread of the best epoch's accuracy over seeds, and the seconds of a run."""
    best, seconds = [], []
    for seed in range(3):
        started = time.perf_counter()
        tuner = Finetuner(name, weights=weights, epochs=EPOCHS, seed=seed, progress=False, **way, **recipe)
        best.append(tuner.fit(data).best().val_accuracy)
        seconds.append(time.perf_counter() - started)
    return f"{statistics.mean(best):.3f} ± {statistics.stdev(best):.3f} | {statistics.mean(seconds):.0f}"


def speed(weights: dict[str, Path], rounds: int = 5, batch: int = 16) -> None:
    """Time whole training steps and predictions, one way after the other in every round."""
    for name, file in weights.items():
        models = {label: create_model(name, weights=file, num_classes=10, **way) for label, way in WAYS.items()}
        taken: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
        for _ in range(rounds + 1):
            for label, model in models.items():
                size = model.preprocessing.size
                images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
                started = time.perf_counter()
                F.cross_entropy(model.train()(images), labels).backward()
                trained = time.perf_counter()
                with torch.inference_mode():
                    model.eval()(images)
                taken[label].append((trained - started, time.perf_counter() - trained))
        for label, times in taken.items():
            steps, predictions = zip(*times[1:], strict=True)  # the first round warms up
            per_second = [f"{batch / statistics.median(each):.0f}" for each in (steps, predictions)]
            print(f"| {name} | {label} | {' | '.join(per_second)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", default="", help="part of 'NETWORK WAY RECIPE'")
    options = parser.parse_args()
    weights = {name: options.assets / "weights" / file for name, file in NETWORKS.items()}
    if options.speed:
        print("| network | pictures of 32 px | training, pictures/s | prediction, pictures/s |\n|---|---|---|---|")
        speed(weights)
        return
    print("| network | pictures of 32 px | recipe | accuracy | s per run |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(options.assets, Path(folder))
        for name, file in weights.items():
            for label, way in WAYS.items():
                for title, recipe in RECIPES.items():
                    if options.only in f"{name} {label} {title}":
                        found = accuracy(data, name, file, way, recipe)
                        print(f"| {name} | {label} | {title} | {found} |", flush=True)


if __name__ == "__main__":
    main()
