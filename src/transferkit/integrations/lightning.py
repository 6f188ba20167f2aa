"""Lightning: a callback that applies a freeze policy, and a module to subclass or to use as it is.

Needs the ``lightning`` extra: ``pip install transferkit[lightning]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import pytorch as pl
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from transferkit.exceptions import SettingError
from transferkit.freezing import FreezePolicy
from transferkit.integrations._hosted import HostedPolicy, epochs_at_most
from transferkit.model import TrainingOutput, TransferModel
from transferkit.optim import OptimizerFactory, build_optimizer, check_rates, find_optimizer, param_groups
from transferkit.schedules import MetricSchedule, Progress, Schedule, StepSchedule, schedule_by_name

__all__ = ["PolicyCallback", "TransferModule"]


class PolicyCallback(pl.Callback):  # type: ignore[misc]  # Lightning is skipped by the type checker
    """Freeze and free stages as a policy says, whatever LightningModule holds the :class:`TransferModel`.

    It keeps no state: what is frozen depends on the policy and the epoch alone, also when Lightning resumes from a
    checkpoint, in the middle of an epoch or where it leaves out a hook. Before training it refuses an optimizer that
    lacks parameters the policy trains later and, in several processes, a policy that changes.

    Args:
        policy: Which stages are frozen, by the number of epochs done.

    Raises:
        SettingError: The policy brings learning rates; here the LightningModule's schedule sets them. When training
            begins: there is no ``TransferModel`` in the LightningModule or more than one, or a refusal above.
        UnknownStageError: When training begins: the policy names a stage that the model does not have.

    Source: Lightning's ``BaseFinetuning``, which adds groups to the optimizer when it unfreezes.

    Example:
        >>> from transferkit import LinearProbe
        >>> trainer_options = {"callbacks": [PolicyCallback(LinearProbe())]}
    """

    def __init__(self, policy: FreezePolicy) -> None:
        """Store the policy."""
        self.policy = policy
        self._hosted = HostedPolicy(policy, "Lightning")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the policy, and apply it where several processes wrap what is trainable right after this."""
        if stage == "fit":
            self._hosted.check_processes(pl_module, epochs=_epochs(trainer), processes=trainer.world_size)
            if trainer.world_size > 1:
                self._hosted.apply(pl_module, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the optimizers, and apply the policy: a run resumed within an epoch has no epoch start."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._hosted.check_optimizer(pl_module, groups, epochs=_epochs(trainer))
        self._hosted.apply(pl_module, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the policy."""
        self._hosted.apply(pl_module, trainer.current_epoch)


class TransferModule(pl.LightningModule):  # type: ignore[misc]  # Lightning is skipped by the type checker
    """A LightningModule around a :class:`TransferModel`, with all parameters in the optimizer from the start.

    It logs ``train_loss``, ``val_loss`` and ``val_accuracy``, as means over an epoch's pictures. Every method can be
    overridden. The trained model is :attr:`model`; :func:`save_artifact` saves it.

    Args:
        model: What to train.
        lr: Learning rate of the stage below the head, above 0.
        weight_decay: Of weight matrices and kernels, 0 or more.
        layer_decay: Factor from one stage to the one before it; above 0, at most 1.
        head_lr_multiplier: Factor of the head's learning rate, above 0.
        optimizer: ``"adamw"``, ``"sgd"`` or a callable that takes the groups.
        schedule: One of :mod:`transferkit.schedules` or its name; ``None`` keeps the rates. Its factor multiplies
            each group's own rate. A metric schedule looks at a logged figure; resumed from a checkpoint it lacks that
            of the epoch the checkpoint ended, since Lightning writes checkpoints before it tells schedules of it.

    Attributes:
        model: The model.

    Raises:
        SettingError: A number is outside its range, a name is unknown, or, when training begins, a schedule of steps
            meets a trainer that has no end.

    Example:
        >>> from transferkit import create_model
        >>> model = create_model("torchvision/resnet18", weights=None, num_classes=2)
        >>> module = TransferModule(model, lr=1e-3, layer_decay=0.5)
        >>> sorted({group["lr"] for group in module.configure_optimizers().param_groups})[-3:]
        [0.00025, 0.0005, 0.001]
    """

    def __init__(
        self,
        model: TransferModel,
        *,
        lr: float,
        weight_decay: float = 0.0,
        layer_decay: float = 1.0,
        head_lr_multiplier: float = 1.0,
        optimizer: str | OptimizerFactory = "adamw",
        schedule: Schedule | str | None = None,
    ) -> None:
        """Store and check the settings."""
        super().__init__()
        check_rates(lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, head_lr_multiplier=head_lr_multiplier)
        find_optimizer(optimizer)
        self.model = model
        self.lr, self.weight_decay = lr, weight_decay
        self.layer_decay, self.head_lr_multiplier = layer_decay, head_lr_multiplier
        self.optimizer = optimizer
        self.schedule = schedule_by_name(schedule) if isinstance(schedule, str) else schedule

    def forward(self, images: Tensor) -> Tensor | TrainingOutput:
        """Return logits.

        Args:
            images: (B, C, H, W) float, normalised as the model's preprocessing says.

        Returns:
            What :meth:`TransferModel.forward` returns, (B, num_classes) float.
        """
        output: Tensor | TrainingOutput = self.model(images)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            batch: images (B, C, H, W) float, labels (B,) int.
            batch_index: Its position in the epoch.
        """
        images, labels = batch
        loss = self.model.loss(self.model(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log loss and accuracy of a batch.

        Args:
            batch: images (B, C, H, W) float, labels (B,) int.
            batch_index: Its position in the epoch.
        """
        images, labels = batch
        logits = self.model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        figures = {"val_loss": self.model.loss(logits, labels), "val_accuracy": accuracy}
        self.log_dict(figures, prog_bar=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Return an optimizer of all parameters, frozen ones too, and the schedule where there is one."""
        groups = param_groups(
            self.model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            head_lr_multiplier=self.head_lr_multiplier,
        )
        optimizer = build_optimizer(self.optimizer, groups)
        if self.schedule is None:
            return optimizer
        if isinstance(self.schedule, MetricSchedule):
            scheduler = {
                "scheduler": _MetricLR(optimizer, self.schedule),
                "interval": "epoch",
                "reduce_on_plateau": True,  # this is how Lightning knows that it takes a metric
                "monitor": self.schedule.monitor,
            }
        else:
            scheduler = {"scheduler": _step_lr(optimizer, self.schedule, self.trainer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class _MetricLR(LambdaLR):
    """Each group's own rate × what a schedule makes of the metric so far, which is saved with it."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: MetricSchedule) -> None:
        self.values: list[float] = []
        super().__init__(optimizer, lambda _: schedule.factor_from(self.values))

    def step(self, metric: Any = None) -> None:
        if metric is not None:
            self.values.append(float(metric))
        super().step()


def _step_lr(optimizer: torch.optim.Optimizer, schedule: StepSchedule, trainer: pl.Trainer) -> LambdaLR:
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()  # Lightning counts batches later than it asks for optimizers
    steps, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not (0 < steps < math.inf and batches < math.inf):
        raise SettingError(
            f"{schedule} needs to know how long training takes; give Lightning's Trainer max_epochs and batches that "
            "have a length"
        )
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)

    def factor(step: int) -> float:
        # torch asks once more after the last step
        return schedule.factor(Progress(step=min(step, steps), steps=steps, steps_per_epoch=per_epoch))

    return LambdaLR(optimizer, factor)


def _epochs(trainer: pl.Trainer) -> int:
    return epochs_at_most(trainer.max_epochs, trainer.max_steps)
