"""One network over several processes: what all of them must agree on, and tensors that are spread over them.

Processes are started by ``torchrun`` or ``accelerate launch`` and talk through accelerate. Networks that are replicated
are wrapped by accelerate; ones that are sharded use torch's FSDP2 (``fully_shard``), on CPUs as well as on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from transferkit.exceptions import DataError, SettingError, TransferkitError
from transferkit.model import TransferModel
from transferkit.preprocessing import Preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "check_replicas",
    "check_same_everywhere",
    "equally_many",
    "load_network_state",
    "load_optimizer_state",
    "network_state",
    "optimizer_state",
    "reshard",
    "shard",
    "share_buffers",
    "share_object",
    "whole",
]


def share_object(accelerator: Accelerator, value: Any) -> Any:
    """Return what the main process has, in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


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
    words = [each.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64) for each in network.parameters()]
    sums = accelerator.gather(torch.stack(words)[None])
    if not bool((sums == sums[0]).all()):
        raise TransferkitError(
            "the processes' copies of the network have drifted apart; a callback that changes weights must do so "
            "in every process"
        )


def share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Give every process the main one's buffers: each has seen other pictures, and validation must use one network."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def shard(accelerator: Accelerator, model: TransferModel, optimizer: torch.optim.Optimizer) -> None:
    """Spread a network's parameters over the processes; the optimizer's groups follow.

    Args:
        accelerator: The processes.
        model: Its parameters become DTensors, in place.
        optimizer: One that has made no step yet.

    Raises:
        SettingError: There is one process only, or the optimizer has made steps.
        TransferkitError: A parameter was not spread.

    Source: ``torch.distributed.fsdp.fully_shard`` (Zhao et al. 2023, "PyTorch FSDP").
    """
    if accelerator.num_processes == 1:
        raise SettingError(
            "sharding spreads a network over several processes, and this is one: start the run with torchrun or "
            "accelerate launch, or leave shard alone"
        )
    if optimizer.state:
        raise SettingError("sharding needs a new optimizer; this one has made steps")
    network = model.network
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for stage in model.stages[:-1]:
        for path in stage.paths:
            module = network.get_submodule(path)
            if type(module).forward is not nn.Module.forward and _owns_its_parameters(network, path):
                fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    spread = dict(network.named_parameters())
    if left := [name for name, parameter in spread.items() if not isinstance(parameter, DTensor)]:
        raise TransferkitError(f"{model.name} could not be sharded: {left[0]} stayed whole; run it without shard")
    for group in optimizer.param_groups:
        group["params"] = [spread[names[id(parameter)]] for parameter in group["params"]]


def reshard(network: nn.Module) -> None:
    """Let go of whole parameters that a pass without gradients has gathered, or the next would take them as they are."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def equally_many(
    accelerator: Accelerator, batches: Iterable[tuple[Tensor, Tensor]], preprocessing: Preprocessing
) -> Iterator[tuple[Tensor, Tensor]]:
    """Add empty batches where a process has fewer than others: a sharded network runs in all of them or in none."""
    count = 0
    for batch in batches:
        yield batch
        count += 1
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    for _ in range(int(counts.max()) - count):
        empty = torch.zeros(0, preprocessing.channels, preprocessing.size, preprocessing.size)
        yield empty, torch.zeros(0, dtype=torch.int64)


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
    network.load_state_dict({key: _spread_like(value, present.get(key)) for key, value in state.items()})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors; every process must ask for it."""
    return cast(
        dict[str, Any], tree_map(lambda each: whole(each) if isinstance(each, Tensor) else each, optimizer.state_dict())
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_state` gave, into an optimizer over the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        index: {name: _spread_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": kept})


def _spread_like(value: Any, other: Tensor | None) -> Any:
    if isinstance(value, Tensor) and isinstance(other, DTensor) and value.shape == other.shape:
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value
