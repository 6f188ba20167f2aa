"""A LightningModule of your own around a transferkit model: Lightning's loop, our stages, freezing and rates.

The head in the first epoch, then everything; Lightning calls the hooks, ``PolicyCallback`` freezes and frees.
Needs ``pip install transferkit[lightning]``.

    python examples/lightning_module.py --data data/hymenoptera_data

Measured: with MobileNetV2 and its ImageNet weights, 128 px, 3 epochs, one seed: val_accuracy 0.915 after the last (153
validation pictures); 2.7 minutes on one thread of a busy machine.
"""

from __future__ import annotations

import warnings

import torch
from _pictures import command_line, parse
from lightning import pytorch as pl
from torch import Tensor

from transferkit import (
    FullFinetune,
    LinearProbe,
    ScheduledUnfreeze,
    TransferModel,
    create_model,
    eval_transform,
    image_folder,
    loader,
    param_groups,
    save_artifact,
    train_transform,
)
from transferkit.integrations.lightning import PolicyCallback


class Classifier(pl.LightningModule):
    def __init__(self, model: TransferModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return self.model.loss(self.model(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        right = (self.model(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", right, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # every parameter, also what is frozen at first
        groups = param_groups(self.model, lr=3e-5, weight_decay=0.01, layer_decay=0.7, head_lr_multiplier=100)
        return torch.optim.AdamW(groups)


def main() -> None:
    options = parse(command_line(__doc__, model="torchvision/mobilenet_v2", epochs=3))
    warnings.filterwarnings("ignore", module="lightning")  # advice on workers and logging intervals

    data = image_folder(options.data)
    model = create_model(
        options.model, class_names=data.class_names, weights=options.weights, image_size=options.image_size
    )
    model.keep_statistics = True  # of the pretrained batch norms, also while they train
    train_view = train_transform("light", model.preprocessing)
    val_view = eval_transform(model.eval_preset, model.preprocessing)

    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[PolicyCallback(ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}))],
        default_root_dir=options.output,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(model),
        loader(data.train, train_view, batch_size=16, train=True),
        loader(data.val, val_view, batch_size=16, train=False),
    )
    print(f"last epoch: val_accuracy {trainer.callback_metrics['val_accuracy']:.4f}")
    print("saved in", save_artifact(model, options.output))


if __name__ == "__main__":
    main()
