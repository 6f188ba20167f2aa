"""One network over several processes: what all of them must agree on, and tensors that are spread over them.

Processes are started by ``torchrun`` or ``accelerate launch`` and talk through accelerate. Networks that are replicated
are wrapped by accelerate; ones that are sharded use torch's FSDP2 (``fully_shard``), on CPUs as well as on GPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from transferkit.evaluation import keeps_mode
from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Sharding",
    "check_replicas",
    "check_same_everywhere",
    "equally_many",
    "everywhere",
    "load_network_state",
    "load_optimizer_state",
    "network_state",
    "optimizer_state",
    "reshard",
    "share_buffers",
    "share_object",
    "spread_like",
    "synchronised_norms",
    "whole",
]


def share_object(accelerator: Accelerator, value: Any) -> Any:
    """Return what the main process has, in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def everywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Say whether a flag is set in all processes; every process must ask."""
    if accelerator.num_processes == 1:
        return flag
    from accelerate.utils import gather_object

    return bool(all(gather_object([flag])))


def check_same_everywhere(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Raise where the processes of a run do not see the same.

    Args:
        accelerator: The processes.
        facts: What must be equal, by a name the user knows; JSON values.

    Raises:
        DataError: A process sees something else; the message names it.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    seen = gather_object([dict(facts)])
    for rank, other in enumerate(seen):
        for name, value in seen[0].items():
            if other.get(name) != value:
                raise DataError(
                    f"process {rank} has {name} {other.get(name)!r} where process 0 has {value!r}; give all machines "
                    "the same pictures and settings"
                )


def check_replicas(accelerator: Accelerator, network: nn.Module) -> None:
    """Raise if the processes' copies of a network are no longer the same to the bit.

    Raises:
        TransferkitError: They have drifted apart.
    """
    if accelerator.num_processes == 1 or any(isinstance(each, DTensor) for each in network.parameters()):
        return
    bits = [each.detach().reshape(-1).view(torch.uint8) for each in network.parameters()]
    sums = accelerator.gather(torch.stack([each.sum(dtype=torch.int64) for each in bits])[None])
    if not bool((sums == sums[0]).all()):
        raise TransferkitError(
            "the processes' copies of the network have drifted apart; a callback that changes weights must do so "
            "in every process, and all machines must be of one kind"
        )


def share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Give every process the main one's buffers: each has seen other pictures, and validation must use one network."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            value = buffer.contiguous()
            torch.distributed.broadcast(value, src=0)
            buffer.copy_(value)


@contextmanager
def synchronised_norms(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Let batch norms in training see the batches of all processes as one, while this is entered.

    Only the modules' class is another meanwhile, so that keys and tensors stay what they are.

    Args:
        network: Where they are.
        device: Where it is trained.

    Raises:
        SettingError: The device is a CPU, for which torch cannot do it, or a batch norm is of a class of its own.

    Source: ``torch.nn.SyncBatchNorm``; timm's ``SyncBatchNormAct``.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> with synchronised_norms(network, torch.device("cuda")):
        ...     network[1]
        SyncBatchNorm(4, ...)
        >>> network[1]
        BatchNorm2d(4, ...)
    """
    if device.type == "cpu":
        raise SettingError(
            "sync_batch_norm needs GPUs, since torch synchronises batch norms only there; leave it out, or keep the "
            "pretrained statistics with keep_statistics=True"
        )
    from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

    synchronised: dict[type[nn.Module], type[nn.Module]] = {
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), nn.SyncBatchNorm),
        BatchNormAct2d: SyncBatchNormAct,
    }
    norms: list[tuple[str, Any]] = [each for each in network.named_modules() if isinstance(each[1], _BatchNorm)]
    if own := [name for name, module in norms if type(module) not in synchronised]:
        raise SettingError(
            f"sync_batch_norm knows torch's batch norms and timm's BatchNormAct2d, and {own[0]} is neither; leave it "
            "out"
        )
    before = [(module, type(module)) for _, module in norms]
    for module, kind in before:
        module.__class__ = synchronised[kind]
        module.process_group = None  # all processes
    try:
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
            del module.process_group


