"""Lightning 2 with BackboneFinetuning and ModelCheckpoint.

What the policy freezes is the callback's backbone and is never unfrozen. It is put in eval mode once, which Lightning
keeps, and its batch norms do not train, as a user writes who knows both.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import torch
from _common import Clock, begin, frozen_modules, make_network, transforms
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


class Classifier(LightningModule):
    """The network; ``backbone`` is what BackboneFinetuning freezes."""

    def __init__(self, network: nn.Module, frozen: list[nn.Module], lr: float) -> None:
        """Put what is frozen in eval mode."""
        super().__init__()
        self.network, self.frozen, self.lr = network, frozen, lr
        for module in frozen:
            module.eval()

    @property
    def backbone(self) -> nn.Module:
        """The frozen part; not registered, so that a checkpoint holds it once."""
        return nn.ModuleList(self.frozen)

    def training_step(self, batch, index):
        """Return the loss."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        """Log the loss and the accuracy."""
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        """Adam over what trains."""
        return torch.optim.Adam(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=self.lr)


class Ticks(Callback):
    """Tells a clock where epochs begin, and where training ends."""

    def __init__(self, clock: Clock) -> None:
        """Take the clock."""
        self.clock = clock

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note an epoch's beginning."""
        self.clock.tick()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end."""
        self.clock.tick()


def main() -> None:
    options = begin(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seed_everything(options.seed, verbose=False)
    chosen = transforms(options.image_size)
    data = {part: ImageFolder(options.data / part, chosen[part]) for part in ("train", "val")}
    settings = {"batch_size": options.batch_size, "num_workers": options.workers}
    settings["persistent_workers"] = options.workers > 0  # as Lightning asks for
    loaders = {part: DataLoader(each, shuffle=part == "train", **settings) for part, each in data.items()}
    network = make_network(options, len(data["train"].classes))
    frozen = frozen_modules(network, options.model, options.policy)
    lr = 1e-3 if options.policy == "head" else 1e-4
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_accuracy", mode="max")
        callbacks = [best, Ticks(clock)]
        if frozen:
            callbacks.append(BackboneFinetuning(unfreeze_backbone_at_epoch=options.epochs, train_bn=False))
        trainer = Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Classifier(network, frozen, lr), loaders["train"], loaders["val"])
    clock.report(float(best.best_model_score))


if __name__ == "__main__":
    main()
