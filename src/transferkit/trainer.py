"""The training loop, and everything it calls."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from transferkit.callbacks._base import Callback
from transferkit.devices import PRECISIONS, make_accelerator
from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.freezing import FreezePolicy, FullFinetune
from transferkit.history import EpochRecord, History
from transferkit.metrics import Evaluation, evaluate_logits
from transferkit.model import TransferModel
from transferkit.optim import unassigned_parameters
from transferkit.randomness import derive_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

    Batches = Any

__all__ = ["Trainer", "check_training", "collect_logits"]


class Trainer:
    """Train a :class:`TransferModel` with an optimizer, a freeze policy and callbacks.

    Args:
        model: What to train.
        optimizer: Any torch optimizer that holds every parameter of the model, frozen ones too, once
            (:func:`param_groups` makes its groups). Frozen parameters get no gradient, so it leaves them alone.
        policy: Decides before each epoch which stages are frozen.
        callbacks: Called in this order at every hook.
        seed: Dropout, stochastic depth and mixing are functions of (seed, epoch, batch, process).
        label_smoothing: Share of the target spread over all classes while training, in [0, 1).
        class_weights: One weight per class for the training loss, or ``None``.
        mixup: Alpha of mixup, 0 for none (Zhang et al. 2018). With ``cutmix`` too, each batch draws one of them.
        cutmix: Alpha of cutmix, 0 for none (Yun et al. 2019).
        accumulate: Batches per optimizer step, 1 or more; an epoch's last step may see fewer. Every picture of a step
            counts the same, as in one large batch.
        clip_grad_norm: Largest norm of the gradient, or ``None`` for no limit.
        device: ``"cpu"``, ``"cuda"`` …; ``None`` for the best there is.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Attributes:
        epoch: The epoch that runs, or ran last, counted from 0.
        step: Number of optimizer steps done.
        history: The records so far.
        should_stop: Set it in a callback to end training after the epoch.

    Raises:
        SettingError: A value is outside its range, or the optimizer lacks a parameter.
    """

    def __init__(
        self,
        model: TransferModel,
        optimizer: torch.optim.Optimizer,
        *,
        policy: FreezePolicy | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        """Store and check the settings; no device is touched yet."""
        check_training(
            seed=seed,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            mixup=mixup,
            cutmix=cutmix,
            accumulate=accumulate,
            clip_grad_norm=clip_grad_norm,
            precision=precision,
        )
        classes = len(model.class_names)
        if class_weights is not None and len(class_weights) != classes:
            raise SettingError(
                f"class_weights needs one weight for each of {classes} classes, got {len(class_weights)}"
            )
        if (mixup or cutmix) and classes < 2:
            raise SettingError("mixup and cutmix need two classes or more")
        if missing := unassigned_parameters(model.network, optimizer.param_groups):
            raise SettingError(
                f"the optimizer lacks {len(missing)} parameters of {model.name}, {missing[0]} for one; give it "
                "param_groups(model, lr=…), frozen stages included"
            )
        self.model, self.optimizer = model, optimizer
        self.policy = FullFinetune() if policy is None else policy
        self.callbacks = list(callbacks)
        self.seed = seed
        self.accumulate, self.clip_grad_norm = accumulate, clip_grad_norm
        self.device_name, self.precision = device, precision
        self.history = History()
        self.epoch = self.step = self.epochs = self.batches_per_epoch = 0
        self.should_stop = False
        self._stepper: Any = optimizer
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.loss_function = nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)
        mixes: list[Any] = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
        mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
        self._mix = v2.RandomChoice(mixes) if mixes else None

    @cached_property
    def accelerator(self) -> Accelerator:
        """The device and precision in use."""
        return make_accelerator(self.device_name, self.precision)

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return cast(torch.device, self.accelerator.device)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one process that writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def head_group(self) -> int:
        """Position of the optimizer's group that holds the head; its lr is the one that is shown and set."""
        head = {id(parameter) for parameter in self.model.stages[-1].parameters}
        groups = self.optimizer.param_groups
        return next(i for i, group in enumerate(groups) if any(id(each) in head for each in group["params"]))

    def wait_for_everyone(self) -> None:
        """Let all processes reach this point."""
        self.accelerator.wait_for_everyone()

    def fit(self, train_batches: Batches, val_batches: Batches, *, epochs: int) -> History:
        """Train.

        Args:
            train_batches: A sized iterable of (images (B, C, H, W) float, labels (B,) int), :func:`loader` for example;
                where its sampler has ``set_epoch``, it is told the epoch.
            val_batches: The same, for validation after each epoch.
            epochs: How many, 1 or more.

        Returns:
            The history. The model keeps the last weights, or the best ones with :class:`BestCheckpoint`, and is back
            in the training or eval mode it was in.

        Raises:
            SettingError: ``epochs`` is below 1.
            DataError: There are no pictures to train or to validate on.
            UnknownStageError: The policy names a stage that the model does not have; nothing has been trained then.
            TransferkitError: The loss is no longer a number.
        """
        if epochs < 1:
            raise SettingError(f"epochs must be 1 or more, got {epochs}")
        if len(train_batches) == 0:
            raise DataError("there are no batches to train on")
        names = self.model.stage_names
        plan = [self.policy.frozen_stages(names, epoch) for epoch in range(epochs)]
        self.epochs, self.batches_per_epoch, self.should_stop = epochs, len(train_batches), False
        with keeps_mode(self.model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            self.model.to(self.device)
            self.loss_function.to(self.device)
            try:
                self._call("on_fit_start")
                wrapped = None
                for epoch in range(len(self.history), epochs):
                    self.epoch, self.step = epoch, epoch * self.steps_per_epoch
                    if wrapped is None or plan[epoch] != self.model.frozen:
                        wrapped = self._freeze(plan[epoch])
                    self._run_epoch(wrapped, train_batches, val_batches)
                    if self.should_stop:
                        break
                self._call("on_fit_end")
            except BaseException:
                self._call("on_exception")
                raise
            finally:
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.history

    def _freeze(self, stages: frozenset[str]) -> nn.Module:
        """Apply the policy, and wrap the model for the device: what synchronises gradients must know what trains."""
        self.model.freeze(stages)
        if self._stepper is not self.optimizer:
            self.accelerator.free_memory()  # it would hold on to the model and the optimizer as wrapped before
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        wrapped, self._stepper = self.accelerator.prepare(self.model, self.optimizer)
        return cast(nn.Module, wrapped)

    def _run_epoch(self, wrapped: nn.Module, train_batches: Batches, val_batches: Batches) -> None:
        started = time.perf_counter()
        _set_epoch(train_batches, self.epoch)
        self.model.train()
        self._call("on_train_epoch_start")
        train_loss = self._train(wrapped, train_batches)
        self._require_finite("training", train_loss)
        validation = self.evaluate(val_batches)
        self._require_finite("validation", validation.loss)
        seconds = time.perf_counter() - started
        self.history.records.append(
            EpochRecord(self.epoch + 1, train_loss, validation.loss, validation.accuracy, seconds)
        )
        self._call("on_validation_end")
        self._call("on_train_epoch_end")

    def _train(self, wrapped: nn.Module, batches: Batches) -> float:
        """Go once through the batches; returns the mean loss per picture."""
        total, count = torch.zeros((), device=self.device), 0
        self._stepper.zero_grad()  # what a user or a broken-off epoch left behind would move the first step
        for index, (images, labels, share, last) in enumerate(_in_steps(batches, self.accumulate)):
            torch.manual_seed(derive_seed(self.seed, 2, self.epoch, index, self.accelerator.process_index))
            images, labels = self._to_device(images, labels)
            targets = labels
            if self._mix is not None:
                images, targets = self._mix(images, labels)
            self._call("on_train_batch_start")
            with nullcontext() if last else self.accelerator.no_sync(wrapped):
                loss = self.model.loss(wrapped(images), targets, self.loss_function)
                self.accelerator.backward(loss * share)
            if last:
                if self.clip_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
                self._stepper.step()
                self._stepper.zero_grad()
                self.step += 1
            total += loss.detach() * len(labels)
            count += len(labels)
            self._call("on_train_batch_end")
        sums = self.accelerator.reduce(torch.stack([total, total.new_tensor(count)]))
        return float(sums[0] / sums[1])

    def _require_finite(self, which: str, loss: float) -> None:
        if not math.isfinite(loss):
            lr = self.optimizer.param_groups[self.head_group]["lr"]
            raise TransferkitError(f"the {which} loss became {loss} in epoch {self.epoch + 1} at lr {lr:g}; lower lr")

    def evaluate(self, batches: Batches) -> Evaluation:
        """Measure the model as it is; its training mode is left as it was.

        Args:
            batches: An iterable of (images (B, C, H, W) float, labels (B,) int).

        Raises:
            DataError: There are no pictures.
        """
        self.model.to(self.device)
        logits, labels = collect_logits(self.model.network, batches, self.device)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object([(logits, labels)])
            logits, labels = (torch.cat([part[position] for part in parts]) for position in (0, 1))
        return evaluate_logits(logits, labels, self.model.class_names)

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)