class Sharding:
    """A network whose parameters are spread over the processes, in place; the optimizer's groups and state follow.

    Args:
        accelerator: The processes.
        model: Its parameters become DTensors until :meth:`undo`.
        optimizer: Holds all of them.

    Raises:
        SettingError: There is one process only.
        TransferkitError: A parameter was not spread.

    Source: ``torch.distributed.fsdp.fully_shard`` (Zhao et al. 2023, "PyTorch FSDP").
    """

    def __init__(self, accelerator: Accelerator, model: TransferModel, optimizer: torch.optim.Optimizer) -> None:
        """Spread them."""
        if accelerator.num_processes == 1:
            raise SettingError(
                "sharding spreads a network over several processes, and this is one: start the run with torchrun or "
                "accelerate launch, or leave shard alone"
            )
        self.model, self.optimizer = model, optimizer
        network = model.network
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._plain = copy.deepcopy(network).to("cpu")
        state = optimizer_state(optimizer)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for module in _parts(model):
            fully_shard(module, mesh=mesh)
        fully_shard(network, mesh=mesh)
        if left := [name for name, each in network.named_parameters() if not isinstance(each, DTensor)]:
            raise TransferkitError(f"{model.name} could not be sharded: {left[0]} stayed whole; run it without shard")
        self._hand_over(state)

    def undo(self, *, complete: bool) -> None:
        """Give the model a native network again, and the optimizer its parameters.

        Args:
            complete: Whether with the weights and the optimizer's state of now, for which every process must call;
                else the weights are those that were spread, and the optimizer has no state.
        """
        device = next(self.model.parameters()).device
        state: dict[str, Any] | None = None
        if complete:
            state = optimizer_state(self.optimizer)
            self._plain.load_state_dict(network_state(self.model.network))
        self.model.network = self._plain.to(device)
        self.model.freeze(self.model.frozen)
        self._hand_over(state)

    def _hand_over(self, state: Mapping[str, Any] | None) -> None:
        """Let the optimizer hold the parameters of these names that the network has now."""
        parameters = dict(self.model.network.named_parameters())
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [parameters[name] for name in names]
        self.optimizer.state.clear()
        if state is not None:
            load_optimizer_state(self.optimizer, state)


def reshard(network: nn.Module) -> None:
    """Let a sharded network forget the whole parameters that its last pass gathered, so that it holds the shards."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def equally_many(
    accelerator: Accelerator, batches: Iterable[tuple[Tensor, Tensor]], preprocessing: Preprocessing
) -> Iterator[tuple[Tensor, Tensor]]:
    """Add a black picture without a label for each batch that others have more: a sharded network runs in all or none.

    Its logits come last, after those that have a label.
    """
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        # Asked before each, since what a pass sends must not meet another question.
        if not accelerator.reduce(torch.tensor(float(batch is not None), device=accelerator.device)) > 0:
            return
        yield (_picture(preprocessing), torch.zeros(0, dtype=torch.int64)) if batch is None else batch


def _picture(preprocessing: Preprocessing) -> Tensor:
    return torch.zeros(1, preprocessing.channels, preprocessing.size, preprocessing.size)


def _parts(model: TransferModel) -> list[nn.Module]:
    """Return modules that can be gathered one after the other: blocks whose parameters nothing else uses.

    What gives a view of its input, a permutation for one, is left out: where it is changed in place, FSDP would lose
    its hook and with it the gradient.
    """
    network, paths = model.network, [path for stage in model.stages[:-1] for path in stage.paths]
    modules = [network.get_submodule(path) for path in paths if _owns_its_parameters(network, path)]
    views: dict[nn.Module, bool] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        views[module] = views.get(module, False) or any(
            isinstance(each, Tensor) and each._is_view() for each in tree_leaves(output)
        )

    blocks = [each for each in modules if any(each.children()) and not isinstance(each, _BatchNorm)]
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        with keeps_mode(model), torch.no_grad():
            network.eval()(_picture(model.preprocessing).to(next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return [block for block in blocks if views.get(block) is False]


def _owns_its_parameters(network: nn.Module, path: str) -> bool:
    """Whether no parameter of this module is known elsewhere in the network too."""
    own = {id(parameter) for parameter in network.get_submodule(path).parameters()}
    others = network.named_parameters(remove_duplicate=False)
    return bool(own) and not any(id(each) in own and not f"{name}.".startswith(f"{path}.") for name, each in others)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is on one process; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def network_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors by native key, whole; every process must ask for them."""
    return {key: whole(value.detach()) for key, value in network.state_dict().items()}


def load_network_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a network, sharded or not, with whole tensors."""
    present = network.state_dict()
    network.load_state_dict({key: spread_like(value, present.get(key)) for key, value in state.items()})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors; every process must ask for it."""
    return cast(
        dict[str, Any], tree_map(lambda each: whole(each) if isinstance(each, Tensor) else each, optimizer.state_dict())
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_state` gave, into an optimizer over the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        index: {name: spread_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": kept})


def spread_like(value: Any, other: Tensor | None) -> Any:
    """Spread a whole tensor, or order its memory, as another one of its shape; anything else is returned as it is."""
    if isinstance(value, DTensor) or not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return value
    if value.shape != other.shape:
        return value
    if not isinstance(other, DTensor):
        # fused optimizers go through the memory of both side by side
        return torch.empty_like(other, dtype=value.dtype, device=value.device).copy_(value)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
