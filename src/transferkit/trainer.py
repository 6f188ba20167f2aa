"""The training loop, and everything it calls."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from transferkit.activations import ActivationCache, Choice, Phase
from transferkit.batches import names_of, start_epoch, windows
from transferkit.callbacks._base import Callback, call, callback_states, restore_callbacks
from transferkit.devices import PRECISIONS, check_compiler
from transferkit.distribution import (
    check_replicas,
    check_same_everywhere,
    load_network_state,
    load_optimizer_state,
    network_state,
    optimizer_state,
    share_buffers,
    synchronised_norms,
)
from transferkit.evaluation import keeps_mode
from transferkit.exceptions import ArtifactError, CallbackError, DataError, SettingError, TransferkitError, one_line
from transferkit.freezing import FreezePolicy, FullFinetune
from transferkit.gradients import FiniteCheck, Gradients
from transferkit.history import EpochRecord, History
from transferkit.inference import check_engine
from transferkit.interrupts import Interrupted, Interrupts
from transferkit.metrics import Evaluation, evaluate_logits
from transferkit.model import TransferModel
from transferkit.optim import unassigned_parameters
from transferkit.placement import Placement
from transferkit.randomness import keeps_generators, seed_generators
from transferkit.ranges import MOST_EPOCHS, MOST_PER_BATCH, check_number, check_seed, check_whole_number
from transferkit.resume import refuses_odd_content

if TYPE_CHECKING:
    from accelerate import Accelerator

    Batches = Any

__all__ = ["Trainer", "check_class_weights", "check_training"]

logger = logging.getLogger("transferkit")

# A signal is asked for by all processes together, which costs a message; so is what a GPU knows of bad numbers.
_ASK_EVERY = 16


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
        shard: Whether parameters, gradients and optimizer state are spread over the processes (FSDP2) instead of
            repeated in each. :meth:`fit` gives back a network that is whole in every process; after an error it has
            the weights that fit began with.
        sync_batch_norm: Whether batch norms in training see the batches of all processes as one; on GPUs only.
        activations: Keeps what frozen stages give, so that they run once per picture; ``None`` for once per epoch.
        engine: What computes where nothing is trained, one of :data:`~transferkit.inference.ENGINES`.
        torch_compile: Whether what trains is compiled by torch, anew whenever the policy changes: a minute or so each
            time, and a C++ compiler on the CPU. Random numbers within the network, those of dropout, are others then.

    Attributes:
        head_group: Position of the optimizer's group that holds the head; its lr is the one that is shown and set.
        epoch: The epoch that runs, or ran last, counted from 0.
        batch: Batches of that epoch that are done.
        step: Number of optimizer steps done.
        loss_sums: The sum of the losses of the epoch's pictures so far in this process, and of what they weigh, (2,) on
            the device; it goes on changing, so clone what you keep.
        gradients: Forward, loss and backward; its ``micro_batch`` tells whether memory ran out.
        frozen_pass: Batches of which activations were computed to be kept, and of how many; (0, 0) before.
        history: The records so far.
        settings: What callbacks tell of the run that the trainer does not know itself, by name; a
            :class:`~transferkit.Finetuner` gives it its own settings.
        val_logits: Logits (N, num_classes) and labels (N,) of the last validation, on the CPU.
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
        shard: bool = False,
        sync_batch_norm: bool = False,
        activations: ActivationCache | None = None,
        engine: str = "eager",
        torch_compile: bool = False,
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
            shard=shard,
            engine=engine,
        )
        classes = len(model.class_names)
        check_class_weights(class_weights, classes)
        if (mixup or cutmix) and classes < 2:
            raise SettingError("mixup and cutmix need two classes or more; leave them out")
        if missing := unassigned_parameters(model.network, optimizer.param_groups):
            raise SettingError(
                f"the optimizer lacks {len(missing)} parameters of {model.name}, {missing[0]} for one; give it "
                "param_groups(model, lr=…), frozen stages included"
            )
        self.model, self.optimizer = model, optimizer
        self.head_group = _head_group(model, optimizer)
        self.policy = FullFinetune() if policy is None else policy
        self.callbacks = list(callbacks)
        self.seed = seed
        self.accumulate, self.clip_grad_norm = accumulate, clip_grad_norm
        self.placement = Placement(device, precision, shard=shard, torch_compile=torch_compile)
        self.sync_batch_norm = sync_batch_norm
        self.activations = ActivationCache(views=0) if activations is None else activations
        self.engine = engine
        self.frozen_pass = (0, 0)
        self.history = History()
        self.settings: Mapping[str, Any] = {}
        self.val_logits = torch.empty(0, classes), torch.empty(0, dtype=torch.int64)
        self.epoch = self.batch = self.step = self.epochs = self.batches_per_epoch = 0
        self.loss_sums = torch.zeros(2)
        self.should_stop = False
        self._interrupts = Interrupts()
        self._ask_every = 1
        self._finite = FiniteCheck(every=self._ask_every)
        self._seconds = 0.0
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.loss_function = nn.CrossEntropyLoss(weight=weight, label_smoothing=label_smoothing)
        mixes: list[Any] = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
        mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
        mix = v2.RandomChoice(mixes) if mixes else None
        self.gradients = Gradients(model, self.loss_function, mix)

    @property
    def accelerator(self) -> Accelerator:
        """Device, precision and processes."""
        return self.placement.accelerator

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return self.placement.device

    @property
    def precision_used(self) -> str:
        """``"fp32"``, ``"bf16"`` or ``"fp16"``."""
        return self.placement.precision

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one process that writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def at_beginning(self) -> bool:
        """Whether no batch has been trained on yet."""
        return not self.history.records and self.batch == 0

    def wait_for_everyone(self) -> None:
        """Let all processes reach this point."""
        self.accelerator.wait_for_everyone()

    def any_process(self, flag: bool) -> bool:
        """Say whether a flag is set in one process or more; every process must ask.

        Args:
            flag: This process's.
        """
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def fit(self, train_batches: Batches, val_batches: Batches, *, epochs: int) -> History:
        """Train.

        Args:
            train_batches: A sized iterable of (images (B, C, H, W) float, labels (B,) int), :func:`loader` for example;
                where its sampler has ``set_epoch``, it is told the epoch. Each process has its own, of equal length.
            val_batches: The same, for validation after each epoch.
            epochs: How many, 1 or more. What :attr:`history` has already counts, so a second call goes on.

        Returns:
            The history. The model keeps the last weights, or the best ones with :class:`BestCheckpoint`, and is back
            in the training or eval mode it was in.

        Raises:
            SettingError: ``epochs`` is outside its range, or the processes or the device do not allow ``shard`` or
                ``sync_batch_norm``.
            DataError: There are no pictures to train or to validate on, or processes do not see the same.
            UnknownStageError: The policy names a stage that the model does not have; nothing has been trained then.
            TransferkitError: A loss or gradient is no longer a number, or one picture does not fit into memory.
            CallbackError: A callback has failed; what it raised is the cause. Where an epoch or the run had ended, the
                other callbacks have done their work.
            Interrupted: SIGINT (Ctrl-C) or SIGTERM came; the step was finished, and calling again goes on after it.
        """
        check_whole_number("epochs", epochs, at_least=1, at_most=MOST_EPOCHS)
        if len(train_batches) == 0:
            raise DataError("there are no batches to train on")
        for epoch in range(epochs):
            self.policy.frozen_stages(self.model.stage_names, epoch)
        self.epochs, self.batches_per_epoch = epochs, len(train_batches)
        self._interrupts = Interrupts(patient=self.accelerator.num_processes > 1)
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        facts = {"a number of batches of": len(train_batches), "learning rates of": lrs, "epochs": epochs}
        check_same_everywhere(self.accelerator, facts)
        norms = synchronised_norms(self.model.network, self.device) if self.sync_batch_norm else nullcontext()
        complete = True
        with keeps_mode(self.model), keeps_generators(), self._interrupts, norms:
            try:
                self._place()
                if self.placement.torch_compile:
                    check_compiler(self.device)  # before frozen stages run over all pictures
                # Callbacks meet the model as its first epoch will find it.
                self.model.freeze(self.policy.frozen_stages(self.model.stage_names, min(len(self.history), epochs - 1)))
                self._call("on_fit_start")
                phase = None
                while len(self.history) < epochs and not self.should_stop:
                    self.epoch = len(self.history)
                    frozen = self.policy.frozen_stages(self.model.stage_names, self.epoch)
                    if phase is None or frozen != self.model.frozen:
                        phase = self._begin_phase(frozen, train_batches, val_batches)
                        wrapped = self._wrap(phase.module)
                        self.gradients.fuse(phase.module if self.placement.can_fuse else None)
                    self._run_epoch(wrapped, phase)
                self._call("on_fit_end")
            except BaseException as error:
                if not isinstance(error, Interrupted):
                    complete = False  # other processes may not have met the error
                    self._begin_epoch()  # what was broken off within a step begins again with its epoch
                self._tell_of(error)
                if self.placement.torch_compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    raise SettingError(
                        f"torch cannot compile {self.model.name} ({one_line(error)}); leave out torch_compile"
                    ) from error
                raise
            finally:
                self.should_stop = False
                self.activations.close()
                self.placement.release(self.model, complete=complete)
        return self.history

    def _place(self) -> None:
        self.placement.place(self.model, self.optimizer)
        self.loss_function.to(self.device)
        self._ask_every = 1 if self.device.type == "cpu" else _ASK_EVERY
        self._finite = FiniteCheck(every=self._ask_every)

    @property
    def _obstacle(self) -> str | None:
        """Why activations cannot be kept, whatever is frozen."""
        if self.gradients.mix is not None:
            return "mixup and cutmix mix pictures before the first stage"
        return "the network is spread over the processes (shard)" if self.placement.shard else None

    def plan_activations(
        self, train_batches: Batches, val_batches: Batches, *, epochs: int
    ) -> list[tuple[int, Choice]]:
        """Return what :meth:`fit` will keep of frozen stages, and from which epoch on, counted from 0.

        Args:
            train_batches: As for :meth:`fit`.
            val_batches: As for :meth:`fit`.
            epochs: As for :meth:`fit`.
        """
        return self.activations.plan(
            self.model, self.policy, train_batches, val_batches, epochs=epochs, obstacle=self._obstacle
        )

    def _begin_phase(self, stages: frozenset[str], train_batches: Batches, val_batches: Batches) -> Phase:
        """Apply the policy, and find out what is trained on what while it stays so."""
        self.model.freeze(stages)
        changes = [0, *self.policy.changes(self.model.stage_names, self.epochs), self.epochs]
        first = max(epoch for epoch in changes if epoch <= self.epoch)  # also where a run goes on within the phase
        return self.activations.phase(
            self.model,
            train_batches,
            val_batches,
            accelerator=self.accelerator,
            epochs=min(epoch for epoch in changes if epoch > self.epoch) - first,
            obstacle=self._obstacle,
            each_batch=self._frozen_pass_batch,
            engine=self.engine,
        )

    def _frozen_pass_batch(self, done: int, of: int) -> None:
        self.frozen_pass = done, of
        self._call("on_frozen_pass_batch_end")
        if self.accelerator.num_processes == 1:
            self._stop_if_interrupted()

    def _wrap(self, module: nn.Module) -> nn.Module:
        return self.placement.wrap(module, self.model, self.optimizer)

    def _begin_epoch(self) -> None:
        self.batch, self._seconds, self.loss_sums = 0, 0.0, torch.zeros(2)
        self._finite.clear()

    def _run_epoch(self, wrapped: nn.Module, phase: Phase) -> None:
        started = time.perf_counter() - self._seconds
        # Callbacks, and data sets that draw their own order, meet the same numbers whatever happened before.
        seed_generators(self.seed, 5, self.epoch, self.accelerator.process_index)
        start_epoch(phase.train_batches, self.epoch, skip=self.batch)
        self.step = self.epoch * self.steps_per_epoch + -(-self.batch // self.accumulate)
        self.model.train()
        self._call("on_train_epoch_start")
        train_loss = self._train(wrapped, phase.train_batches, started)
        check_replicas(self.accelerator, self.model.network)
        share_buffers(self.accelerator, self.model.network)
        self._call("on_validation_start")
        self.val_logits = self._logits(phase.network, phase.val_batches, self._before_validation_batch)
        validation = evaluate_logits(*self.val_logits, self.model.class_names)
        if not math.isfinite(validation.loss):
            lr = self.optimizer.param_groups[self.head_group]["lr"]
            raise TransferkitError(
                f"the validation loss became {validation.loss} in epoch {self.epoch + 1} at lr {lr:g}; lower lr"
            )
        self._begin_epoch()
        seconds = time.perf_counter() - started
        self.history.records.append(
            EpochRecord(self.epoch + 1, train_loss, validation.loss, validation.accuracy, seconds)
        )
        try:
            self._call("on_validation_end")
        except CallbackError:
            self._end_epoch()  # what the epoch has learnt is saved before the error goes on
            raise
        self._end_epoch()

    def _end_epoch(self) -> None:
        self.should_stop = self.any_process(self.should_stop)
        self._call("on_train_epoch_end")

    def _train(self, wrapped: nn.Module, batches: Batches, started: float) -> float:
        """Go through the epoch's batches that are left; returns the mean loss per picture of the whole epoch."""
        self.loss_sums = self.loss_sums.to(self.device)
        self.placement.stepper.zero_grad()  # what a user or a broken-off epoch left behind would move the first step
        for window in windows(batches, self.accumulate, skip=self.batch, before=self._seed_reading):
            seeds = [self._batch_seed(self.batch + position) for position in range(len(window))]
            step = self.gradients.begin(self.accelerator, wrapped, window, seeds=seeds)
            for position in range(len(window)):
                self._call("on_train_batch_start")
                self.loss_sums += self.gradients.add(step, position)
                if position + 1 == len(window):
                    self._optimizer_step(batches, len(window))
                self.batch += 1
                self._seconds = time.perf_counter() - started
                self._call("on_train_batch_end")
            self._stop_if_interrupted()
        self._finite.ask()
        loss, weight = self.accelerator.reduce(self.loss_sums)
        return float(loss / weight)

    def _seed_reading(self, batch: int) -> None:
        # Batches that are not from loader() may draw from the global generators when they are read.
        seed_generators(self.seed, 6, self.epoch, batch, self.accelerator.process_index)

    def _batch_seed(self, batch: int) -> tuple[int, ...]:
        return self.seed, 2, self.epoch, batch, self.accelerator.process_index

    def _optimizer_step(self, batches: Batches, count: int) -> None:
        if self.clip_grad_norm is None:
            held = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
            norm = nn.utils.get_total_norm([each.grad for each in held if each.grad is not None])
        else:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        if self.accelerator.scaler is not None:  # fp16 meets infinite gradients as a matter of course, and skips them
            norm = torch.zeros_like(norm)
        lr = self.optimizer.param_groups[self.head_group]["lr"]
        first, where = self.batch + 1 - count, f"{self._where()} at lr {lr:g}"
        self._finite.note(self.loss_sums[0], norm, where, lambda: names_of(batches, first, count))
        self._call("on_before_optimizer_step")
        self.placement.stepper.step()
        self.placement.stepper.zero_grad()
        self.step += 1

    def _where(self) -> str:
        done = self.epoch * self.steps_per_epoch
        return f"step {min(self.step - done + 1, self.steps_per_epoch)} of epoch {self.epoch + 1}"

    def _stop_if_interrupted(self) -> None:
        several = self.accelerator.num_processes > 1
        if several and self.step % self._ask_every and self.batch < self.batches_per_epoch:
            return
        if self.any_process(self._interrupts.name is not None):
            done = self.step - self.epoch * self.steps_per_epoch
            raise Interrupted(
                f"interrupted after step {done} of {self.steps_per_epoch} in epoch {self.epoch + 1} of {self.epochs}"
            )

    def _before_validation_batch(self) -> None:
        if self.accelerator.num_processes == 1:
            self._stop_if_interrupted()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on from here, where no step is half done; every process must ask.

        Returns:
            Nested dicts, lists, tuples, JSON values and tensors: network, optimizer, callbacks, history, position.
        """
        self._finite.ask()
        scaler = self.accelerator.scaler
        return {
            "network": network_state(self.model.network),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": None if scaler is None else scaler.state_dict(),
            "callbacks": callback_states(self.callbacks),
            "history": self.history.to_dicts(),
            "batch": self.batch,
            "batches_per_epoch": self.batches_per_epoch,
            "sums": self.accelerator.gather(self.loss_sums.to(self.device)[None]),
            "seconds": self._seconds,
            "stopped": self.should_stop,
            "micro_batch": self.gradients.micro_batch,
            "precision": self.precision_used,
        }

    @refuses_odd_content()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, before :meth:`fit` goes on with it.

        Args:
            state: That dictionary; from a trainer with the same model, optimizer, callbacks and number of processes.

        Raises:
            ArtifactError: It is of another model, optimizer, or set of callbacks, and nothing has changed; or it holds
                what no run has saved.
        """
        mine, theirs = callback_states(self.callbacks).keys(), state["callbacks"].keys()
        if mine != theirs:
            raise ArtifactError(
                f"the run was saved with the callbacks {one_line(', '.join(theirs)) or '-'}, and is to go on with "
                f"{', '.join(mine) or '-'}; give it the same"
            )
        shapes = {key: tuple(value.shape) for key, value in self.model.network.state_dict().items()}
        saved = {key: tuple(value.shape) for key, value in state["network"].items()}
        if different := sorted(shapes.items() ^ saved.items()):
            raise ArtifactError(
                f"the saved run is of another network than {self.model.name}: {one_line(different[0][0])} differs"
            )
        if len(state["sums"]) != self.accelerator.num_processes:
            raise ArtifactError(
                f"the run was saved by {len(state['sums'])} processes, and is to go on with "
                f"{self.accelerator.num_processes}; start as many"
            )
        if (precision := one_line(state["precision"])) != self.precision_used:
            raise ArtifactError(f"the run was saved in {precision}; give it precision={precision!r}")
        self._place()
        load_network_state(self.model.network, state["network"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        restore_callbacks(self.callbacks, state["callbacks"])
        self.history.records[:] = [EpochRecord(**record) for record in state["history"]]
        self.batch, self.should_stop = state["batch"], state["stopped"]
        self.gradients.micro_batch = state["micro_batch"]
        self.epoch, self.batches_per_epoch = len(self.history), state["batches_per_epoch"]
        self.loss_sums = state["sums"][self.accelerator.process_index].clone()
        self._seconds = state["seconds"]

    def evaluate(self, batches: Batches) -> Evaluation:
        """Measure the model as it is; its training mode is left as it was.

        Args:
            batches: An iterable of (images (B, C, H, W) float, labels (B,) int).

        Raises:
            DataError: There are no pictures.
        """
        self.model.to(self.device)
        logits, labels = self._logits(self.model.network, batches)
        return evaluate_logits(logits, labels, self.model.class_names, temperature=self.model.temperature)

    def _logits(
        self, network: nn.Module, batches: Batches, before_batch: Callable[[], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.placement.logits(network, batches, self.model, engine=self.engine, before_batch=before_batch)

    def _tell_of(self, error: BaseException) -> None:
        """Tell callbacks of an error; one of theirs does not hide it, unless an interrupted run could not be saved."""
        try:
            self._call("on_exception")
        except TransferkitError as another:
            if isinstance(error, Interrupted) and not isinstance(another, CallbackError):
                raise
            logger.warning("%s", another)

    def _call(self, hook: str) -> None:
        call(self.callbacks, hook, self)


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
    shard: bool,
    engine: str,
) -> None:
    """Raise ``SettingError`` unless these settings of a :class:`Trainer` are within their ranges, and go together."""
    check_seed(seed)
    check_number("label_smoothing", label_smoothing, at_least=0, below=1)
    if class_weights is not None and not isinstance(class_weights, Iterable):
        raise SettingError(f"class_weights must be one number per class, or None, got {class_weights!r}")
    for weight in () if class_weights is None else class_weights:
        check_number("class_weights", weight, above=0)
    check_number("mixup", mixup, at_least=0)
    check_number("cutmix", cutmix, at_least=0)
    check_whole_number("accumulate", accumulate, at_least=1, at_most=MOST_PER_BATCH)
    check_number("clip_grad_norm", clip_grad_norm, above=0, or_none=True)
    if precision not in PRECISIONS:
        raise SettingError(f"precision={precision!r}; it can be {', '.join(PRECISIONS)}")
    check_engine(engine)
    if shard and engine != "eager":
        raise SettingError(
            f"engine={engine!r} computes with a copy of the network, and shard spreads the network over the processes; "
            "use engine='eager'"
        )


def check_class_weights(class_weights: Sequence[float] | None, classes: int) -> None:
    """Raise ``SettingError`` unless there is one weight per class, or none at all."""
    if class_weights is not None and len(class_weights) != classes:
        raise SettingError(f"class_weights needs one weight for each of {classes} classes, got {len(class_weights)}")


def _head_group(model: TransferModel, optimizer: torch.optim.Optimizer) -> int:
    head = {id(parameter) for parameter in model.stages[-1].parameters}
    groups = optimizer.param_groups
    return next(i for i, group in enumerate(groups) if any(id(each) in head for each in group["params"]))
