"""transformers.Trainer on the same network, in a module that returns loss and logits.

It evaluates and saves in every epoch, and loads the best at the end. What is frozen has ``requires_grad=False``; the
Trainer puts the whole network in training mode, frozen batch norms too.
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from _common import Clock, begin, frozen_modules, make_network, transforms
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainerCallback, TrainingArguments


class Classifier(nn.Module):
    """The network in the form that the Trainer wants."""

    def __init__(self, network: nn.Module) -> None:
        """Take the network."""
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels=None):
        """Return the logits, and the loss where labels are given."""
        logits = self.network(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Ticks(TrainerCallback):
    """Tells a clock where epochs begin, and where training ends."""

    def __init__(self, clock: Clock) -> None:
        """Take the clock."""
        self.clock = clock

    def on_epoch_begin(self, args, state, control, **others) -> None:
        """Note an epoch's beginning."""
        self.clock.tick()

    def on_train_end(self, args, state, control, **others) -> None:
        """Note the end."""
        self.clock.tick()


def collate(examples):
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main() -> None:
    options = begin(__doc__)
    chosen = transforms(options.image_size)
    data = {part: ImageFolder(options.data / part, chosen[part]) for part in ("train", "val")}
    network = make_network(options, len(data["train"].classes))
    for module in frozen_modules(network, options.model, options.policy):
        module.requires_grad_(False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=Classifier(network),
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                learning_rate=1e-3 if options.policy == "head" else 1e-4,
                dataloader_num_workers=options.workers,
                dataloader_persistent_workers=options.workers > 0,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model="accuracy",
                remove_unused_columns=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                seed=options.seed,
            ),
            data_collator=collate,
            train_dataset=data["train"],
            eval_dataset=data["val"],
            compute_metrics=accuracy,
            callbacks=[Ticks(clock)],
        )
        trainer.train()
    clock.report(trainer.state.best_metric)


if __name__ == "__main__":
    main()