def check_training(
    *,
    seed: int,
    label_smoothing: float,
    class_weights: Sequence[float] | None,
    mixup: float,
    cutmix: float,
    accumulate: int,
    clip_grad_norm: float | None,
    precision: str,
) -> None:
    """Raise ``SettingError`` unless these settings of a :class:`Trainer` are within their ranges."""
    if seed < 0:
        raise SettingError(f"seed must be 0 or more, got {seed}")
    if not 0.0 <= label_smoothing < 1.0:
        raise SettingError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if class_weights is not None and not all(0 <= weight < math.inf for weight in class_weights):
        raise SettingError(f"class_weights must be 0 or more, got {list(class_weights)}")
    if not (0 <= mixup < math.inf and 0 <= cutmix < math.inf):
        raise SettingError(f"mixup and cutmix must be 0 or more, got {mixup} and {cutmix}")
    if accumulate < 1:
        raise SettingError(f"accumulate must be 1 or more batches, got {accumulate}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise SettingError(f"clip_grad_norm must be above 0, or None for no limit, got {clip_grad_norm}")
    if precision not in PRECISIONS:
        raise SettingError(f"precision={precision!r}; it can be {', '.join(PRECISIONS)}")


@contextmanager
def keeps_mode(model: nn.Module) -> Iterator[None]:
    """Put every module back into the training or eval mode it was in.

    What is frozen meanwhile stays in eval mode; what was frozen and is free again gets the mode of the model.
    """
    modes = [(module, (model if _is_frozen(module) else module).training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode and not _is_frozen(module)


def _is_frozen(module: nn.Module) -> bool:
    return "train" in module.__dict__  # what TransferModel.freeze puts there


def collect_logits(model: nn.Module, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run a model over labelled batches in eval mode; its training mode is left as it was.

    Args:
        model: A classifier that is on ``device``.
        batches: An iterable of (images (B, C, H, W) float, labels (B,) int).
        device: Where to compute.

    Returns:
        Logits (N, num_classes) float32 and labels (N,) int64, on the CPU.
    """
    logits, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    with keeps_mode(model), torch.inference_mode():
        model.eval()
        for images, targets in batches:
            logits.append(model(images.to(device, non_blocking=True)).float().cpu())
            labels.append(targets)
    return torch.cat(logits[1:] or logits), torch.cat(labels)


def _in_steps(batches: Batches, accumulate: int) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
    """Yield images, labels, the batch's share of its optimizer step's pictures, and whether it is the step's last."""
    iterator = iter(batches)
    while window := list(islice(iterator, accumulate)):
        pictures = sum(len(labels) for _, labels in window)
        for position, (images, labels) in enumerate(window, 1):
            yield images, labels, len(labels) / pictures, position == len(window)


def _set_epoch(batches: Batches, epoch: int) -> None:
    set_epoch = getattr(getattr(batches, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
