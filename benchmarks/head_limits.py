"""How accurate can a linear head be on one plain view of each picture, and how much of that is the choice of an epoch?

    python benchmarks/head_limits.py ASSETS

On the features of MobileNetV2 with ImageNet weights: a logistic regression fitted to the end, which has no epochs to
choose from; heads trained as the Trainer does, 25 epochs of batches of 16 at 0.0013, 10 seeds, with one thing changed
at a time; and what cross-validation on the training pictures alone says of weight decays.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from head_lr import NETWORKS, Part, head_inputs_of, trained
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import nn

from transferkit import create_model, image_folder
from transferkit.heads import Head, build_head

NAME = "torchvision/mobilenet_v2"
STRENGTHS = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1, 10)  # scikit-learn's C: smaller is more regularised
EPOCHS, BATCH, LR, SEEDS = 25, 16, 1.3e-3, range(10)
HEADS = {
    "as it is": {},
    "lr 0.0006": {"lr": 6e-4},
    "batches of 32": {"batch": 32},
    "weight decay 1": {"weight_decay": 1.0},
    "weight decay 30": {"weight_decay": 30.0},
    "weight decay 100": {"weight_decay": 100.0},
    "dropout 0.8": {"dropout": 0.8},
    "dropout 0.9": {"dropout": 0.9},
    "labels smoothed by 0.1": {"smoothing": 0.1},
    "first weights zero": {"zero": True},
}
DECAYS = (0.01, 1, 10, 30, 100, 300)


def accuracies(train: Part, val: Part, seed: int, *, zero: bool = False, **change: float) -> list[float]:
    """Train a fresh head, and return the validation accuracy of each epoch; a dropout of 0.2 is the network's own."""
    torch.manual_seed(seed)
    head = build_head(nn.Linear(train[0].shape[1], 1), Head(int(train[1].max()) + 1))
    if zero:
        nn.init.zeros_(head.weight)
    return trained(head, train, val, **{"lr": LR, "epochs": EPOCHS, "batch": BATCH, "dropout": 0.2} | change)


def cross_validated(train: Part, weight_decay: float) -> str:
    """Return the last epochs' accuracy on the fifths of the training pictures left out, over three divisions."""
    inputs, labels = train
    means = []
    for seed in range(3):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(inputs, labels)
        parts = [((inputs[kept], labels[kept]), (inputs[out], labels[out])) for kept, out in folds]
        means.append(statistics.mean(accuracies(*part, seed, weight_decay=weight_decay)[-1] for part in parts))
    return spread(means)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    assets = parser.parse_args().assets
    for folder in ("hymenoptera_data", "flowers5_small"):
        data = image_folder(assets / folder)
        model = create_model(NAME, weights=assets / "weights" / NETWORKS[NAME], class_names=data.class_names)
        train, val = head_inputs_of(model, data.train), head_inputs_of(model, data.val)
        print(f"\n## {folder}\n\nLogistic regression, C and accuracy: ", end="")
        scores = []
        for strength in STRENGTHS:
            regression = LogisticRegression(C=strength, max_iter=2000).fit(train[0].numpy(), train[1].numpy())
            scores.append(f"{strength:g} {regression.score(val[0].numpy(), val[1].numpy()):.3f}")
        print(", ".join(scores))
        print("\n| head | best of 25 epochs | last epoch |\n|---|---|---|")
        for name, change in HEADS.items():
            runs = [accuracies(train, val, seed, **change) for seed in SEEDS]
            best, last = [max(run) for run in runs], [run[-1] for run in runs]
            print(f"| {name} | {spread(best)} | {spread(last)} |", flush=True)
        print("\n| weight decay | cross-validated |\n|---|---|")
        for weight_decay in DECAYS:
            print(f"| {weight_decay:g} | {cross_validated(train, weight_decay)} |", flush=True)


if __name__ == "__main__":
    main()
