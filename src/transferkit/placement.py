"""Where a model is trained, and in what form: its device, precision and memory layout, wrapped or sharded."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from transferkit.devices import make_accelerator, runs_channels_last
from transferkit.distribution import Sharding, check_replicas, equally_many, reshard
from transferkit.evaluation import collect_logits

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator

    from transferkit.model import TransferModel

__all__ = ["Placement"]


class Placement:
    """Puts a model where it trains, makes of it what trains there, and gives it back as it was.

    Args:
        device: As for :func:`~transferkit.devices.make_accelerator`; nothing is set up before it is asked for.
        precision: The same.
        shard: Whether parameters, gradients and optimizer state are spread over the processes.
        torch_compile: Whether what trains is compiled.

    Attributes:
        stepper: The optimizer as it was prepared by the last :meth:`wrap`; ``None`` before.

    Example:
        >>> from transferkit.create import create_model
        >>> from transferkit.optim import param_groups
        >>> model = create_model("timm/test_resnet", weights=None, num_classes=2)
        >>> optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
        >>> placement = Placement("cpu", "fp32")
        >>> placement.place(model, optimizer)
        >>> wrapped = placement.wrap(model.network, model, optimizer)
        >>> wrapped is model.network, placement.precision, placement.can_fuse
        (True, 'fp32', True)
        >>> placement.release(model, complete=True)
    """

    def __init__(
        self, device: str | None = None, precision: str = "auto", *, shard: bool = False, torch_compile: bool = False
    ) -> None:
        """Store the settings; no device is touched yet."""
        self.shard, self.torch_compile = shard, torch_compile
        self.stepper: Any = None
        self._asked = device, precision
        self._wrapped: nn.Module | None = None
        self._sharding: Sharding | None = None

    @cached_property
    def accelerator(self) -> Accelerator:
        """Device, precision and processes."""
        return make_accelerator(*self._asked)

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return cast(torch.device, self.accelerator.device)

    @property
    def precision(self) -> str:
        """``"fp32"``, ``"bf16"`` or ``"fp16"``."""
        mixed = str(self.accelerator.mixed_precision)
        return "fp32" if mixed == "no" else mixed

    @property
    def can_fuse(self) -> bool:
        """Whether kept batch norms may be computed with the convolutions before them."""
        return self.device.type == "cpu" and self.precision == "fp32" and not (self.shard or self.torch_compile)

    def place(self, model: TransferModel, optimizer: torch.optim.Optimizer) -> None:
        """Put a network where it is trained, and spread it over the processes if that is asked for.

        Args:
            model: Its network is changed in place, until :meth:`release`.
            optimizer: Over its parameters.

        Raises:
            SettingError: Sharding is asked for, and there is one process only.
        """
        model.to(self.device)
        if not self.shard and runs_channels_last(model):
            model.network.to(memory_format=torch.channels_last)
        if self.shard and self._sharding is None:
            self._sharding = Sharding(self.accelerator, model, optimizer)

    def wrap(self, module: nn.Module, model: TransferModel, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Return what is trained as it runs here: what synchronises gradients must know what trains.

        Args:
            module: It, the network or a part of it; it takes the place of what was wrapped before.
            model: It is of this one.
            optimizer: Over the model's parameters; prepared, it becomes :attr:`stepper`.
        """
        if self.stepper is not None:
            self.accelerator.free_memory()  # it would hold on to the model and the optimizer as wrapped before
            self._unwrap()
        self._wrapped = module
        if self.shard:  # fully_shard looks at what trains in every pass, and has wrapped the network already
            wrapped, self.stepper = module, self.accelerator.prepare_optimizer(optimizer)
        else:
            wrapped, self.stepper = self.accelerator.prepare(module, optimizer)
            check_replicas(self.accelerator, model.network)
        return cast(nn.Module, torch.compile(wrapped) if self.torch_compile else wrapped)

    def release(self, model: TransferModel, *, complete: bool) -> None:
        """Make the network a native one again, whole and laid out as usual.

        Args:
            model: That :meth:`place` was given.
            complete: Whether all processes are here, so that shards can be put together; else a sharded network has
                the weights again that it was placed with.
        """
        model.network.to(memory_format=torch.contiguous_format)
        self._unwrap()
        if self._sharding is not None:
            sharding, self._sharding = self._sharding, None
            sharding.undo(complete=complete)

    def _unwrap(self) -> None:
        if self._wrapped is not None:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            self._wrapped = None

    def logits(
        self,
        network: nn.Module,
        batches: Any,
        model: TransferModel,
        *,
        engine: str = "eager",
        before_batch: Callable[[], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, num_classes) and labels (N,) of the pictures of all processes, on the CPU.

        Args:
            network: What computes, of a model that is placed or not.
            batches: Of this process.
            model: The network is of this one.
            engine: What computes where nothing is trained.
            before_batch: Called before each batch is computed.
        """
        if self._sharding is not None:
            batches = equally_many(self.accelerator, batches, model.preprocessing)
        logits, labels = collect_logits(network, batches, self.device, engine=engine, before_batch=before_batch)
        logits = logits[: len(labels)]
        reshard(model.network)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object([(logits, labels)])
            logits, labels = (torch.cat([part[position] for part in parts]) for position in (0, 1))
        return logits, labels
