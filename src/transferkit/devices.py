"""Which device a run uses, and how it computes there, through Hugging Face accelerate."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, patch_environment
from torch import nn

from transferkit.exceptions import SettingError, one_line
from transferkit.model import TransferModel

__all__ = [
    "PRECISIONS",
    "check_compiler",
    "choose_device",
    "is_main_process",
    "make_accelerator",
    "processes_per_machine",
    "runs_channels_last",
    "usable_cores",
]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# How long a process waits for another that answers no more. Their own defaults are 10 minutes for GPUs, 30 for CPUs.
_PATIENCE = timedelta(minutes=5)
_FOREIGN = {"FSDP": "--use_fsdp", "DEEPSPEED": "--use_deepspeed", "MEGATRON_LM": "--use_megatron_lm"}


def choose_device(device: str | None = None) -> torch.device:
    """Return the device of that name, or the best there is.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …, or ``None``.

    Raises:
        SettingError: The device does not exist.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return best or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu"] + ([best.type] if best is not None else []))
        raise SettingError(f"device={device!r} is not there; this machine has {there}") from error


def is_main_process() -> bool:
    """Whether this is the first, or only, of the processes that ``torchrun`` or ``accelerate launch`` has started.

    Example:
        >>> is_main_process()
        True
    """
    return int(os.environ.get("RANK", "0")) == 0


def usable_cores() -> int:
    """How many cores this process may use, which ``taskset`` or a container can make fewer than there are.

    Example:
        >>> 1 <= usable_cores() <= os.cpu_count()
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_per_machine() -> int:
    """How many processes ``torchrun`` or ``accelerate launch`` has started on this machine.

    Example:
        >>> processes_per_machine()
        1
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_accelerator(device: str | None = None, precision: str = "auto") -> Accelerator:
    """Set up accelerate for a device and a precision.

    Where ``torchrun`` or ``accelerate launch`` has started several processes, this is where they meet. From then on one
    that waits for the others gives up after five minutes.

    Args:
        device: As for :func:`choose_device`, but each of several processes has its own GPU, so that none can be chosen
            by number. ``accelerate launch --cpu`` is the same as ``"cpu"``.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` (CUDA only), or ``"auto"``: what ``accelerate launch
            --mixed_precision`` says, else bf16 on a GPU that computes in it, else fp32.

    Raises:
        SettingError: The device does not exist, cannot compute in this precision, or is not the one that the processes
            have met on; or accelerate was told to use FSDP, DeepSpeed or Megatron.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"precision={precision!r}; it can be {', '.join(PRECISIONS)}")
    for name, option in _FOREIGN.items():
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise SettingError(
                f"accelerate launch {option} is not what trains here; leave it out, and give shard=True (--shard) to "
                "spread a network over the processes"
            )
    if device is None and parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = "cpu"
    chosen = choose_device(device)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device is not None and torch.device(device).index is not None and chosen.type != "cpu":
        raise SettingError(
            f"device={device!r} would be that of every process; give {chosen.type!r} or nothing, and each takes its own"
        )
    if precision == "auto":
        told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        best = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        precision = told if told in PRECISIONS else best
    if precision == "fp16" and chosen.type != "cuda":
        raise SettingError(f"precision='fp16' needs a CUDA device, not {chosen}; use bf16 or fp32")
    # accelerate keeps its choices in process-wide state and refuses others; only processes that have met must stay so.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    own = several or device is None
    with nullcontext() if own else patch_environment(accelerate_torch_device=str(chosen)):
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            # accelerate takes processes without GPUs for strangers to each other unless it is told that they have none
            cpu=chosen.type == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    if accelerator.device.type != chosen.type:
        raise SettingError(
            f"device={chosen.type!r}, but the processes have met on {accelerator.device.type!r}; use one kind of "
            "device in a run of several processes"
        )
    return accelerator


def runs_channels_last(model: TransferModel) -> bool:
    """Whether a model is one of convolutions, and takes its channels last in memory, which trains them faster.

    Args:
        model: One picture is run through a copy of it.

    Source: PyTorch, "Channels Last Memory Format".

    Example:
        >>> from transferkit.create import create_model
        >>> models = [create_model(f"timm/test_{kind}", weights=None, num_classes=2) for kind in ("resnet", "vit")]
        >>> [runs_channels_last(model) for model in models]
        [True, False]
    """
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:
        return False
    network = copy.deepcopy(model.network).eval().to(memory_format=torch.channels_last)
    size, channels = model.preprocessing.size, model.preprocessing.channels
    image = torch.zeros(1, channels, size, size).to(next(network.parameters()))
    try:
        with torch.no_grad():
            network(image)
    except RuntimeError:  # a view of what is no longer in one piece
        return False
    return True


def check_compiler(device: torch.device) -> None:
    """Compile one operation, to know in seconds whether torch can compile at all.

    Args:
        device: Where it is to run.

    Raises:
        SettingError: It cannot; on a CPU it needs a C++ compiler.
    """
    try:
        torch.compile(lambda number: number + 1)(torch.zeros(1, device=device))
    except Exception as error:  # torch has an error of its own for each thing that can be missing
        raise SettingError(f"torch cannot compile on {device} ({one_line(error)}); leave out torch_compile") from error
