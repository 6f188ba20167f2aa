"""CIFAR-10 with VGG16: the convolutions stay as they are, the fully connected layers train.

SGD at 0.001 with momentum 0.9. In VGG16 the stage before the head is its two large fully connected layers, so
``last:1`` trains these and the new one. What the frozen convolutions give is kept (the plan that is printed says how
much that is), so a later epoch costs only the fully connected layers.

    python examples/cifar10_vgg16.py --data data/cifar10

Measured: with SqueezeNet 1.1 and its ImageNet weights in place of VGG16 (which trains its last block here, for it has
no fully connected layers), 128 px, the first 500 training and test pictures of each class as JPEG files, 10 epochs,
one seed: val_accuracy 0.775 in the best epoch (the 8th), 0.764 in the last; 37 minutes on one thread of a very busy
machine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _pictures import command_line, parse

from transferkit import Constant, Finetuner


def fully_connected(model: str, **settings: Any) -> Finetuner:
    return Finetuner(
        model,
        policy="last:1",
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        lr=1e-3,
        layer_decay=1.0,  # one rate
        head_lr_multiplier=1.0,  # for all that trains
        weight_decay=5e-4,
        schedule=Constant(),
        train_preset="none",
        **settings,
    )


def main() -> None:
    options = parse(command_line(__doc__, model="torchvision/vgg16", epochs=10, image_size=128))
    tuner = fully_connected(options.model, **options.settings)
    best = tuner.fit(options.data).best()
    tuner.plot_history(options.output / "curves.png")
    tuner.plot_predictions(options.output / "predictions.png")
    print(f"best epoch {best.epoch}: val_accuracy {best.val_accuracy:.4f}, saved in {options.output}")


if __name__ == "__main__":
    main()
