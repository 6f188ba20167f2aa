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
from head_lr import NETWORKS, head_inputs_of
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

from transferkit import create_model, image_folder
from transferkit.heads import Head, build_head
from transferkit.schedules import Cosine, Progress

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
Part = tuple[Tensor, Tensor]


def trained(
    train: Part,
    val: Part,
    seed: int,
    *,
    lr: float = LR,
    batch: int = BATCH,
    weight_decay: float = 0.01,
    dropout: float = 0.2,
    smoothing: float = 0.0,
    zero: bool = False,
) -> list[float]:
    """Return the validation accuracy of each epoch; a dropout of 0.2 is the network's own."""
    torch.manual_seed(seed)
    (inputs, labels), (val_inputs, val_labels) = train, val
    head = build_head(nn.Linear(inputs.shape[1], 1), Head(int(labels.max()) + 1))
    if zero:
        nn.init.zeros_(head.weight)
    groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    per_epoch = -(-len(inputs) // batch)
    step, accuracies = 0, []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(batch):
            factor = Cosine().factor(Progress(step=step, steps=EPOCHS * per_epoch, steps_per_epoch=per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            logits = head(F.dropout(inputs[rows], dropout))
            F.cross_entropy(logits, labels[rows], label_smoothing=smoothing).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        with torch.no_grad():
            accuracies.append((head(val_inputs).argmax(1) == val_labels).float().mean().item())
    return accuracies


def cross_validated(train: Part, weight_decay: float) -> str:
    """Return the last epochs' accuracy on the fifths of the training pictures left out, over three divisions."""
    inputs, labels = train
    means = []
    for seed in range(3):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(inputs, labels)
        parts = [((inputs[kept], labels[kept]), (inputs[out], labels[out])) for kept, out in folds]
        means.append(statistics.mean(trained(*part, seed, weight_decay=weight_decay)[-1] for part in parts))
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
            runs = [trained(train, val, seed, **change) for seed in SEEDS]
            best, last = [max(run) for run in runs], [run[-1] for run in runs]
            print(f"| {name} | {spread(best)} | {spread(last)} |", flush=True)
        print("\n| weight decay | cross-validated |\n|---|---|")
        for weight_decay in DECAYS:
            print(f"| {weight_decay:g} | {cross_validated(train, weight_decay)} |", flush=True)


if __name__ == "__main__":
    main()
