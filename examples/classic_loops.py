"""The seven classic loops of transfer learning, each as one Finetuner, and a table of what they reach.

python examples/classic_loops.py data/hymenoptera_data --image-size 128
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from transferkit import (
    Cosine,
    ExponentialDecay,
    Finetuner,
    FreezeFirst,
    FullFinetune,
    LinearProbe,
    OneCycle,
    Plateau,
    ScheduledUnfreeze,
    StepDecay,
)

# A pasted loop has one lr for all layers, no weight decay unless it says so, and batch norms that follow its batches.
pasted = partial(
    Finetuner,
    layer_decay=1.0,
    head_lr_multiplier=1.0,
    weight_decay=0.0,
    keep_statistics=False,
    train_preset="imagenet",
)
plain_sgd = partial(torch.optim.SGD, momentum=0.9)

LOOPS = {
    "fixed feature extractor": partial(  # PyTorch's transfer-learning tutorial has this one and the next
        pasted,
        policy="head",
        optimizer=plain_sgd,
        lr=1e-3,
        schedule=StepDecay(every=7, gamma=0.1),
        epochs=9,
    ),
    "full fine-tuning": partial(
        pasted,
        policy="full",
        optimizer=plain_sgd,
        lr=1e-3,
        schedule=StepDecay(every=7, gamma=0.1),
        epochs=9,
    ),
    "head, then all at 1e-4": partial(
        pasted,
        policy=ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}, lr={5: 1e-4}),
        optimizer=torch.optim.Adam,
        lr=1e-3,
        weight_decay=1e-4,
        schedule=Plateau(monitor="val_loss", patience=1),
        epochs=9,
    ),
    "last block, dropout 0.5": partial(
        pasted,
        policy="last:1",
        dropout=0.5,
        optimizer="adamw",
        lr=1e-4,
        weight_decay=0.01,
        schedule=Plateau(monitor="val_accuracy", mode="max", patience=1),
        epochs=8,
    ),
    "first three blocks frozen": partial(  # as VGG16 was: the lr x 0.92 every 2 epochs, a fifth held out
        pasted,
        policy=FreezeFirst(3),
        optimizer=torch.optim.Adam,
        lr=1e-4,
        schedule=ExponentialDecay(gamma=0.92, every=2),
        val_fraction=0.2,
        epochs=8,
    ),
    "gradual unfreezing": partial(  # Howard & Ruder 2018 (ULMFiT); fastai
        Finetuner,
        policy="gradual",
        lr=1e-3,
        layer_decay=1 / 2.6,
        head_lr_multiplier=2.6,
        schedule=OneCycle(),
        epochs=8,
    ),
    "linear probe, then all": partial(  # Kumar et al. 2022 (LP-FT)
        Finetuner,
        policy=ScheduledUnfreeze({0: LinearProbe(), 3: FullFinetune()}, lr={3: 1e-4}),
        lr=3e-3,
        layer_decay=1.0,
        head_lr_multiplier=1.0,
        schedule=Cosine(warmup_epochs=0.5),
        epochs=8,
    ),
}
"""What each loop is; a call such as ``LOOPS["full fine-tuning"]("torchvision/resnet18", epochs=2)`` makes it."""

# This one splits a folder itself: of a data set that has its own split, it gets the training part.
SPLITS_ITSELF = "first three blocks frozen"


def data_of(loop: str, folder: Path) -> Path:
    return folder / "train" if loop == SPLITS_ITSELF and (folder / "train").is_dir() else folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and val/, or with one folder per class")
    parser.add_argument("--model", default="torchvision/mobilenet_v2")
    parser.add_argument("--weights", default="default", help="default, a tag, a path, bundled, or none")
    parser.add_argument("--epochs", type=int, help="of every loop; 8 or 9 by default")
    parser.add_argument("--image-size", type=int, help="input side in pixels; that of the weights by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    given = {"image_size": options.image_size, "seed": options.seed}
    given |= {} if options.epochs is None else {"epochs": options.epochs}
    weights = None if options.weights == "none" else options.weights
    rows, models = [], []
    for loop, make in LOOPS.items():
        print(f"\n{loop}")
        tuner = make(options.model, weights=weights, **given)
        started = time.perf_counter()
        best = tuner.fit(data_of(loop, options.data)).best()
        rows.append((best.val_accuracy, f"{loop:26}{best.val_accuracy:13.3f}{time.perf_counter() - started:9.0f}"))
        models.append(tuner)

    print(f"\n{'loop':26}{'val_accuracy':>13}{'seconds':>9}", *(row for _, row in rows), sep="\n")
    best_tuner = max(zip(rows, models, strict=True), key=lambda each: each[0][0])[1]
    print("saved in", best_tuner.save("runs/classic_loops"))


if __name__ == "__main__":
    main()
