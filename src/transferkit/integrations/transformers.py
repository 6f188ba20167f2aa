"""The Hugging Face Trainer: a callback that applies a freeze policy, and what the Trainer wants around a model.

Needs the ``transformers`` extra: ``pip install transferkit[transformers]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from transferkit.exceptions import SettingError
from transferkit.freezing import FreezePolicy
from transferkit.integrations._hosted import HostedPolicy, epochs_at_most, find_model
from transferkit.model import TrainingOutput, TransferModel

__all__ = ["PolicyCallback", "WithLoss", "collate", "compute_metrics"]


class WithLoss(nn.Module):
    """A :class:`TransferModel` as ``transformers.Trainer`` calls it: labels in, loss out.

    Args:
        model: What to train.

    Attributes:
        model: The model.

    Example:
        >>> from transferkit import create_model
        >>> model = WithLoss(create_model("torchvision/resnet18", weights=None, num_classes=2))
        >>> output = model(pixel_values=torch.zeros(2, 3, 64, 64), labels=torch.tensor([0, 1]))
        >>> output["loss"].shape, output["logits"].shape
        (torch.Size([]), torch.Size([2, 2]))
    """

    def __init__(self, model: TransferModel) -> None:
        """Store the model."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``{"loss", "logits"}``, or ``{"logits"}`` without labels.

        Args:
            pixel_values: (B, C, H, W) float, normalised as the model's preprocessing says.
            labels: (B,) int, or ``None``.

        Returns:
            The mean loss as a scalar, auxiliary classifiers included, and logits (B, num_classes) float.
        """
        output = self.model(pixel_values)
        logits = output.logits if isinstance(output, TrainingOutput) else output
        return {"logits": logits} if labels is None else {"loss": self.model.loss(output, labels), "logits": logits}


class PolicyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is skipped by the type checker
    """Freeze and free stages as a policy says, inside ``transformers.Trainer``.

    What is frozen depends on the policy and the number of whole epochs done alone, also after
    ``train(resume_from_checkpoint=…)``. Before training it refuses an optimizer that lacks parameters the policy trains
    later and, in several processes, a policy that changes.

    Args:
        policy: Which stages are frozen, by the number of epochs done.

    Raises:
        SettingError: The policy brings learning rates; here the Trainer's schedule sets them. When the Trainer is made
            or begins: there is no ``TransferModel`` in its model or more than one, or a refusal above.
        UnknownStageError: When the Trainer is made or begins: the policy names a stage that the model does not have.

    Example:
        >>> from transferkit import LinearProbe
        >>> trainer_options = {"callbacks": [PolicyCallback(LinearProbe())]}
    """

    def __init__(self, policy: FreezePolicy) -> None:
        """Store the policy."""
        self.policy = policy
        self._hosted = HostedPolicy(policy, "transformers.Trainer")
        self._epoch = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **others: Any
    ) -> None:
        """Check the policy, and apply it where several processes wrap what is trainable before training begins."""
        self._hosted.check_processes(model, epochs=_epochs(args), processes=args.world_size)
        if args.world_size > 1:
            self._hosted.apply(model, 0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **others: Any,
    ) -> None:
        """Check what is known only now, and see at which epoch a resumed run stands."""
        self._hosted.check_processes(model, epochs=_epochs(args), processes=args.world_size)
        self._hosted.check_optimizer(model, optimizer.param_groups, epochs=_epochs(args))
        found = find_model(model)
        if args.world_size > 1 and found.frozen != self.policy.frozen_stages(found.stage_names, 0):
            raise SettingError(
                "the model was wrapped for several processes before the policy froze it; give PolicyCallback to the "
                "Trainer in callbacks=, and a model instead of model_init="
            )
        self._epoch = int(state.epoch or 0)  # 1.5 in the middle of the second epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **others: Any
    ) -> None:
        """Apply the policy."""
        self._hosted.apply(model, self._epoch)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Count the epoch, also one that another callback has cut short: ``state.epoch`` then stays a fraction."""
        self._epoch += 1


def collate(samples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Make the batch that :class:`WithLoss` takes; the Trainer's ``data_collator``.

    Args:
        samples: (image (C, H, W) float, label) pairs, as a :class:`~transferkit.reading.TransformedDataset` gives them.

    Returns:
        ``{"pixel_values": (B, C, H, W) float, "labels": (B,) int64}``.

    Example:
        >>> {name: tuple(values.shape) for name, values in collate([(torch.zeros(3, 8, 8), 1)] * 2).items()}
        {'pixel_values': (2, 3, 8, 8), 'labels': (2,)}
    """
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy; the Trainer's ``compute_metrics``, which reports it as ``eval_accuracy``.

    Args:
        prediction: Its ``predictions`` are logits (N, num_classes), its ``label_ids`` labels (N,).

    Example:
        >>> logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
        >>> compute_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1, 0])))
        {'accuracy': 0.75}
    """
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def _epochs(args: TrainingArguments) -> int:
    # max_steps overrides the epochs where it is given
    return epochs_at_most(None if args.max_steps > 0 else args.num_train_epochs, args.max_steps)
