"""Faces of a few people with VGG16: one folder per person, the first three convolution blocks frozen.

The folder has no split, so a fifth of each person's pictures is held out. Adam at 0.0001, times 0.92 after every second
epoch; the best epoch is kept.

    python examples/faces_vgg16_partial_freeze.py --data data/faces

Measured: on 200 flowers of five kinds (no faces were at hand) with SqueezeNet 1.1 and its ImageNet weights in place of
VGG16, 224 px, 20 epochs, one seed: val_accuracy 0.850 in the best epoch (the 10th) and in the last, on 40 held-out
pictures, so that one is 0.025; 5 minutes on one thread of a busy machine. Its three frozen stages are all but the last
block.
"""

from __future__ import annotations

from typing import Any

import torch
from _pictures import command_line, parse

from transferkit import ExponentialDecay, Finetuner, FreezeFirst


def partly_frozen(model: str, **settings: Any) -> Finetuner:
    return Finetuner(
        model,
        policy=FreezeFirst(3),
        optimizer=torch.optim.Adam,
        lr=1e-4,
        layer_decay=1.0,  # one rate
        head_lr_multiplier=1.0,  # for all that trains
        weight_decay=0.0,
        schedule=ExponentialDecay(gamma=0.92, every=2),
        train_preset="imagenet",
        val_fraction=0.2,
        **settings,
    )


def main() -> None:
    options = parse(command_line(__doc__, model="torchvision/vgg16", epochs=20), smoke_parts=("",))
    tuner = partly_frozen(options.model, **options.settings)
    best = tuner.fit(options.data).best()
    tuner.plot_history(options.output / "curves.png")
    tuner.plot_predictions(options.output / "predictions.png")
    print(f"trained on {len(tuner.data.train)} pictures, validated on {len(tuner.data.val)}")
    print(f"best epoch {best.epoch}: val_accuracy {best.val_accuracy:.4f}, saved in {options.output}")


if __name__ == "__main__":
    main()
